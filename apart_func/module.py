"""APART for a loop built on `loss.backward()`: one context around each of the two passes.

    apart = APART(model, epsilon=0.1, groups=16)
    with apart.to_proxy():                                       # plain training, and ∂L_p/∂δ on the way
        (r * criterion(model(x), y)).backward()
    with apart.to_adver():                                       # δ = ε · sign(∂L_p/∂δ), statistics pushed by δ
        ((1 - r) * criterion(model(x[:N]), y[:N])).backward()

Inside a context the model's BN layers hand their input to the layer of `batch_norm.py`, by the interception of
`intercept.py`: both are those of the functional step. Outside, the model is as the user made it.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from apart_func.autodiff import is_checkpointed, is_recomputing
from apart_func.batch_norm import Call, check_input, number_of_groups, perturbed_batch_norm
from apart_func.distributed import data_parallel_group, mean_over_ranks
from apart_func.errors import UsageError
from apart_func.functional import layer_specs
from apart_func.intercept import Handler, Route, is_stock, training_layers
from apart_func.passes import Calls, advanced, check_perturbation, statistics, statistics_like, zero_shifts
from apart_func.perturbation import IterativeRule, Rule, check_epsilon, sign_perturbation
from apart_func.pytrees import BatchStats, PerturbationTree, StatTree, Tensors, constant

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
        stats: batch statistics of the last proxy pass, by layer.
        stat_grads: their gradients, averaged over ranks; there once an adversarial pass has begun.
        perturbation: δ of that adversarial pass.

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
        if isinstance(rule, IterativeRule):  # the passes are the user's
            raise rule.refusal()
        self.model, self.groups, self.rule, self.process_group = model, groups, rule, process_group
        self.set_epsilon(epsilon)
        self.stats: StatTree = {}
        self.stat_grads: StatTree = {}
        self.perturbation: PerturbationTree = {}
        self._proxy: _Proxy | None = None
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
        self._proxy, self.stats, self.stat_grads, self.perturbation = None, {}, {}, {}
        handler = _ProxyLayers(shifts)
        # Layers with a forward of their own count the batch by themselves, and `advanced` does it for all.
        counters = [(layer, "num_batches_tracked") for layer in layers.values() if not is_stock(layer)]
        with self._opened("to_proxy()", layers, handler), _lent(counters):
            yield
        self._proxy = _Proxy(layers, shifts)
        self.stats = statistics(handler.calls)
        with torch.no_grad():
            for name, value in advanced(specs, tensors, handler.calls).items():
                tensors[name].copy_(value)

    @contextmanager
    def to_adver(self) -> Iterator[None]:
        """Make the passes inside adversarial passes: the statistics are perturbed, in ghost groups.

        No buffer of the model moves.
        """
        layers = self._enter("to_adver()")
        stat_grads = _stat_grads(self._proxy, layers)
        group = self.process_group or data_parallel_group(self.model)
        self.stat_grads = stat_grads if group is None else mean_over_ranks(stat_grads, group)
        self.perturbation = self._perturbation()
        check_perturbation(layer_specs(layers), self.perturbation, max(self.groups, 1))
        stock = {layer for layer in layers.values() if is_stock(layer)}
        buffers = [(module, key) for module in self.model.modules() if module not in stock for key in module._buffers]
        handler = _AdversarialLayers(self.perturbation, self.groups)
        with self._opened("to_adver()", layers, handler), _lent(buffers):
            yield
        self._proxy = None

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


class _ProxyLayers:
    """Batch norm that is differentiated by δ at zero, and written down."""

    def __init__(self, shifts: PerturbationTree) -> None:
        self.shifts = shifts
        self.calls: Calls = {}

    def __call__(self, name: str, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
        shift = self.shifts[name]
        check_input(name, x, shift.mean.shape[0])
        y, stats = perturbed_batch_norm(x, weight, bias, eps, shift)
        if not is_recomputing():
            # Detached: else a compiled backward would also differentiate the statistics, by nothing.
            stats = BatchStats(*(part.detach().to(shift.mean.dtype) for part in stats))
            self.calls.setdefault(name, []).append(Call(stats, x.numel() // x.shape[1], eps, None))
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
    if all(part.grad is None for shift in proxy.shifts.values() for part in shift):
        raise UsageError(
            "to_adver() was entered with no backward() since the proxy pass, so there are no statistic gradients. Call "
            "backward() on the loss that was computed under to_proxy(), in the context or after it."
        )
    return {
        layer: BatchStats(*(torch.zeros_like(part) if part.grad is None else part.grad.detach() for part in shift))
        for layer, shift in proxy.shifts.items()
    }


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
