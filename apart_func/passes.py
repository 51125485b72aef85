"""The two passes of the method: functions from parameters, buffers and a batch to losses and gradients.

    proxy_pass        plain training at δ = 0    →  ∇L_p, the statistics, and g = ∂L_p/∂δ
    adversarial_pass  statistics pushed by δ     →  ∇L_a
    mixed_pass        some ghost groups at 0, the others at δ: both in one forward and backward
    gradients_at      the proxy loss at any δ    →  ∂L_p/∂δ there, for rules that look further than the first gradient

A pass gives every BN layer of the functional model something else to do, and differentiates what comes out.
"""

from __future__ import annotations  # Dynamo would trace the annotations of the functions below

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from apart_func.autodiff import (
    Opened,
    gradient_eager,
    gradient_traced,
    is_compiling,
    is_mapped,
    is_recomputing,
    is_traced,
)
from apart_func.batch_norm import (
    Call,
    RunningStats,
    Taps,
    advance_running_stats,
    check_input,
    clean_batch_norm,
    number_of_groups,
    over_layers,
    perturbed_batch_norm,
    pooled,
    statistic_gradients,
)
from apart_func.errors import BatchError, SettingError, UsageError
from apart_func.functional import FunctionalModel, LayerSpec
from apart_func.pytrees import (
    AdversarialOutput,
    BatchStats,
    MixedOutput,
    Perturbation,
    PerturbationTree,
    ProxyOutput,
    StatTree,
    Tensors,
    batch_size,
    cut_groups,
    detached,
    stack_trees,
    tree_leaves,
)

LossFunction = Callable[[Any, Any], Tensor]


class Precision(NamedTuple):
    """How a pass computes.

    Attributes:
        autocast: dtype of an autocast region around the forward; None opens none.
        loss_scale: 0-d factor on the loss during the backward, divided out of all gradients; None is 1.
    """

    autocast: torch.dtype | None = None
    loss_scale: Tensor | None = None


FULL_PRECISION = Precision()


def proxy_pass(
    fmodel: FunctionalModel,
    loss_fn: LossFunction,
    params: Tensors,
    buffers: Tensors,
    batch: tuple[Any, Any],
    *,
    precision: Precision = FULL_PRECISION,
) -> ProxyOutput:
    """Run plain training's forward and backward, and differentiate by the batch statistics as well.

    Args:
        fmodel: the model, from `functionalize`.
        loss_fn: `(output, target) -> scalar`.
        params: trained tensors by name.
        buffers: all other tensors by name.
        batch: `(input, target)`, pytrees. A tuple input is splatted into the model, a dict passed as keywords.
        precision: mixed-precision settings.

    Returns:
        Loss, output, gradients, new buffers, batch statistics, and their gradients.

    Raises:
        ApartError: the state or batch does not fit the model, or a layer cannot be perturbed.
    """
    tensors = _checked_state(fmodel, params, buffers)
    batch = _laid_out(batch, tensors)
    like = statistics_like(tensors)
    record = _Record(fmodel.layers, like)

    @contextmanager
    def run(trained: Tensors, shifts: PerturbationTree | None = None) -> Iterator[Opened]:
        record.shifts = shifts
        with fmodel.opened({**tensors, **trained}, record) as (module, copy):
            loss, output = _forward(module, _checked(loss_fn), batch, precision)
            moved = _moved(fmodel, tensors, buffers, copy.own_buffers(), record.calls)
            results = (_outcome(loss), _outcome(output), moved, statistics(record.calls))
            yield Opened(_scaled(loss, precision), results, record.taps())

    if is_traced():
        shifts = zero_shifts(fmodel.layers, like)
        (grads, shift_grads), (loss, output, buffers, stats), _ = gradient_traced(run, params, shifts)
        stat_grads = {layer: BatchStats(*g) for layer, g in shift_grads.items()}
    else:
        (grads,), (loss, output, buffers, stats), tap_grads = gradient_eager(run, params)
        stat_grads = record.statistic_gradients(tap_grads)
    if precision.loss_scale is not None:
        grads, stat_grads = _unscaled(grads, precision.loss_scale), _unscaled_stats(stat_grads, precision.loss_scale)
    return ProxyOutput(loss, output, grads, buffers, stats, stat_grads)


def adversarial_pass(
    fmodel: FunctionalModel,
    loss_fn: LossFunction,
    params: Tensors,
    buffers: Tensors,
    batch: tuple[Any, Any],
    perturbation: PerturbationTree,
    *,
    groups: int = 0,
    precision: Precision = FULL_PRECISION,
) -> AdversarialOutput:
    """Run a forward and backward with perturbed statistics, in ghost groups. No buffer moves.

    Args:
        fmodel: the model, from `functionalize`.
        loss_fn: `(output, target) -> scalar`.
        params: trained tensors by name.
        buffers: all other tensors by name.
        batch: `(input, target)` with the N samples of this pass.
        perturbation: relative shifts of every BN layer, `(C,)`, or `(groups, C)` for one in each group. A constant:
            nothing is differentiated by it.
        groups: number of ghost groups; sample i is in group i mod `groups`. 0 and 1 make one group of the whole
            batch, -1 makes a group of every sample.
        precision: mixed-precision settings.

    Returns:
        Loss, output and gradients.

    Raises:
        ApartError: the state, batch or perturbation does not fit the model, or a layer cannot be perturbed.
    """
    tensors = _checked_state(fmodel, params, buffers)
    batch = _laid_out(batch, tensors)
    groups = number_of_groups(groups, batch_size(batch))
    check_perturbation(fmodel.layers, perturbation, groups)

    def layer(name: str, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
        check_input(name, x, fmodel.layers[name].channels, groups)
        return perturbed_batch_norm(x, weight, bias, eps, perturbation[name], groups=groups)[0]

    @contextmanager
    def run(trained: Tensors) -> Iterator[Opened]:
        with fmodel.opened({**tensors, **trained}, layer) as (module, _):
            loss, output = _forward(module, _checked(loss_fn), batch, precision)
            yield Opened(_scaled(loss, precision), (_outcome(loss), _outcome(output)))

    (grads,), (loss, output), _ = (gradient_traced if is_traced() else gradient_eager)(run, params)
    if precision.loss_scale is not None:
        grads = _unscaled(grads, precision.loss_scale)
    return AdversarialOutput(loss, output, grads)


def gradients_at(
    fmodel: FunctionalModel,
    loss_fn: LossFunction,
    params: Tensors,
    buffers: Tensors,
    batch: tuple[Any, Any],
    perturbation: PerturbationTree,
    *,
    precision: Precision = FULL_PRECISION,
) -> StatTree:
    """Differentiate the proxy loss by the perturbation, at a perturbation. No buffer moves.

    Costs less than another proxy pass: parameters have no gradient here.

    Args:
        fmodel: the model, from `functionalize`.
        loss_fn: `(output, target) -> scalar`.
        params: trained tensors by name.
        buffers: all other tensors by name, as the proxy pass got them.
        batch: `(input, target)`, which is one group.
        perturbation: relative shifts of every BN layer, `(C,)`.
        precision: mixed-precision settings.

    Returns:
        ∂L_p/∂δ of every BN layer in training mode, `(C,)` each.

    Raises:
        ApartError: the state, batch or perturbation does not fit the model, or a layer cannot be perturbed.
    """
    tensors = detached(_checked_state(fmodel, params, buffers))
    batch = _laid_out(batch, tensors)
    check_perturbation(fmodel.layers, perturbation, 1)

    @contextmanager
    def run(shifts: PerturbationTree) -> Iterator[Opened]:
        def layer(name: str, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
            check_input(name, x, fmodel.layers[name].channels)
            return perturbed_batch_norm(x, weight, bias, eps, shifts[name])[0]

        with fmodel.opened(tensors, layer) as (module, _):
            loss, _ = _forward(module, _checked(loss_fn), batch, precision)
            yield Opened(_scaled(loss, precision), ())

    (grads,), _, _ = (gradient_traced if is_traced() else gradient_eager)(run, perturbation)
    found = {layer: BatchStats(*grads[layer]) for layer in fmodel.layers}
    return found if precision.loss_scale is None else _unscaled_stats(found, precision.loss_scale)


def mixed_pass(
    fmodel: FunctionalModel,
    loss_fn: LossFunction,
    params: Tensors,
    buffers: Tensors,
    batch: tuple[Any, Any],
    perturbation: PerturbationTree,
    *,
    groups: int,
    clean: int,
    precision: Precision = FULL_PRECISION,
) -> MixedOutput:
    """Run a forward and backward in which some ghost groups are clean, and the others have perturbed statistics.

    Ghost groups share no statistics, so what the clean ones compute is a proxy pass, and the rest an adversarial one.
    Running statistics advance by those of the clean samples alone.

    Args:
        fmodel: the model, from `functionalize`.
        loss_fn: `(output, target) -> scalar`. It is called twice, with the clean samples and with the others, for
            which every tensor with a dimension in output and target has one entry a sample.
        params: trained tensors by name.
        buffers: all other tensors by name.
        batch: `(input, target)`.
        perturbation: relative shifts of every BN layer, `(C,)` each, for the groups that are not clean. A constant.
        groups: number of ghost groups G ≥ 2; sample i is in group i mod G.
        clean: how many of them are clean, the first ones; at least one, and less than all.
        precision: mixed-precision settings.

    Returns:
        Losses, output, gradients, new buffers, the clean statistics, and statistic gradients of every group.

    Raises:
        ApartError: the state, batch, output or perturbation does not fit, or a layer cannot be perturbed.
    """
    tensors = _checked_state(fmodel, params, buffers)
    batch = _laid_out(batch, tensors)
    samples = batch_size(batch)
    groups = number_of_groups(groups, samples)
    check_perturbation(fmodel.layers, perturbation, 1)
    like = statistics_like(tensors)
    record = _Record(fmodel.layers, like, groups)
    point = in_groups(perturbation, groups, clean, like)
    share = clean / groups

    def loss_of_both(output: Any, target: Any) -> tuple[Tensor, Tensor]:
        _check_output(output, samples)
        parts = [
            [cut_groups(tree, groups, *limits) for tree in (output, target)] for limits in ((0, clean), (clean, groups))
        ]
        clean_loss, perturbed_loss = (_checked(loss_fn)(*part) for part in parts)
        return clean_loss, perturbed_loss

    @contextmanager
    def run(trained: Tensors, shifts: PerturbationTree) -> Iterator[Opened]:
        record.shifts = shifts
        with fmodel.opened({**tensors, **trained}, record) as (module, copy):
            losses, output = _forward(module, loss_of_both, batch, precision)
            calls = pooled_calls(record.calls, clean)
            moved = _moved(fmodel, tensors, buffers, copy.own_buffers(), calls)
            results = (*map(_outcome, losses), _outcome(output), moved, statistics(calls))
            yield Opened(_scaled(torch.lerp(losses[1], losses[0], share), precision), results)

    gradient = gradient_traced if is_traced() else gradient_eager
    (grads, shift_grads), (loss, second, output, moved, stats), _ = gradient(run, params, point)
    stat_grads = {layer: BatchStats(*g) for layer, g in shift_grads.items()}
    if precision.loss_scale is not None:
        grads, stat_grads = _unscaled(grads, precision.loss_scale), _unscaled_stats(stat_grads, precision.loss_scale)
    return MixedOutput(loss, second, output, grads, moved, stats, stat_grads)


def statistics_like(tensors: Tensors) -> Tensor:
    """A 0-d zero with the device and dtype of this model's statistics: float64 in a float64 model, float32 else."""
    floating = [tensor for tensor in tensors.values() if tensor.is_floating_point()]
    wide = any(tensor.dtype == torch.float64 for tensor in floating)
    return torch.zeros((), dtype=torch.float64 if wide else torch.float32, device=floating[0].device)


def zero_shifts(layers: Mapping[str, LayerSpec], like: Tensor) -> PerturbationTree:
    """The point at which the proxy loss is differentiated."""
    return {
        name: Perturbation(like.new_zeros(layer.channels), like.new_zeros(layer.channels))
        for name, layer in layers.items()
    }


def in_groups(perturbation: PerturbationTree, groups: int, clean: int, like: Tensor) -> PerturbationTree:
    """A perturbation of each ghost group, `(G, C)`: none of the first `clean` ones, the given one of the others."""
    amount = (torch.arange(groups, device=like.device) >= clean).to(like.dtype).unsqueeze(1)

    def of_layer(mean: Tensor, var: Tensor) -> tuple[Tensor, ...]:
        return amount * mean, amount * var

    shifts = [(shift.mean.detach(), shift.var.detach()) for shift in perturbation.values()]
    spread = over_layers(of_layer, shifts, [()] * len(shifts))
    return {layer: Perturbation(*pair) for layer, pair in zip(perturbation, spread, strict=True)}


Calls = dict[str, list[Call]]


def pooled_calls(calls: Calls, clean: int) -> Calls:
    """Recorded calls of ghost groups as those of the first `clean` groups, taken together."""
    flat = [(layer, call) for layer, of_layer in calls.items() for call in of_layer]
    found: Calls = {layer: [] for layer in calls}
    for (layer, call), stats in zip(flat, pooled(_outcome([call.stats for _, call in flat]), clean), strict=True):
        found[layer].append(call._replace(stats=stats, size=call.size * clean))
    return found


def statistics(calls: Calls) -> StatTree:
    """Batch statistics of recorded calls, `(C,)`, or `(K, C)` for a layer called K times."""
    trees = {layer: [call.stats for call in of_layer] for layer, of_layer in calls.items()}
    return {layer: stats[0] if len(stats) == 1 else stack_trees(stats) for layer, stats in trees.items()}


def advanced(layers: Mapping[str, LayerSpec], tensors: Tensors, calls: Calls) -> Tensors:
    """The running statistics after every recorded call, in their order."""
    tracked = {name: of_layer for name, of_layer in calls.items() if layers[name].tracked}
    keys = {
        name: [f"{name}.{key}" for key in ("running_mean", "running_var", "num_batches_tracked")] for name in tracked
    }
    moved = {key: tensors[key] for of_layer in keys.values() for key in of_layer}
    for turn in range(max(map(len, tracked.values()), default=0)):
        of_turn = {name: of_layer[turn] for name, of_layer in tracked.items() if turn < len(of_layer)}
        after = advance_running_stats(
            [RunningStats(*(moved[key] for key in keys[name])) for name in of_turn],
            [call.stats for call in of_turn.values()],
            [call.size for call in of_turn.values()],
            [layers[name].momentum for name in of_turn],
        )
        for name, running in zip(of_turn, after, strict=True):
            moved.update(zip(keys[name], running, strict=True))
    return moved


class _Record:
    """The layer of the proxy pass: batch norm at δ = 0 that is written down, to be differentiated by δ.

    An eager pass taps each call's scale and shift, whose gradients BN's backward has at hand. A transform
    differentiates by arguments, so there the pass takes the zero shifts as one. In ghost groups every layer has shifts.
    """

    def __init__(self, layers: Mapping[str, LayerSpec], like: Tensor, groups: int = 1) -> None:
        self.layers, self.like, self.groups = layers, like, groups
        self.shifts: PerturbationTree | None = None
        self.calls: Calls = {}

    def __call__(self, name: str, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
        check_input(name, x, self.layers[name].channels, self.groups)
        taps = None
        if self.shifts is None:
            y, stats, taps = clean_batch_norm(x, weight, bias, eps)
        else:
            y, stats = perturbed_batch_norm(x, weight, bias, eps, self.shifts[name], groups=self.groups)
        if not is_recomputing():
            size = x.numel() // (x.shape[1] * self.groups)
            self.calls.setdefault(name, []).append(Call(self._cast(stats), size, eps, taps))
        return y

    def taps(self) -> list[Tensor]:
        return [tap for calls in self.calls.values() for call in calls for tap in call.taps or ()]

    def statistic_gradients(self, tap_grads: list[Tensor]) -> StatTree:
        """Sum over the calls of each layer, from gradients in the order of `taps`."""
        pairs = [Taps(*pair) for pair in zip(tap_grads[::2], tap_grads[1::2], strict=True)]
        recorded = [(layer, call) for layer, calls in self.calls.items() for call in calls]
        found: StatTree = {}
        for (layer, _), g in zip(recorded, statistic_gradients([call for _, call in recorded], pairs), strict=True):
            g = self._cast(g)
            found[layer] = BatchStats(found[layer].mean + g.mean, found[layer].var + g.var) if layer in found else g
        uncalled = {layer: spec for layer, spec in self.layers.items() if layer not in found}
        zeros = {layer: BatchStats(*zero) for layer, zero in zero_shifts(uncalled, self.like).items()}
        return {layer: found.get(layer) or zeros[layer] for layer in self.layers}

    def _cast(self, stats: BatchStats) -> BatchStats:
        return BatchStats(stats.mean.to(self.like.dtype), stats.var.to(self.like.dtype))


def _moved(fmodel: FunctionalModel, tensors: Tensors, buffers: Tensors, own: Tensors, calls: Calls) -> Tensors:
    """The buffers after a pass: what the model changed itself, and running statistics after the recorded calls."""
    moved = {**buffers, **_outcome(own), **advanced(fmodel.layers, tensors, calls)}
    return {name: moved[name] for name in buffers}


def _forward(
    module: nn.Module, loss_fn: Callable[[Any, Any], Any], batch: tuple[Any, Any], precision: Precision
) -> tuple[Any, Any]:
    if not (isinstance(batch, tuple | list) and len(batch) == 2):
        given = f"a {type(batch).__name__}" + (f" of {len(batch)}" if isinstance(batch, tuple | list) else "")
        raise BatchError(f"the batch is {given}; expected (input, target).")
    inputs, target = batch
    with _autocast(precision, batch):
        if isinstance(inputs, tuple):
            output = module(*inputs)
        elif isinstance(inputs, Mapping):
            output = module(**inputs)
        else:
            output = module(inputs)
        return loss_fn(output, target), output


def _checked(loss_fn: LossFunction) -> LossFunction:
    """A loss function, with a look at what it returns."""
    return lambda output, target: _scalar(loss_fn(output, target))


def _scalar(loss: Any) -> Tensor:
    if not isinstance(loss, Tensor) or loss.dim() != 0 or not loss.is_floating_point():
        given = f"a {loss.dtype} tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else repr(type(loss))
        raise UsageError(
            f"loss_fn returned {given}; expected a 0-d floating-point tensor. Reduce it, e.g. loss.mean()."
        )
    return loss


def _check_output(output: Any, samples: int) -> None:
    """Make sure that a model's output can be cut into ghost groups."""
    lengths = [leaf.shape[0] for leaf in tree_leaves(output) if isinstance(leaf, Tensor) and leaf.dim()]
    if not lengths or any(length != samples for length in lengths):
        raise BatchError(
            f"the tensors of the model's output have lengths {lengths} on dim 0; expected {samples}, one entry a "
            "sample, since the losses of clean and perturbed samples are computed apart. Return such tensors alone, or "
            "use make_apart_step."
        )


def _laid_out(batch: Any, tensors: Tensors) -> Any:
    """Images that a compiler is about to see on a CPU, in channels_last, in which Inductor's convolutions compute.

    In one graph with its backward, Inductor keeps activations in the layout that they would have had without it, and
    copies them to and fro for every convolution. Under vmap, layouts are not ours to choose.
    """
    if not is_compiling() or is_mapped([*tensors.values(), *tree_leaves(batch)]):
        return batch
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}

    def laid_out(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or leaf.device.type != "cpu" or leaf.dim() not in formats:
            return leaf
        return leaf.contiguous(memory_format=formats[leaf.dim()])

    return tree_map(laid_out, batch)


def _outcome(tree: Any) -> Any:
    """Results of an eager pass are cut from its graph; a transform still needs theirs."""
    return tree if is_traced() else tree.detach() if isinstance(tree, Tensor) else detached(tree)


def _autocast(precision: Precision, batch: Any) -> AbstractContextManager[Any]:
    if precision.autocast is None:
        return nullcontext()
    device = next(leaf.device.type for leaf in tree_leaves(batch) if isinstance(leaf, Tensor))
    return torch.autocast(device, dtype=precision.autocast)


def _scaled(loss: Tensor, precision: Precision) -> Tensor:
    return loss if precision.loss_scale is None else loss * precision.loss_scale


def _unscaled(grads: Tensors, loss_scale: Tensor) -> Tensors:
    return {name: grad / loss_scale for name, grad in grads.items()}


def _unscaled_stats(stat_grads: StatTree, loss_scale: Tensor) -> StatTree:
    return {layer: BatchStats(g.mean / loss_scale, g.var / loss_scale) for layer, g in stat_grads.items()}


def check_perturbation(layers: Mapping[str, LayerSpec], perturbation: PerturbationTree, groups: int) -> None:
    """Make sure that every layer has a perturbation of its width.

    Raises:
        SettingError: naming the layers.
    """
    missing = sorted(set(layers) - set(perturbation))
    unexpected = sorted(set(perturbation) - set(layers))
    if missing or unexpected:
        raise SettingError(
            f"the perturbation does not fit the model's BN layers: missing {missing}, unexpected {unexpected}. "
            "A rule returns one entry for every layer in stat_grads."
        )
    for layer, spec in layers.items():
        for shift in perturbation[layer]:
            if tuple(shift.shape) not in ((spec.channels,), (groups, spec.channels)):
                raise SettingError(
                    f"the perturbation of layer {layer!r} has shape {tuple(shift.shape)}; expected ({spec.channels},), "
                    f"or ({groups}, {spec.channels}) for one in each group."
                )


def _checked_state(fmodel: FunctionalModel, params: Tensors, buffers: Tensors) -> Tensors:
    if not is_compiling() and torch.is_inference_mode_enabled():  # Dynamo cannot ask
        raise UsageError("inference_mode is on, and no gradient exists there. Leave it; no_grad is fine.")
    return fmodel.check_state(params, buffers)
