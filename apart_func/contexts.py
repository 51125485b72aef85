"""A context of the drop-in: the handler of what runs inside it, and the buffers that an adversarial pass works on.

Nobody says how many samples a forward of the user's loop has: hooks on the model see its input before its layers do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from apart_func._torch import backward_task, is_checkpointed
from apart_func.checks import clean_groups
from apart_func.errors import BatchError, UsageError
from apart_func.groups import Grouping, Rows, number_of_groups
from apart_func.intercept import BatchNormCall, batch_norm_layers, is_stock, no_training_layer
from apart_func.layers import PerturbedLayers, Record, in_groups
from apart_func.running import copy_into_buffer
from apart_func.trees import PerturbationTree, StatGrads, StatGradTree, dense_values, leaves, tensors_of


class Context:
    """The handler of a context; each forward of the model inside it has ghost groups of its own samples."""

    def __init__(
        self,
        name: str,
        model: nn.Module,
        layers: dict[str, Any],
        point: PerturbationTree,
        groups: int,
        rows: Rows | None,
        clean: float,  # share of clean groups: 1 in a proxy pass, which has one group, and 0 in an adversarial one
        dtype: torch.dtype,
    ) -> None:
        self.name, self.layers, self.mixes = name, layers, 0 < clean < 1
        self.record = Record(int(clean), copy_into_buffer, dtype)
        self.modes = dict.fromkeys(layers, False)  # whether each layer was in training mode when the context ended
        self.has_graph = False  # whether a layer was called in a way that can be differentiated
        self.versions = versions(model)
        self._model, self._point, self._groups, self._rows, self._clean = model, point, groups, rows, clean
        self._task, self._depth, self._was_called = backward_task(), 0, False
        self._forwards: list[PerturbedLayers] = []
        self._waiting: set[str] = set()  # checkpointed layers that have not run again

    @contextmanager
    def hooked(self) -> Iterator[None]:
        """See, while open, the input of the model, or of a part of it that is called by itself."""
        with ExitStack() as stack:
            for place, module in enumerate((self._model, *self._model.children())):
                begin = _Hook(self._begin_part if place else self._begin)
                stack.enter_context(module.register_forward_pre_hook(begin, with_kwargs=True))
                # Without always_call, whose hooks Dynamo guards by their ids: it would compile in every context.
                stack.enter_context(module.register_forward_hook(_Hook(self._end)))
            yield

    def _begin(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        """Begin a forward of the model."""
        if backward_task() == self._task:
            self._depth = 0  # one that failed has not ended
        self._begin_part(module, args, kwargs)

    def _begin_part(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        """Begin a forward of as many samples as its input says."""
        self._depth += 1
        if self._depth == 1 and backward_task() == self._task:
            lengths = {leaf.size(0) for leaf in tensors_of((args, kwargs)) if leaf.dim()}
            self._start(lengths.pop() if len(lengths) == 1 else None)

    def _end(self, module: nn.Module, args: Any, output: Any) -> None:
        """End a forward."""
        self._depth -= 1
        if self._depth == 0 and self._forwards:
            self._forwards[-1].check_rows()

    def _start(self, samples: int | None) -> None:
        """Make the handler of a forward of some samples."""
        groups, point = max(self._groups, 1), self._point
        if samples is not None and (self._groups == -1 or any(layer.training for layer in self.layers.values())):
            groups = number_of_groups(self._groups, samples)
        if self.mixes and not (samples is None and self._groups == -1):  # which a layer refuses
            self.record.clean = clean_groups(self._clean, groups)
            point = in_groups(point, self.record.clean, groups)
        self._forwards.append(PerturbedLayers(point, Grouping(groups, samples, self._rows), self.record, self._task))

    def normalize(self, call: BatchNormCall) -> Tensor:
        """See `Handler`."""
        again = backward_task() != self._task  # a checkpointed layer in its backward
        if not self._forwards or (self._depth == 0 and not again):
            self._start(len(call.x))  # nobody called the model: its layer sees samples
        forward = self._forwards[-1]
        says_how = callable(self._rows) and self._groups != -1
        if forward.grouping.samples is None and self._groups not in (0, 1) and not says_how:
            raise BatchError(
                f"layer {call.name!r} is in ghost groups of samples, and the model's input does not say how many "
                "samples it has: it holds no tensor, or tensors of unlike lengths on dim 0. Pass tensors with an entry "
                "a sample, say rows=function, with (layer, input) -> sample of every row, or use groups=1."
            )
        if again:  # it ends in the middle of the last layer, once all is there that its segment saved
            self._waiting.discard(call.name)
            forward = next((f for f in self._forwards[::-1] if f.grouping.samples == len(call.x)), forward)
        y = forward.normalize(call)
        self._was_called = True
        self.has_graph |= y.requires_grad
        if not again and is_checkpointed() and y.requires_grad:
            self._waiting.add(call.name)
        return y

    def check_end(self) -> None:
        """Raise an ApartError if all layers were in evaluation mode, or if checkpointed layers still wait."""
        self.modes = {name: layer.training for name, layer in self.layers.items()}
        if self._forwards and not self._was_called and not any(self.modes.values()):
            raise no_training_layer(type(self._model).__name__, len(self.layers))
        if self._waiting:
            raise UsageError(
                f"{self.name} was left before backward(), and out here that would run the checkpointed layers "
                f"{sorted(self._waiting)} again as plain batch norm. Call backward() inside the context."
            )

    def skipped_all(self) -> bool:
        """Return whether the model has run without calling a layer, as with stochastic depth."""
        return bool(self._forwards) and not self._was_called

    def has_gradients(self) -> bool:
        """Return whether backward() has left statistic gradients."""
        return any(leaf.grad is not None for leaf in leaves(self._point))

    def stat_grads(self) -> StatGradTree:
        """Return the statistic gradients that backward() has left, zero for layers that it did not reach."""
        return {
            name: StatGrads(*(torch.zeros_like(leaf) if leaf.grad is None else leaf.grad.detach() for leaf in shift))
            for name, shift in self._point.items()
        }


class _Hook:
    """A hook of a context. A copy of the model is in no context, and its hook does nothing."""

    def __init__(self, function: Callable[..., None] | None = None) -> None:
        self.function = function

    def __call__(self, *arguments: Any) -> None:
        if self.function is not None:
            self.function(*arguments)

    def __reduce__(self) -> tuple[Any, ...]:
        return _Hook, ()


def versions(model: nn.Module) -> list[tuple[int, int]]:
    """Return which gradients the parameters have: a backward() changes some, by another tensor or in place."""
    return [(id(p.grad), p.grad._version) for p in model.parameters() if p.grad is not None]


def are_zero(grads: Iterable[Tensor]) -> bool:
    """Return whether gradients are seen to be zero, without waiting for a device."""
    return all(grad.device.type == "cpu" and not bool(dense_values(grad).any()) for grad in grads)


@contextmanager
def lent_state(model: nn.Module) -> Iterator[None]:
    """Let modules work on copies of their buffers and frozen parameters while open, and put the originals back.

    Statistics of stock layers stay: no pass moves them, and what DistributedDataParallel sends to ranks is for them.
    """
    stock = {id(layer) for layer in batch_norm_layers(model).values() if is_stock(layer)}
    originals: list[tuple[dict[str, Any], str, Tensor]] = [
        (register, key, tensor)
        for module in model.modules()
        for register in (module._parameters, *(() if id(module) in stock else (module._buffers,)))
        for key, tensor in register.items()
        if tensor is not None and not (tensor.requires_grad and tensor.is_leaf)
    ]
    copies: dict[int, Any] = {id(tensor): tensor.clone() for _, _, tensor in originals}
    for register, key, tensor in originals:
        register[key] = copies[id(tensor)]
    try:
        yield
    finally:
        for register, key, tensor in originals:
            register[key] = tensor
