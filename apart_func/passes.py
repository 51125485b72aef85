"""The two passes of the method: functions from parameters, buffers and a batch to losses and gradients.

    proxy_pass        plain training at δ = 0    →  ∇L_p, the statistics, and g = ∂L_p/∂δ
    adversarial_pass  statistics pushed by δ     →  ∇L_a

A pass gives every BN layer of the functional model something else to do, and differentiates what comes out.
"""

from __future__ import annotations  # Dynamo would trace the annotations of the functions below

from collections.abc import Iterator, Mapping
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
    perturbed_batch_norm,
    statistic_gradients,
)
from apart_func.errors import SettingError, UsageError
from apart_func.functional import FunctionalModel, LayerSpec, LossFunction, call_module, check_loss
from apart_func.pytrees import (
    AdversarialOutput,
    BatchStats,
    Perturbation,
    PerturbationTree,
    ProxyOutput,
    StatTree,
    Tensors,
    batch_size,
    detached,
    input_and_target,
    stack_trees,
    tree_leaves,
)


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
            loss, output = _forward(module, loss_fn, batch, precision)
            moved = {**buffers, **_outcome(copy.own_buffers()), **advanced(fmodel.layers, tensors, record.calls)}
            kept = {name: moved[name] for name in buffers}
            results = (_outcome(loss), _outcome(output), kept, statistics(record.calls))
            yield Opened(_scaled(loss, precision), results, record.taps())

    if is_traced():
        shifts = zero_shifts(fmodel.layers, like)
        (grads, shift_grads), (loss, output, buffers, stats), _ = gradient_traced(run, params, shifts)
        stat_grads = {layer: BatchStats(*g) for layer, g in shift_grads.items()}
    else:
        (grads,), (loss, output, buffers, stats), tap_grads = gradient_eager(run, params)
        stat_grads = record.statistic_gradients(tap_grads)
    if precision.loss_scale is not None:
        grads = _unscaled(grads, precision.loss_scale)
        scale = precision.loss_scale
        stat_grads = {layer: BatchStats(g.mean / scale, g.var / scale) for layer, g in stat_grads.items()}
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
            loss, output = _forward(module, loss_fn, batch, precision)
            yield Opened(_scaled(loss, precision), (_outcome(loss), _outcome(output)))

    (grads,), (loss, output), _ = gradient_traced(run, params) if is_traced() else gradient_eager(run, params)
    if precision.loss_scale is not None:
        grads = _unscaled(grads, precision.loss_scale)
    return AdversarialOutput(loss, output, grads)


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


Calls = dict[str, list[Call]]


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
    differentiates by arguments, so there the pass takes the zero shifts as one.
    """

    def __init__(self, layers: Mapping[str, LayerSpec], like: Tensor) -> None:
        self.layers, self.like = layers, like
        self.shifts: PerturbationTree | None = None
        self.calls: Calls = {}

    def __call__(self, name: str, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
        check_input(name, x, self.layers[name].channels)
        taps = None
        if self.shifts is None:
            y, stats, taps = clean_batch_norm(x, weight, bias, eps)
        else:
            y, stats = perturbed_batch_norm(x, weight, bias, eps, self.shifts[name])
        if not is_recomputing():
            self.calls.setdefault(name, []).append(Call(self._cast(stats), x.numel() // x.shape[1], eps, taps))
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


def _forward(
    module: nn.Module, loss_fn: LossFunction, batch: tuple[Any, Any], precision: Precision
) -> tuple[Tensor, Any]:
    inputs, target = input_and_target(batch)
    with _autocast(precision, batch):
        output = call_module(module, inputs)
        loss = loss_fn(output, target)
    check_loss(loss)
    return loss, output


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
