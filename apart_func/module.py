"""APART for a loop built on `loss.backward()`: a context around each pass.

    apart = APART(model, epsilon=0.1, groups=16)
    with apart.to_proxy():                                       # plain training, and ∂L_p/∂δ on the way
        (r * criterion(model(x), y)).backward()
    with apart.to_adver():                                       # δ = ε · sign(∂L_p/∂δ), statistics pushed by δ
        ((1 - r) * criterion(model(x[:N]), y[:N])).backward()

or both in one, of which half the ghost groups are clean, and half at the δ that the step before found:

    with apart.one_pass():
        criterion(model(x), y).backward()

Inside a context the model's BN layers hand their input to the layer of `batch_norm.py`, by the interception of
`intercept.py`: both are those of the functional step. Outside, the model is as the user made it.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from apart_func.autodiff import is_checkpointed, is_recomputing
from apart_func.batch_norm import Call, check_input, number_of_groups, perturbed_batch_norm
from apart_func.distributed import data_parallel_group, mean_over_ranks
from apart_func.errors import UsageError
from apart_func.functional import LayerSpec, layer_specs
from apart_func.intercept import Handler, Route, is_stock, training_layers
from apart_func.one_pass import clean_groups, clean_stat_grads
from apart_func.passes import (
    Calls,
    advanced,
    check_perturbation,
    in_groups,
    pooled_calls,
    statistics,
    statistics_like,
    zero_shifts,
)
from apart_func.perturbation import IterativeRule, Rule, check_epsilon, sign_perturbation
from apart_func.pytrees import BatchStats, Perturbation, PerturbationTree, StatTree, Tensors, constant, vectors
from apart_func.step import all_finite

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

Layers = dict[str, _BatchNorm]


class APART:
    """The drop-in form of the method: `to_proxy()` and `to_adver()` around the two passes of a training step.

    `backward()` may be called inside a context or after it; with activation checkpointing (`use_reentrant=False`)
    inside. Where gradients are accumulated over micro-batches, each of them goes through both contexts in turn.

    Args:
        model: any module with BN layers. They are found when a context is entered: those in training mode then. A
            compiled model is one graph for each pass; compile it with `dynamic=False` if the adversarial pass gets
            fewer samples.
        epsilon: perturbation radius ε ≥ 0, as a fraction of the statistic.
        groups: ghost groups of the adversarial pass; sample i is in group i mod `groups`. 0 and 1 make one group of
            the whole batch, -1 makes a group of every row that a layer sees.
        rule: makes the perturbation from statistics and their gradients. It gets the gradients of the loss that
            `backward()` was called on, with whatever weight and scale it had; `sign_perturbation` does not care.
        process_group: ranks to average the statistic gradients over. None takes those of the
            `DistributedDataParallel` that `model` is or holds, so pass the wrapped model, not the one inside it.

    Attributes:
        epsilon: the radius; see `set_epsilon`.
        groups: the ghost groups.
        stats: batch statistics of the last proxy pass, or of the clean samples of the last `one_pass()`, by layer.
        stat_grads: their gradients, averaged over ranks; there once the perturbation is made from them.
        perturbation: δ of the last adversarial pass, or of the last `one_pass()`.

    Raises:
        ApartError: a setting is out of range; entering a context also where the model has no BN layer in training mode,
            or where the order of contexts and `backward()` is wrong.
    """

    def __init__(
        self,
        model: nn.Module,
        epsilon: float | Tensor = 0.1,
        groups: int = 0,
        *,
        rule: Rule = sign_perturbation,
        process_group: "ProcessGroup | None" = None,
    ) -> None:
        number_of_groups(min(groups, 1), 1)
        if isinstance(rule, IterativeRule):
            raise rule.refusal()
        self.model, self.groups, self.rule, self.process_group = model, groups, rule, process_group
        self.set_epsilon(epsilon)
        self.stats: StatTree = {}
        self.stat_grads: StatTree = {}
        self.perturbation: PerturbationTree = {}
        self._proxy: _Proxy | None = None
        self._mixed: _Mixed | None = None
        self._inside: str | None = None

    def set_epsilon(self, epsilon: float | Tensor) -> None:
        """Change the perturbation radius, from the next adversarial pass on.

        Args:
            epsilon: a number or 0-d tensor ≥ 0.

        Raises:
            SettingError: it is negative or not finite.
        """
        check_epsilon(epsilon)
        self.epsilon = epsilon

    @contextmanager
    def to_proxy(self) -> Iterator[None]:
        """Make the passes inside proxy passes: plain training, which also yields the statistic gradients.

        Running statistics move when the context is left, by every batch that went through it.
        """
        layers = self._enter("to_proxy()")
        specs, tensors = layer_specs(layers), _tensors(self.model)
        shifts = zero_shifts(specs, statistics_like(tensors))
        for shift in shifts.values():
            shift.mean.requires_grad_()
            shift.var.requires_grad_()
        self._proxy, self._mixed, self.stats, self.stat_grads, self.perturbation = None, None, {}, {}, {}
        handler = _RecordedLayers(shifts)
        with self._opened("to_proxy()", layers, handler), _lent(_counters(layers)):
            yield
        self._proxy = _Proxy(layers, shifts)
        self._advance(specs, tensors, handler.calls)

    @contextmanager
    def to_adver(self) -> Iterator[None]:
        """Make the passes inside adversarial passes: the statistics are perturbed, in ghost groups.

        No buffer of the model moves.
        """
        layers = self._enter("to_adver()")
        self.stat_grads = self._reduced(_stat_grads(self._proxy, layers))
        self.perturbation = self._perturbation()
        check_perturbation(layer_specs(layers), self.perturbation, max(self.groups, 1))
        stock = {layer for layer in layers.values() if is_stock(layer)}
        buffers = [(module, key) for module in self.model.modules() if module not in stock for key in module._buffers]
        handler = _AdversarialLayers(self.perturbation, self.groups)
        with self._opened("to_adver()", layers, handler), _lent(buffers):
            yield
        self._proxy = None

    @contextmanager
    def one_pass(self, clean_fraction: float = 0.5) -> Iterator[None]:
        """Make the passes inside clean for some ghost groups, and adversarial for the others.

        The perturbation is the one that the context before has found, by its clean groups; none in the first one. It is
        kept where their gradients are not finite (as after an overflow of float16) or there are none. Running
        statistics move when the context is left, by the clean samples.

        Args:
            clean_fraction: share of the groups that are clean, rounded to whole groups: at least one, less than all.
        """
        clean = clean_groups(clean_fraction, self.groups)
        layers = self._enter("one_pass()")
        specs, tensors = layer_specs(layers), _tensors(self.model)
        self._find_perturbation()
        shifts = zero_shifts(specs, statistics_like(tensors)) | {
            layer: shift for layer, shift in self.perturbation.items() if layer in specs
        }
        check_perturbation(specs, shifts, 1)
        self.perturbation, self._proxy, self._mixed = shifts, None, None
        leaves = in_groups(shifts, self.groups, clean, statistics_like(tensors))
        for leaf in leaves.values():
            leaf.mean.requires_grad_()
            leaf.var.requires_grad_()
        handler = _RecordedLayers(leaves, self.groups)
        with self._opened("one_pass()", layers, handler), _lent(_counters(layers)):
            yield
        self._mixed = _Mixed(leaves, clean)
        self._advance(specs, tensors, pooled_calls(handler.calls, clean))

    def state_dict(self) -> dict[str, Any]:
        """What the next `one_pass()` depends on, for a checkpoint: its perturbation."""
        self._find_perturbation()
        return {"perturbation": {layer: tuple(shift) for layer, shift in self.perturbation.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with what `state_dict` returned."""
        self._mixed = None
        self.perturbation = {layer: Perturbation(*shift) for layer, shift in state["perturbation"].items()}

    def _find_perturbation(self) -> None:
        """Make the perturbation from the gradients that backward() left in the shifts of a `one_pass()`."""
        mixed, self._mixed = self._mixed, None
        if mixed is None or _have_no_gradient(mixed.shifts):
            return
        found = self._reduced(clean_stat_grads(_gradients(mixed.shifts), mixed.clean))
        if all_finite(vectors(found)):
            self.stat_grads = found
            self.perturbation = self._perturbation()

    def _advance(self, specs: dict[str, LayerSpec], tensors: Tensors, calls: Calls) -> None:
        """Move the running statistics by every batch that went through a context."""
        self.stats = statistics(calls)
        with torch.no_grad():
            for name, value in advanced(specs, tensors, calls).items():
                tensors[name].copy_(value)

    def _reduced(self, stat_grads: StatTree) -> StatTree:
        """Statistic gradients of all ranks."""
        group = self.process_group or data_parallel_group(self.model)
        return stat_grads if group is None else mean_over_ranks(stat_grads, group)

    def _enter(self, context: str) -> Layers:
        """Find the layers for a context, after a look at what surrounds it."""
        if self._inside:
            raise UsageError(f"{context} was entered inside {self._inside}. Leave one context before the next begins.")
        if torch.is_inference_mode_enabled():
            raise UsageError(f"{context} was entered in inference_mode, where no gradient exists. Leave that mode.")
        return training_layers(self.model)

    @contextmanager
    def _opened(self, context: str, layers: Layers, handler: Handler) -> Iterator[None]:
        """Lead the layers to a handler while open."""
        watch = _CheckpointWatch(handler)
        self._inside = context
        try:
            with Route(layers).opened(watch):
                yield
        finally:
            self._inside = None
        if watch.waiting:
            raise UsageError(
                f"{context} was left before backward(), and out here that would run the checkpointed layers "
                f"{sorted(watch.waiting)} again as plain batch norm. Call backward() inside the context."
            )

    def _perturbation(self) -> PerturbationTree:
        like = next(iter(self.stat_grads.values())).mean
        radius = torch.as_tensor(self.epsilon, dtype=like.dtype, device=like.device)
        return constant(self.rule(self.stats, self.stat_grads, radius))


class _Proxy(NamedTuple):
    """What a proxy pass leaves for the adversarial pass: its layers, and the leaves that backward() gives gradients."""

    layers: Layers
    shifts: PerturbationTree


class _Mixed(NamedTuple):
    """What a `one_pass()` leaves for the next: the leaves that backward() gives gradients, and its clean groups."""

    shifts: PerturbationTree
    clean: int


class _RecordedLayers:
    """Batch norm that is differentiated by δ, and written down."""

    def __init__(self, shifts: PerturbationTree, groups: int = 1) -> None:
        self.shifts, self.groups = shifts, groups
        self.calls: Calls = {}

    def __call__(self, name: str, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
        shift = self.shifts[name]
        check_input(name, x, shift.mean.shape[-1], self.groups)
        y, stats = perturbed_batch_norm(x, weight, bias, eps, shift, groups=self.groups)
        if not is_recomputing():
            # Detached: else a compiled backward would also differentiate the statistics, by nothing.
            stats = BatchStats(*(part.detach().to(shift.mean.dtype) for part in stats))
            self.calls.setdefault(name, []).append(Call(stats, x.numel() // (x.shape[1] * self.groups), eps, None))
        return y


class _AdversarialLayers:
    """Batch norm with perturbed statistics, in ghost groups."""

    def __init__(self, perturbation: PerturbationTree, groups: int) -> None:
        self.perturbation, self.groups = perturbation, groups

    def __call__(self, name: str, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
        shift = self.perturbation[name]
        groups = x.shape[0] if self.groups == -1 else max(self.groups, 1)
        check_input(name, x, shift.mean.shape[-1], groups)
        return perturbed_batch_norm(x, weight, bias, eps, shift, groups=groups)[0]


class _CheckpointWatch:
    """Passes calls on, and notes the checkpointed layers that have not been run again yet."""

    def __init__(self, handler: Handler) -> None:
        self.handler = handler
        self.waiting: set[str] = set()

    def __call__(self, name: str, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
        y = self.handler(name, x, weight, bias, eps)
        if is_recomputing():
            self.waiting.discard(name)
        elif is_checkpointed() and y.requires_grad:
            self.waiting.add(name)
        return y


def _stat_grads(proxy: _Proxy | None, layers: Layers) -> StatTree:
    """The gradients that backward() left in the shifts of the proxy pass; zero for layers that it did not reach."""
    if proxy is None:
        raise UsageError(
            "to_adver() was entered with no proxy pass since the last adversarial one, and its perturbation comes from "
            "there. Run the model, and backward(), under `with apart.to_proxy():` first."
        )
    if layers != proxy.layers:
        changed = sorted(name for name in {*layers, *proxy.layers} if layers.get(name) is not proxy.layers.get(name))
        raise UsageError(
            f"the BN layers in training mode are not those of the proxy pass: {changed} came, went, or were replaced. "
            "Leave the model's structure and modes alone between to_proxy() and to_adver()."
        )
    if _have_no_gradient(proxy.shifts):
        raise UsageError(
            "to_adver() was entered with no backward() since the proxy pass, so there are no statistic gradients. Call "
            "backward() on the loss that was computed under to_proxy(), in the context or after it."
        )
    return _gradients(proxy.shifts)


def _have_no_gradient(shifts: PerturbationTree) -> bool:
    return all(part.grad is None for shift in shifts.values() for part in shift)


def _gradients(shifts: PerturbationTree) -> StatTree:
    return {
        layer: BatchStats(*(torch.zeros_like(part) if part.grad is None else part.grad.detach() for part in shift))
        for layer, shift in shifts.items()
    }


def _counters(layers: Layers) -> list[tuple[nn.Module, str]]:
    """Where layers with a forward of their own count the batch; `advanced` does it for all."""
    return [(layer, "num_batches_tracked") for layer in layers.values() if not is_stock(layer)]


def _tensors(model: nn.Module) -> Tensors:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


@contextmanager
def _lent(buffers: Iterable[tuple[nn.Module, str]]) -> Iterator[None]:
    """Let modules work on copies of their buffers while open, and put the originals back."""
    originals = [(module._buffers, key, module._buffers[key]) for module, key in buffers]
    copies = {id(tensor): tensor.clone() for _, _, tensor in originals if tensor is not None}
    for register, key, tensor in originals:
        register[key] = copies.get(id(tensor))
    try:
        yield
    finally:
        for register, key, tensor in originals:
            register[key] = tensor
