"""What becomes of a step that is not finite: training stops, and says where the first infinity or NaN came up.

`Watch` notices such a step, and keeps what it began with. `first_nonfinite` then runs it again on a copy of the network
that looks at the output and the gradient of every layer.
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
    """What a step began with.

    Attributes:
        number: of the step in the run.
        params: trained tensors.
        buffers: all others.
        batch: samples and labels.
        carried: from the step before.
        random_state: of torch's default generator.
        is_plain: whether it was a plain step, whatever the method.
    """

    number: int
    params: Tensors
    buffers: Tensors
    batch: Batch
    carried: Carried
    random_state: Tensor
    is_plain: bool = False


class Watch:
    """Looks at whether a step was finite once the next one begins, so that the host need not wait for the device.

    Args:
        explain: makes the error for a step that was not.
    """

    def __init__(self, explain: Callable[[Start], NonFiniteError]) -> None:
        self._explain = explain
        self._params: Tensors = {}
        self._waiting: tuple[Start, Tensor, torch.cuda.Event | None] | None = None

    def expect(self, start: Start, all_finite: Tensor) -> None:
        """Fetch the flag of a step without waiting for it, and copy the parameters, which its update will move."""
        if not self._params:
            self._params = {name: torch.empty_like(param) for name, param in start.params.items()}
        torch._foreach_copy_(list(self._params.values()), list(start.params.values()))
        flag = all_finite.to("cpu", non_blocking=True)
        event = None
        if all_finite.is_cuda:
            event = torch.cuda.Event()
            event.record()
        self._waiting = (start._replace(params=self._params), flag, event)

    def settle(self) -> None:
        """Make sure that the last step was finite.

        Raises:
            NonFiniteError: it was not.
        """
        if self._waiting is None:
            return
        start, flag, event = self._waiting
        self._waiting = None
        if event is not None:
            event.synchronize()
        if not flag:
            raise self._explain(start)


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
    """Run a step again, and find the first thing in it that is not finite.

    Returns:
        What it is, and in which pass and layer, or None where this time everything is finite.
    """
    for kind, tensors in (("samples", {"": start.batch[0]}), ("weights", start.params)):
        for name, tensor in tensors.items():
            if not _is_finite(tensor):
                return f"the {kind} it began with" + (f", in {name!r}" if name else "")
    if start.is_plain:
        settings = MethodSettings("plain", label_smoothing=settings.label_smoothing)
    search = _Search(passes_of(settings))
    step = make_step(search.copy_of(model), settings, autocast_dtype)
    with torch.random.fork_rng(devices=[]):
        torch.set_rng_state(start.random_state)
        out, _ = step(start.params, start.buffers, start.batch, start.carried)
    search.look("the loss", out.loss, search.passes[0])
    if len(search.passes) > 1:
        search.look("the loss", out.adversarial_loss, search.passes[-1])
    return search.found


class _Search:
    """Looks at what the layers of a network compute, forwards and backwards, until something is not finite.

    Args:
        passes: names of the passes of a step, in their order.
    """

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
