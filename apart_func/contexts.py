"""A context of the drop-in: the handler of what runs inside it. Hooks on the model see how many samples there are."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from apart_func._torch import backward_task, is_checkpointed
from apart_func.checks import clean_groups
from apart_func.errors import BatchError, UsageError
from apart_func.groups import Grouping, Rows, number_of_groups
from apart_func.intercept import BatchNormCall, is_stock, no_training_layer
from apart_func.layers import PerturbedLayers, Record, in_groups
from apart_func.running import copy_into_buffer
from apart_func.trees import PerturbationTree, StatGrads, StatGradTree, dense_values, leaves, tensors_of


@dataclass(eq=False)
class Context:
    """The handler of a context; each forward of the model inside it has ghost groups of its own samples."""

    name: str
    model: nn.Module
    layers: dict[str, Any]
    point: PerturbationTree
    groups: int
    rows: Rows | None
    clean: float  # share of clean groups: 1 in a proxy pass, which has one group, and 0 in an adversarial one

    def __post_init__(self) -> None:
        self.mixes = 0 < self.clean < 1
        self.record = Record(int(self.clean), copy_into_buffer, leaves(self.point)[0].dtype)
        self.modes = dict.fromkeys(self.layers, False)  # whether each layer was in training mode when the context ended
        self.has_graph = False  # whether a layer was called in a way that can be differentiated
        self.versions = gradient_versions(self.model)
        self._task, self._depth, self._was_called = backward_task(), 0, False
        self._forwards: list[PerturbedLayers] = []
        self._waiting: set[str] = set()  # checkpointed layers that have not run again

    @contextmanager
    def watching(self) -> Iterator[None]:
        """See, while open, the input of the model, or of a part of it that is called by itself.

        At the end raise an ApartError if all layers were in evaluation mode, or if checkpointed layers still wait.
        """
        with ExitStack() as stack:
            for module in (self.model, *self.model.children()):
                begin = _Hook(partial(self._begin, module is self.model))
                stack.enter_context(module.register_forward_pre_hook(begin, with_kwargs=True))
                # Without always_call, whose hooks Dynamo guards by their ids: it would compile in every context.
                stack.enter_context(module.register_forward_hook(_Hook(self._end)))
            yield
        self.modes = {name: layer.training for name, layer in self.layers.items()}
        if self._forwards and not self._was_called and not any(self.modes.values()):
            raise no_training_layer(type(self.model).__name__, len(self.layers))
        if self._waiting:
            raise UsageError(
                f"{self.name} was left before backward(), and out here that would run the checkpointed layers "
                f"{sorted(self._waiting)} again as plain batch norm. Call backward() inside the context."
            )

    def _begin(self, is_model: bool, module: nn.Module, args: Any, kwargs: Any) -> None:
        """Begin a forward of the model or of a part, of as many samples as the input of the outermost one says."""
        is_again = backward_task() != self._task  # a checkpointed part in its backward
        if is_model and not is_again:
            self._depth = 0  # a forward that failed has not ended
        self._depth += 1
        if self._depth == 1 and not is_again:
            lengths = {leaf.size(0) for leaf in tensors_of((args, kwargs)) if leaf.dim()}
            self._start(lengths.pop() if len(lengths) == 1 else None)

    def _end(self, module: nn.Module, args: Any, output: Any) -> None:
        self._depth -= 1
        if self._depth == 0 and self._forwards:
            self._forwards[-1].check_rows()

    def _start(self, samples: int | None) -> None:
        """Make the handler of a forward of some samples."""
        groups, point = max(self.groups, 1), self.point
        if samples is not None and (self.groups == -1 or any(layer.training for layer in self.layers.values())):
            groups = number_of_groups(self.groups, samples)
        if self.mixes and not (samples is None and self.groups == -1):  # which a layer refuses
            self.record.clean = clean_groups(self.clean, groups)
            point = in_groups(point, self.record.clean, groups)
        self._forwards.append(PerturbedLayers(point, Grouping(groups, samples, self.rows), self.record, self._task))

    def normalize(self, call: BatchNormCall) -> Tensor:
        """See `Handler`."""
        is_again = backward_task() != self._task
        if not self._forwards or (self._depth == 0 and not is_again):
            self._start(len(call.x))  # nobody called the model: its layer sees samples
        forward = self._forwards[-1]
        if forward.grouping.samples is None and (self.groups == -1 or (self.groups > 1 and not callable(self.rows))):
            raise BatchError(
                f"layer {call.name!r} is in ghost groups, and the model's input does not say how many samples it has: "
                "no tensor, or tensors of unlike lengths on dim 0. Pass tensors with an entry a sample, say "
                "rows=function, with (layer, input) -> sample of every row, or use groups=1."
            )
        if is_again:  # it ends in the middle of the last layer, once all is there that its segment saved
            self._waiting.discard(call.name)
            forward = next((f for f in self._forwards[::-1] if f.grouping.samples == len(call.x)), forward)
        y = forward.normalize(call)
        self._was_called = True
        self.has_graph |= y.requires_grad
        if not is_again and is_checkpointed() and y.requires_grad:
            self._waiting.add(call.name)
        return y

    def skipped_all(self) -> bool:
        """Return whether the model has run without calling a layer, as with stochastic depth."""
        return bool(self._forwards) and not self._was_called

    def has_gradients(self) -> bool:
        """Return whether backward() has left statistic gradients."""
        return any(leaf.grad is not None for leaf in leaves(self.point))

    def stat_grads(self) -> StatGradTree:
        """Return the statistic gradients that backward() has left, zero for layers that it did not reach."""
        return {
            name: StatGrads(*(torch.zeros_like(leaf) if leaf.grad is None else leaf.grad.detach() for leaf in shift))
            for name, shift in self.point.items()
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


def gradient_versions(model: nn.Module) -> list[tuple[int, int]]:
    """Return which gradients the parameters have: a backward() changes some, by another tensor or in place."""
    return [(id(p.grad), p.grad._version) for p in model.parameters() if p.grad is not None]


def are_zero(grads: Iterable[Tensor]) -> bool:
    """Return whether gradients are seen to be zero, without waiting for a device."""
    return all(grad.device.type == "cpu" and not bool(dense_values(grad).any()) for grad in grads)


def lent_state(model: nn.Module) -> AbstractContextManager[None]:
    """Let modules work on copies of their buffers and frozen parameters while open, and put the originals back.

    Statistics of stock layers stay: no pass moves them, and what DistributedDataParallel sends to ranks is for them.
    """
    modules: list[Any] = list(model.modules())
    registers = [module._parameters for module in modules]
    registers += [module._buffers for module in modules if not is_stock(module)]
    tensors = [(r, key, t) for r in registers for key, t in r.items() if t is not None]
    lent = [(r, key, t) for r, key, t in tensors if not (t.requires_grad and t.is_leaf)]
    copies = {id(tensor): tensor.clone() for *_, tensor in lent}
    return replaced([(register, key, copies[id(tensor)]) for register, key, tensor in lent])


@contextmanager
def replaced(items: Sequence[tuple[dict[str, Any], str, Any]]) -> Iterator[None]:
    """Put values, each as (dict, key, value), into dicts while open."""
    before = [{key: place[key]} if key in place else {} for place, key, _ in items]
    for place, key, value in items:
        place[key] = value
    try:
        yield
    finally:
        for (place, key, _), kept in zip(items, before, strict=True):
            place.update(kept) if kept else place.pop(key)
