"""The passes of the method: functions from parameters, buffers and a batch to losses and gradients.

    proxy_pass        plain training at δ = 0    →  ∇L_p, the statistics, and g = ∂L_p/∂δ
    adversarial_pass  statistics pushed by δ     →  ∇L_a
    mixed_pass        some ghost groups at 0, the others at δ: both in one forward and backward
    gradients_at      the proxy loss at any δ    →  ∂L_p/∂δ there, for rules that look further than the first gradient

A pass gives every BN layer of the functional model something else to do, and differentiates what comes out.
"""

from __future__ import annotations  # Dynamo would trace the annotations of the functions below

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn

from apart_func._torch import is_compiling, is_mapped, is_traced, specialize
from apart_func.autodiff import ForeignParametersError, Gradient, Opened, differentiate
from apart_func.distributed import check_groups, is_synchronised
from apart_func.errors import BatchError, ModelError, SettingError, UsageError
from apart_func.functional import (
    FunctionalModel,
    LossFunction,
    _Template,
    call_module,
    check_loss_function,
    scalar_loss,
)
from apart_func.layer.affine import flat_shifts
from apart_func.layer.rows import Grouping, Rows, check_rows, number_of_groups
from apart_func.layers import ALL, CleanLayers, MixedLayers, ShiftedLayers, Shifts
from apart_func.running import assign
from apart_func.trees import (
    AdversarialOutput,
    MixedOutput,
    Perturbation,
    PerturbationTree,
    ProxyOutput,
    StatGrads,
    StatGradTree,
    Tensors,
    batch_size,
    detached,
    input_and_target,
    map_tensors,
    replaced,
    tensors_of,
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
        batch: `(input, target)`, pytrees. A tuple or list as input is splatted into the model, a mapping passed as
            keywords.
        precision: mixed-precision settings.

    Returns:
        Loss, output, gradients, new buffers, batch statistics, and their gradients.

    Raises:
        ApartError: the state or batch does not fit the model, or a layer cannot be perturbed.
    """
    run = _Pass(fmodel, loss_fn, params, buffers, batch, precision)
    # A transform differentiates by arguments, so the zero shifts are one; and only that form knows other ranks.
    if is_traced() or any(map(is_synchronised, fmodel.modules())):
        return _proxy_pass_by_shifts(run, params, buffers)
    layers = CleanLayers(run.layers, assign, run.like)
    gradient, output, moved = run.differentiated(layers, (params,), lambda template: template.buffers(buffers))
    stats, stat_grads = layers.statistics(), layers.stat_grads(gradient.tap_grads)
    return ProxyOutput(
        gradient.loss, output, run.unscaled(gradient.grads[0]), moved, stats, run.unscaled_stats(stat_grads)
    )


def _proxy_pass_by_shifts(run: _Pass, params: Tensors, buffers: Tensors) -> ProxyOutput:
    point = zero_shifts(run.layers, run.like)
    layers = MixedLayers(run.layers, point, Grouping(1, run.samples), 1, assign, run.like.dtype)

    def after(template: _Template) -> Any:
        return template.buffers(buffers), layers.record.statistics()

    gradient, output, (moved, stats) = run.differentiated(layers, (params, point), after)
    grads, shift_grads = gradient.grads
    stat_grads = run.unscaled_stats(run.shift_grads(shift_grads, 1))
    return ProxyOutput(gradient.loss, output, run.unscaled(grads), moved, stats, stat_grads)


def adversarial_pass(
    fmodel: FunctionalModel,
    loss_fn: LossFunction,
    params: Tensors,
    buffers: Tensors,
    batch: tuple[Any, Any],
    perturbation: PerturbationTree,
    *,
    groups: int = 0,
    rows: Rows | None = None,
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
        rows: how the rows of a layer belong to samples, where there are others than one a sample; `layer/rows.py`.
        precision: mixed-precision settings.

    Returns:
        Loss, output and gradients.

    Raises:
        ApartError: the state, batch or perturbation does not fit the model, or a layer cannot be perturbed.
    """
    run = _Pass(fmodel, loss_fn, params, buffers, batch, precision)
    check_groups(groups, fmodel.modules())
    check_rows(rows)
    grouping = Grouping(number_of_groups(groups, run.samples), run.samples, rows)
    check_perturbation(fmodel.layers, perturbation, grouping.groups)
    layers = ShiftedLayers(run.layers, run.point(perturbation, grouping.groups), grouping)
    gradient, output, _ = run.differentiated(layers, (params,))
    return AdversarialOutput(gradient.loss, output, run.unscaled(gradient.grads[0]))


def gradients_at(
    fmodel: FunctionalModel,
    loss_fn: LossFunction,
    params: Tensors,
    buffers: Tensors,
    batch: tuple[Any, Any],
    perturbation: PerturbationTree,
    *,
    precision: Precision = FULL_PRECISION,
) -> StatGradTree:
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
    run = _Pass(fmodel, loss_fn, detached(params), buffers, batch, precision)
    check_perturbation(fmodel.layers, perturbation, 1)
    point = run.point(perturbation, 1)
    layers = ShiftedLayers(run.layers, point, Grouping(1, run.samples))
    gradient, _, _ = run.differentiated(layers, ({}, point))
    return run.unscaled_stats(run.shift_grads(gradient.grads[1], 1))


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
    rows: Rows | None = None,
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
        rows: how the rows of a layer belong to samples, where there are others than one a sample; `layer/rows.py`.
        precision: mixed-precision settings.

    Returns:
        Losses, output, gradients, new buffers, the clean statistics, and statistic gradients of every group.

    Raises:
        ApartError: the state, batch, output or perturbation does not fit, or a layer cannot be perturbed.
    """
    run = _Pass(fmodel, loss_fn, params, buffers, batch, precision)
    check_groups(groups, fmodel.modules())
    groups = number_of_groups(groups, run.samples)
    check_clean(clean, groups)
    check_rows(rows)
    check_perturbation(fmodel.layers, perturbation, 1)
    point = run.point(perturbation, groups, clean)
    layers = MixedLayers(run.layers, point, Grouping(groups, run.samples, rows), clean, assign, run.like.dtype)
    losses: list[Tensor] = []

    def loss_of_both(output: Any, target: Any) -> Tensor:
        _check_output(output, run.samples)
        losses[:] = [
            scalar_loss(loss_fn(*(cut_groups(tree, groups, *limits) for tree in (output, target))))
            for limits in ((0, clean), (clean, groups))
        ]
        return torch.lerp(losses[1], losses[0], clean / groups)

    def after(template: _Template) -> Any:
        return template.buffers(buffers), layers.record.statistics(), [_outcome(loss) for loss in losses]

    run.loss_fn = loss_of_both
    gradient, output, (moved, stats, (loss, second)) = run.differentiated(layers, (params, point), after)
    grads, shift_grads = gradient.grads
    stat_grads = run.unscaled_stats(run.shift_grads(shift_grads, groups))
    return MixedOutput(loss, second, output, run.unscaled(grads), moved, stats, stat_grads)


class _Pass:
    """A forward and backward of a model over a batch, whatever its batch norm does.

    Attributes:
        layers: channels of the BN layers, by name.
        samples: number of samples in the batch.
        like: 0-d zero with the dtype and device of the model's statistics.
        loss_fn: of output and target.
    """

    def __init__(
        self,
        fmodel: FunctionalModel,
        loss_fn: LossFunction,
        params: Tensors,
        buffers: Tensors,
        batch: Any,
        precision: Precision,
    ) -> None:
        if not isinstance(fmodel, FunctionalModel):
            raise ModelError(f"fmodel is a {type(fmodel).__name__}; expected what functionalize(model) returns.")
        check_loss_function(loss_fn)
        if not is_compiling() and torch.is_inference_mode_enabled():  # Dynamo cannot ask
            raise UsageError("inference_mode is on, and no gradient exists there. Leave it; no_grad is fine.")
        self._fmodel, self.layers, self.loss_fn, self._criterion = fmodel, fmodel.layers, loss_fn, loss_fn
        # A compiler traces the checks as well: there a step makes them once, and its passes do not.
        self._tensors = {**params, **buffers} if is_compiling() else fmodel.check_state(params, buffers)
        specialize([*self._tensors.values(), *tensors_of(batch)])
        self._inputs, self._target = input_and_target(_laid_out(batch, self._tensors))
        self.samples = batch_size(batch)
        self.like = statistics_like(self._tensors)
        self._precision = precision

    def differentiated(
        self,
        layers: CleanLayers | ShiftedLayers,
        inputs: tuple[Mapping[str, Any], ...],
        after: Callable[[_Template], Any] = lambda template: None,
    ) -> tuple[Gradient, Any, Any]:
        """Run the pass.

        Args:
            layers: what batch norm does.
            inputs: parameters to differentiate by, then shifts, if these are differentiated by as well.
            after: what else to return, asked between forward and backward.

        Returns:
            The gradient of the scaled loss, with the loss itself; the model's output; and what `after` returned.
        """
        templates: list[_Template] = []

        def compute(trained: Tensors, *more: Any) -> Any:
            *shifts, finish = more
            if shifts and isinstance(layers, ShiftedLayers):
                (layers.shifts,) = shifts

            def body(template: _Template) -> Any:
                layers.prepare({} if is_traced() else template.affine_parameters())
                with self._autocast():
                    output = call_module(template.module, self._inputs)
                    loss = scalar_loss(self.loss_fn(output, self._target))
                templates.append(template)
                trusted = tensors_of(output) if template.checked else []
                layers.flush()
                scale = self._precision.loss_scale
                results = (_outcome(loss), _outcome(output), after(template))
                return finish(Opened(loss if scale is None else loss * scale, results, layers.taps(), trusted))

            return self._fmodel.run({**self._tensors, **trained}, layers, body)

        try:
            gradient = differentiate(compute, *inputs)
        except ForeignParametersError as error:
            raise UsageError(error.message([self._name_of(parameter) for parameter in error.parameters])) from None
        if not is_traced():
            templates[0].checked = True
        loss, output, results = gradient.aux
        return replaced(gradient, loss=loss), output, results

    def point(self, perturbation: PerturbationTree, groups: int, clean: int = 0) -> Shifts:
        """Where a pass is taken: a perturbation of all ghost groups but the first `clean` ones."""
        if not is_traced() and all(mean.dim() == scale.dim() == 1 for mean, scale in perturbation.values()):
            return {ALL: flat_shifts(perturbation, self.layers, groups, clean, self.like.dtype)}
        return in_groups(perturbation, groups, clean, self.like) if clean else perturbation

    def shift_grads(self, grads: Mapping[str, Any], groups: int) -> StatGradTree:
        """Gradients by the shifts of such a point, `(C,)` in one group, `(G, C)` else."""
        by_layer = grads[ALL].by_layer(self.layers, groups) if ALL in grads else grads
        return {name: StatGrads(*by_layer[name]) for name in self.layers}

    def unscaled(self, grads: Tensors) -> Tensors:
        """Gradients without the loss scale."""
        scale = self._precision.loss_scale
        return grads if scale is None else {name: grad / scale for name, grad in grads.items()}

    def unscaled_stats(self, stat_grads: StatGradTree) -> StatGradTree:
        """Statistic gradients without the loss scale."""
        scale = self._precision.loss_scale
        if scale is None:
            return stat_grads
        return {name: StatGrads(mean / scale, spread / scale) for name, (mean, spread) in stat_grads.items()}

    def _autocast(self) -> AbstractContextManager[Any]:
        if self._precision.autocast is None:
            return nullcontext()
        return torch.autocast(self.like.device.type, dtype=self._precision.autocast)

    def _name_of(self, parameter: nn.Parameter) -> str:
        if name := self._fmodel.name_of(parameter):
            return name
        criterion = self._criterion.named_parameters() if isinstance(self._criterion, nn.Module) else ()
        found = [f"loss_fn.{name}" for name, own in criterion if own is parameter]
        return found[0] if found else f"one of shape {tuple(parameter.shape)}"


def statistics_like(tensors: Mapping[str, Tensor]) -> Tensor:
    """A 0-d zero with the device and dtype of this model's statistics: float64 in a float64 model, float32 else."""
    wide = any(tensor.dtype in (torch.float64, torch.complex128) for tensor in tensors.values())
    device = next(iter(tensors.values())).device
    return torch.zeros((), dtype=torch.float64 if wide else torch.float32, device=device)


def zero_shifts(layers: Mapping[str, int], like: Tensor) -> PerturbationTree:
    """No perturbation, `(C,)`, of layers with C channels."""
    return {name: Perturbation(like.new_zeros(channels), like.new_zeros(channels)) for name, channels in layers.items()}


def in_groups(perturbation: PerturbationTree, groups: int, clean: int, like: Tensor) -> PerturbationTree:
    """A perturbation of each ghost group, `(G, C)`: none of the first `clean` ones, the given one of the others."""
    amount = (torch.arange(groups, device=like.device) >= clean).to(like.dtype).unsqueeze(1)
    return {
        name: Perturbation(amount * mean.detach(), amount * scale.detach())
        for name, (mean, scale) in perturbation.items()
    }


def cut_groups(tree: Any, groups: int, start: int, stop: int) -> Any:
    """Samples of ghost groups `start` to `stop`; leaves without a dimension are passed whole."""

    def of_groups(leaf: Tensor) -> Tensor:
        grouped = rearrange(leaf, "(b g) ... -> b g ...", g=groups)[:, start:stop]
        return rearrange(grouped, "b g ... -> (b g) ...")

    return map_tensors(lambda leaf: of_groups(leaf) if leaf.dim() else leaf, tree)


def _check_output(output: Any, samples: int) -> None:
    """Make sure that a model's output can be cut into ghost groups."""
    leaves = tensors_of(output)
    lengths = [leaf.shape[0] for leaf in leaves if leaf.dim()]
    if not lengths or any(length != samples for length in lengths):
        raise BatchError(
            f"the tensors of the model's output have lengths {lengths} on dim 0; expected {samples}, one entry a "
            "sample, since the losses of clean and perturbed samples are computed apart. Return such tensors alone, or "
            "use make_apart_step."
        )
    if any(leaf.requires_grad for leaf in leaves if not leaf.dim()):
        raise BatchError(
            "the model's output holds a 0-d tensor that depends on parameters, such as a loss of all samples, and the "
            "losses of clean and perturbed samples are computed apart. Return outputs with an entry a sample, compute "
            "the loss in loss_fn, or use make_apart_step."
        )


def _laid_out(batch: Any, tensors: Tensors) -> Any:
    """Images that a compiler is about to see on a CPU, in channels_last, in which Inductor's convolutions compute.

    In one graph with its backward, Inductor keeps activations in the layout that they would have had without it, and
    copies them to and fro for every convolution. Under vmap, layouts are not ours to choose.
    """
    if not is_compiling() or is_mapped([*tensors.values(), *tensors_of(batch)]):
        return batch
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}

    def laid_out(leaf: Tensor) -> Tensor:
        if leaf.device.type != "cpu" or leaf.dim() not in formats:
            return leaf
        return leaf.contiguous(memory_format=formats[leaf.dim()])

    return map_tensors(laid_out, batch)


def _outcome(tree: Any) -> Any:
    """Results of an eager pass are cut from its graph; a transform still needs theirs."""
    return tree if is_traced() else detached(tree)


def check_clean(clean: Any, groups: int) -> None:
    """Make sure that a mixed pass has groups of both kinds.

    Raises:
        SettingError: all groups would be of one kind.
    """
    if not isinstance(clean, int) or isinstance(clean, bool) or not 0 < clean < groups:
        raise SettingError(f"clean={clean!r} of {groups} groups; expected at least one, and less than all of them.")


def check_perturbation(layers: Mapping[str, int], perturbation: Any, groups: int) -> None:
    """Make sure that every layer has a perturbation of its width.

    Raises:
        SettingError: naming the layers.
    """
    check_layers(layers, perturbation)
    for name, channels in layers.items():
        for shift in perturbation[name]:
            shape = tuple(shift.shape) if isinstance(shift, Tensor) else type(shift).__name__
            if shape not in ((channels,), (groups, channels)):
                raise SettingError(
                    f"the perturbation of layer {name!r} has shape {shape}; expected ({channels},), "
                    f"or ({groups}, {channels}) for one in each group."
                )


def check_layers(layers: Iterable[str], perturbation: Any) -> None:
    """Make sure that a perturbation has the layers that it should have.

    Raises:
        SettingError: naming the layers.
    """
    if not isinstance(perturbation, Mapping):
        raise SettingError(
            f"the perturbation is a {type(perturbation).__name__}; expected a dict by layer, as of init_perturbation."
        )
    missing, unexpected = sorted(set(layers) - set(perturbation)), sorted(set(perturbation) - set(layers))
    if missing or unexpected:
        raise SettingError(
            f"the perturbation does not fit the model's BN layers: missing {missing}, unexpected {unexpected}. "
            "A rule returns one entry for every layer in stat_grads."
        )
