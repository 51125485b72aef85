"""What becomes of a step that is not finite: training stops, and says where the first infinity or NaN came up.

`first_nonfinite` runs it again on a copy of the network that looks at the output and the gradient of every layer.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from apart_func import Tensors
from experiments.methods import Batch, Carried, make_step, passes_of
from experiments.settings import MethodSettings


class NonFiniteError(RuntimeError):
    """A loss or gradient is infinite or not a number."""


class Start(NamedTuple):
    """What a step began with: its number in the run, all its arguments, and the state of torch's default generator."""

    number: int
    params: Tensors
    buffers: Tensors
    batch: Batch
    carried: Carried
    random_state: Tensor


def nonfinite_error(
    model: nn.Module, settings: MethodSettings, autocast_dtype: torch.dtype | None, start: Start
) -> NonFiniteError:
    """The error for a step that was not finite, from the arguments of `first_nonfinite`."""
    where = first_nonfinite(model, settings, autocast_dtype, start)
    return NonFiniteError(
        f"step {start.number} is not finite. The first infinity or NaN: "
        f"{where or 'none, when the step was run a second time'}. Try a lower --lr, or --clip 1."
    )


def first_nonfinite(
    model: nn.Module, settings: MethodSettings, autocast_dtype: torch.dtype | None, start: Start
) -> str | None:
    """Run a step again, on all ranks, and find the first thing in it that is not finite on this one."""
    search = _Search(passes_of(settings))
    for kind, tensors in (("samples", {"": start.batch[0]}), ("weights", start.params)):
        for name, tensor in tensors.items():
            if not _is_finite(tensor):
                search.found = search.found or f"the {kind} it began with" + (f", in {name!r}" if name else "")
    step = make_step(search.copy_of(model), settings, autocast_dtype)
    with torch.random.fork_rng(devices=[]):
        torch.set_rng_state(start.random_state)
        out, _ = step(start.params, start.buffers, start.batch, start.carried)
    search.look("the loss", out.loss, search.passes[0])
    if len(search.passes) > 1:
        search.look("the loss", out.adversarial_loss, search.passes[-1])
    return search.found


class _Search:
    """Looks at what the layers of a network compute, forwards and backwards, until something is not finite."""

    def __init__(self, passes: tuple[str, ...]) -> None:
        self.passes, self.begun = passes, 0
        self.found: str | None = None

    def copy_of(self, model: nn.Module) -> nn.Module:
        """A copy of the network that lets itself be looked at. Functions are hooked: copies of the copy share them."""
        model = copy.deepcopy(model)
        model.register_forward_pre_hook(lambda module, inputs: self.begin_pass())
        for name, module in model.named_modules():
            module.register_forward_hook(self._hook(name))
        return model

    def begin_pass(self) -> None:
        """Note that the network is called once more."""
        self.begun += 1

    def look(self, what: str, tensor: Tensor, pass_name: str) -> None:
        """Note the first tensor that is not finite."""
        if self.found is None and not _is_finite(tensor):
            self.found = f"{what}, in the {pass_name} pass"

    def _hook(self, name: str) -> Callable[[nn.Module, Any, Any], None]:
        layer = f"layer {name!r}" if name else "the network"

        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            if not isinstance(output, Tensor):
                return
            pass_name = self.passes[(self.begun - 1) % len(self.passes)]
            self.look(f"the output of {layer}", output, pass_name)
            watched = {f"the gradient by the output of {layer}": output}
            watched |= {f"the gradient of {key} of {layer}": p for key, p in module.named_parameters(recurse=False)}
            for what, tensor in watched.items():
                if tensor.requires_grad:
                    tensor.register_hook(partial(self.look, what, pass_name=pass_name))

        return hook


def _is_finite(tensor: Tensor) -> bool:
    return bool(tensor.isfinite().all())
