"""The passes of the method: functions from parameters, buffers and a batch to losses and gradients.

    proxy_pass        plain training at δ = 0    →  ∇L_p, the statistics, and g = ∂L_p/∂δ
    adversarial_pass  statistics pushed by δ     →  ∇L_a
    mixed_pass        some ghost groups at 0, the others at δ: both in one forward and backward
    gradients_at      the proxy loss at any δ    →  ∂L_p/∂δ there, for rules that look further than the first gradient

All are one forward and backward of the functional model (`Pass`), with another δ, other groups, and other results.
"""

from __future__ import annotations  # Dynamo would trace the annotations of the functions below

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from apart_func._torch import backward_task, is_concrete, is_traced, specialize
from apart_func.autodiff import ForeignParametersError, LentLeaves, foreign_parameters, under_transforms
from apart_func.checks import check_clean, check_perturbation
from apart_func.errors import BatchError
from apart_func.functional import (
    FunctionalModel,
    check_arguments,
    check_call,
    module_arguments,
)
from apart_func.groups import Grouping, Rows, check_rows, number_of_groups
from apart_func.layers import PerturbedLayers, Record, in_groups
from apart_func.losses import LossFunction, check_output, couples, loss_and_aux
from apart_func.ranks import check_groups
from apart_func.samples import batch_size, cut_groups
from apart_func.stateless import StatelessModule
from apart_func.trees import (
    AdversarialOutput,
    MixedOutput,
    PerturbationTree,
    ProxyOutput,
    StatGrads,
    StatGradTree,
    StatTree,
    Tensors,
    detach_perturbation,
    detached,
    input_and_target,
    map_tensors,
    statistics_kind,
    tensors_of,
    zero_perturbation,
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
        loss_fn: `(output, target) -> scalar`, or `-> (scalar, aux)`. A pure function.
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
    params = check_call(fmodel, loss_fn, params, buffers)
    return Pass(fmodel, loss_fn, params, buffers, batch, precision).proxy()


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
        fmodel: as in `proxy_pass`, like the next three.
        loss_fn: likewise.
        params: likewise.
        buffers: likewise.
        batch: `(input, target)` with the N samples of this pass.
        perturbation: relative shifts of every BN layer, `(C,)`, or `(groups, C)` for one in each group. `torch.func`
            differentiates the loss by them; the gradients here are those of parameters.
        groups: number of ghost groups; sample i is in group i mod `groups`. 0 and 1 make one group of the whole
            batch, -1 makes a group of every sample.
        rows: how the rows of a layer belong to samples, if there are others than one a sample; see `groups.py`.
        precision: mixed-precision settings.

    Returns:
        Loss, output, gradients, and the statistics of every group.

    Raises:
        ApartError: the state, batch or perturbation does not fit the model, or a layer cannot be perturbed.
    """
    params = check_call(fmodel, loss_fn, params, buffers)
    run = Pass(fmodel, loss_fn, params, buffers, batch, precision)
    check_groups(groups, fmodel.modules())
    check_rows(rows)
    grouping = Grouping(number_of_groups(groups, run.samples), run.samples, rows)
    check_perturbation(fmodel.layers, perturbation, grouping.groups)
    return run.adversarial(perturbation, grouping)


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
        loss_fn: `(output, target) -> scalar`, or `-> (scalar, aux)`. A pure function.
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
    params = check_call(fmodel, loss_fn, params, buffers)
    run = Pass(fmodel, loss_fn, params, buffers, batch, precision)
    check_perturbation(fmodel.layers, perturbation, 1)
    return run.gradients_at(perturbation)


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
    stat_grads: bool = True,
) -> MixedOutput:
    """Run a forward and backward in which some ghost groups are clean, and the others have perturbed statistics.

    Ghost groups share no statistics, so what the clean ones compute is a proxy pass, and the rest an adversarial one.
    Running statistics advance by those of the clean samples alone.

    Args:
        fmodel: the model, from `functionalize`.
        loss_fn: `(output, target) -> scalar`, or `-> (scalar, aux)`. A pure function. The loss of the whole batch is
            differentiated; those of the clean samples and of the others are computed besides, for the report.
        params: trained tensors by name.
        buffers: all other tensors by name.
        batch: `(input, target)`.
        perturbation: relative shifts of every BN layer, `(C,)` each, for the groups that are not clean.
        groups: number of ghost groups G ≥ 2; sample i is in group i mod G.
        clean: how many of them are clean, the first ones; at least one, and less than all.
        rows: how the rows of a layer belong to samples, if there are others than one a sample; see `groups.py`.
        precision: mixed-precision settings.
        stat_grads: whether to differentiate by the perturbation as well.

    Returns:
        Losses, output, gradients, new buffers, the clean statistics, and statistic gradients of every group.

    Raises:
        ApartError: the state, batch or perturbation does not fit, or a layer cannot be perturbed.
    """
    params = check_call(fmodel, loss_fn, params, buffers)
    run = Pass(fmodel, loss_fn, params, buffers, batch, precision)
    check_groups(groups, fmodel.modules())
    groups = number_of_groups(groups, run.samples)
    check_clean(clean, groups)
    check_rows(rows)
    check_perturbation(fmodel.layers, perturbation, 1)
    return run.mixed(perturbation, Grouping(groups, run.samples, rows), clean, stat_grads)


class Results(NamedTuple):
    """What a forward leaves besides gradients.

    Attributes:
        loss: of the batch, 0-d.
        clean_loss: of the clean samples of a mixed pass.
        adversarial_loss: of the others.
        output: of the model.
        aux: what the loss function returned besides the loss.
        buffers: after the forward.
        stats: of the clean groups.
        perturbed_stats: of the others.
    """

    loss: Tensor
    clean_loss: Tensor
    adversarial_loss: Tensor
    output: Any
    aux: Any
    buffers: Tensors
    stats: StatTree
    perturbed_stats: StatTree


class Pass:
    """A forward and backward of a model over a batch, at any δ in any ghost groups.

    Attributes:
        samples: number of samples in the batch.
        dtype: of the model's statistics.
        device: likewise.
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
        self._fmodel, self._loss_fn, self._precision = fmodel, loss_fn, precision
        self._params, self._buffers = params, buffers
        self._inputs, self._target = input_and_target(batch)
        self.samples = batch_size(batch)
        self.dtype, self.device = statistics_kind(params)
        specialize([*params.values(), *buffers.values(), *tensors_of(batch)])

    def proxy(self) -> ProxyOutput:
        """See `proxy_pass`."""
        zero = zero_perturbation(self._fmodel.layers, self.dtype, self.device)
        grads, stat_grads, results = self._run(self._params, zero, True, Grouping(1, self.samples), 1)
        return ProxyOutput(results.loss, results.output, grads, results.buffers, results.stats, stat_grads, results.aux)

    def adversarial(self, perturbation: PerturbationTree, grouping: Grouping) -> AdversarialOutput:
        """See `adversarial_pass`."""
        grads, _, results = self._run(self._params, perturbation, False, grouping, 0)
        return AdversarialOutput(results.loss, results.output, grads, results.perturbed_stats, results.aux)

    def gradients_at(self, perturbation: PerturbationTree) -> StatGradTree:
        """See `gradients_at`."""
        return self._run({}, detach_perturbation(perturbation), True, Grouping(1, self.samples), 0)[1]

    def mixed(self, perturbation: PerturbationTree, grouping: Grouping, clean: int, stat_grads: bool) -> MixedOutput:
        """See `mixed_pass`."""
        shifts = in_groups(perturbation, clean, grouping.groups)
        grads, shift_grads, results = self._run(self._params, shifts, stat_grads, grouping, clean)
        return MixedOutput(
            results.clean_loss,
            results.adversarial_loss,
            results.output,
            grads,
            results.buffers,
            results.stats,
            shift_grads,
            results.perturbed_stats,
            results.loss,
            results.aux,
        )

    def _run(
        self, params: Tensors, shifts: PerturbationTree, by_shifts: bool, grouping: Grouping, clean: int
    ) -> tuple[Tensors, StatGradTree, Results]:
        """Run the pass at some shifts; return gradients by some parameters and, if wanted, by the shifts."""
        inputs: tuple[Any, ...] = (params, shifts) if by_shifts else (params,)
        fixed: tuple[Any, ...] = () if by_shifts else (shifts,)
        fmodel = self._fmodel
        try:
            if is_traced():

                def compute(*trees: Any) -> Any:
                    *given, backward = trees
                    return self._forward_and_backward([*given, *fixed], grouping, clean, backward)

                grads, results = under_transforms(compute, inputs)
            else:
                leaves = LentLeaves(inputs, are_copies=not fmodel.training.is_proven)
                with torch.enable_grad():
                    grads, results = self._forward_and_backward(
                        [*leaves.trees, *fixed], grouping, clean, leaves.backward
                    )
                fmodel.training.is_proven = True
        except ForeignParametersError as error:
            raise foreign_parameters([self._name_of(parameter) for parameter in error.args[0]]) from None
        by_params = {name: self._unscaled(grad) for name, grad in grads[0].items()}
        by_point = {
            name: StatGrads(self._unscaled(mean), self._unscaled(scale))
            for name, (mean, scale) in (grads[1] if by_shifts else {}).items()
        }
        return by_params, by_point, results

    def _forward_and_backward(
        self, point: list[Any], grouping: Grouping, clean: int, backward: Callable[[Tensor, Results], Any]
    ) -> Any:
        """Run the model while it holds some parameters and its layers are at some shifts, and go back from its loss."""
        params, shifts = point
        record = Record(clean, self._fmodel.training.replace_buffer, self.dtype)
        layers = PerturbedLayers(shifts, grouping, record, backward_task())

        def body(stateless: StatelessModule) -> Any:
            # Copies, since a forward may change its input in place.
            args, kwargs = module_arguments(map_tensors(_copied, self._inputs))
            with self._autocast():
                try:
                    output = stateless.module(*args, **kwargs)
                except TypeError as error:
                    check_arguments(stateless.module, args, kwargs, error)
                    raise
                _check_unchanged((args, kwargs))
                if layers.mixes:
                    check_output(output, self.samples)
                loss, aux = loss_and_aux(self._loss_fn(output, self._target))
                parts = self._losses_by_part(loss, output, grouping, clean)
            layers.check_rows()
            moved = stateless.buffers(self._buffers)
            results = Results(loss, *parts, output, aux, moved, record.clean_stats(), record.perturbed_stats())
            scale = self._precision.loss_scale
            return backward(loss if scale is None else loss * scale, results if is_traced() else detached(results))

        return self._fmodel.run({**self._params, **params}, self._buffers, layers, body)

    def _losses_by_part(self, loss: Tensor, output: Any, grouping: Grouping, clean: int) -> tuple[Tensor, Tensor]:
        """Return the losses of the clean samples and of the others, or twice that of all if it couples samples."""
        groups = grouping.groups
        if not 0 < clean < groups:
            return loss, loss
        if self._couples(output, groups, clean):
            return loss, loss
        clean_loss, adversarial_loss = (
            loss_and_aux(self._loss_fn(*(cut_groups(t, groups, *part, self.samples) for t in (output, self._target))))[
                0
            ]
            for part in ((0, clean), (clean, groups))
        )
        return clean_loss, adversarial_loss

    def _couples(self, output: Any, groups: int, clean: int) -> bool:
        """Return whether the loss couples clean samples with others; a traced call cannot see it, and says no."""
        if not is_concrete(tensors_of(output)[0]):
            return False
        key, known = (id(self._loss_fn), self.samples, groups, clean), self._fmodel.coupled
        if key not in known:  # the loss is kept with it, so that no other gets its id
            known[key] = self._loss_fn, couples(self._loss_fn, output, self._target, groups, clean)
        return known[key][1]

    def _unscaled(self, grad: Tensor) -> Tensor:
        """Divide the loss scale out of a gradient."""
        return grad if self._precision.loss_scale is None else grad / self._precision.loss_scale

    def _autocast(self) -> AbstractContextManager[Any]:
        if self._precision.autocast is None:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self._precision.autocast)

    def _name_of(self, parameter: nn.Parameter) -> str:
        if name := self._fmodel.name_of(parameter):
            return name
        criterion = self._loss_fn.named_parameters() if isinstance(self._loss_fn, nn.Module) else ()
        found = [f"loss_fn.{name}" for name, own in criterion if own is parameter]
        return found[0] if found else f"one of shape {tuple(parameter.shape)}"


def _copied(tensor: Tensor) -> Tensor:
    return tensor.clone() if tensor.layout == torch.strided and not tensor.is_nested else tensor


def _check_unchanged(inputs: Any) -> None:
    """Make sure that a forward has not changed the copies of its inputs, which the second pass would get changed."""
    for place, tensor in enumerate(tensors_of(inputs)):
        if is_concrete(tensor) and tensor._version and tensor.layout == torch.strided:
            raise BatchError(
                f"the model's forward changes its input in place (tensor {place}, of shape {tuple(tensor.shape)}), and "
                "a step changes none of its arguments. Say x = x.clone() first, or inplace=False in the first layer."
            )
