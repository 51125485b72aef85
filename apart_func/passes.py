"""The passes of the method: functions from parameters, buffers and a batch to losses and gradients.

    proxy_pass        plain training at δ = 0    →  ∇L_p, the statistics, and g = ∂L_p/∂δ
    adversarial_pass  statistics pushed by δ     →  ∇L_a
    mixed_pass        some ghost groups at 0, the others at δ: both in one forward and backward
    gradients_at      the proxy loss at any δ    →  ∂L_p/∂δ there, for rules that look further than the first gradient

All are one forward and backward of the functional model (`Pass`), with another δ, other groups, and other results.
"""

from __future__ import annotations  # Dynamo would trace the annotations of the functions below

from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from apart_func._torch import backward_task, specialize
from apart_func.autodiff import (
    ForeignParametersError,
    detach_if_eager,
    detach_unless_differentiated,
    foreign_parameters,
    gradients,
    is_unreached,
)
from apart_func.checks import check_clean, check_perturbation
from apart_func.functional import FunctionalModel, check_arguments, check_call, check_unchanged, module_arguments
from apart_func.groups import Grouping, Rows, check_rows, number_of_groups
from apart_func.layers import PerturbedLayers, Record, in_groups
from apart_func.losses import LossFunction, check_output, loss_and_aux, losses_by_part
from apart_func.ranks import check_groups
from apart_func.samples import batch_size
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
    copied,
    detach_perturbation,
    input_and_target,
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

    Raises:
        ApartError: the state or batch does not fit the model, or a layer cannot be perturbed; as all passes do.
    """
    return _begin(fmodel, loss_fn, params, buffers, batch, precision).proxy()


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
    """
    run = _begin(fmodel, loss_fn, params, buffers, batch, precision)
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
    """Differentiate the proxy loss by the perturbation, at a perturbation: ∂L_p/∂δ, `(C,)`. No buffer moves.

    Costs less than another proxy pass: parameters have no gradient here.

    Args:
        fmodel: as in `proxy_pass`, like the next four.
        loss_fn: likewise.
        params: likewise.
        buffers: likewise, as the proxy pass got them.
        batch: likewise; it is one group.
        perturbation: relative shifts of every BN layer, `(C,)`.
        precision: mixed-precision settings.
    """
    params = copied(check_call(fmodel, loss_fn, params, buffers))  # which no gradient is taken by: a forward may write
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
        fmodel: as in `proxy_pass`, like the next four.
        loss_fn: likewise. The loss of the whole batch is differentiated; those of the clean samples and of the others
            are computed besides, for the report.
        params: likewise.
        buffers: likewise.
        batch: likewise.
        perturbation: relative shifts of every BN layer, `(C,)` each, for the groups that are not clean.
        groups: number of ghost groups G ≥ 2; sample i is in group i mod G.
        clean: how many of them are clean, the first ones; at least one, and less than all.
        rows: how the rows of a layer belong to samples, if there are others than one a sample; see `groups.py`.
        precision: mixed-precision settings.
        stat_grads: whether to differentiate by the perturbation as well.
    """
    run = _begin(fmodel, loss_fn, params, buffers, batch, precision)
    check_groups(groups, fmodel.modules())
    groups = number_of_groups(groups, run.samples)
    check_clean(clean, groups)
    check_rows(rows)
    check_perturbation(fmodel.layers, perturbation, 1)
    return run.mixed(perturbation, Grouping(groups, run.samples, rows), clean, stat_grads)


def _begin(
    fmodel: FunctionalModel, loss_fn: LossFunction, params: Tensors, buffers: Tensors, batch: Any, precision: Precision
) -> Pass:
    params = check_call(fmodel, loss_fn, params, buffers)
    return Pass(fmodel, loss_fn, params, buffers, batch, precision)


class Results(NamedTuple):
    """What a forward leaves besides gradients."""

    loss: Tensor  # of the batch
    clean_loss: Tensor
    adversarial_loss: Tensor
    output: Any
    aux: Any
    buffers: Tensors
    stats: StatTree  # of the clean groups
    perturbed_stats: StatTree  # of the others


class Pass:
    """A forward and backward of a model over a batch of `samples`, at any δ in any ghost groups."""

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
        # Of the arguments, params alone are differentiated by, whatever the others require.
        self._params, (self._buffers, pair) = params, detach_unless_differentiated((buffers, input_and_target(batch)))
        self._inputs, self._target = pair
        self.samples = batch_size(batch)
        self.dtype, self.device = statistics_kind(params)
        specialize([*params.values(), *buffers.values(), *tensors_of(batch)])

    def proxy(self) -> ProxyOutput:
        """See `proxy_pass`."""
        zero = zero_perturbation(self._fmodel.layers, self.dtype, self.device)
        grads, stat_grads, found = self._run(self._params, zero, True, Grouping(1, self.samples), 1)
        return ProxyOutput(found.loss, found.output, grads, found.buffers, found.stats, stat_grads, found.aux)

    def adversarial(self, perturbation: PerturbationTree, grouping: Grouping) -> AdversarialOutput:
        """See `adversarial_pass`."""
        grads, _, found = self._run(self._params, perturbation, False, grouping, 0)
        return AdversarialOutput(found.loss, found.output, grads, found.perturbed_stats, found.aux)

    def gradients_at(self, perturbation: PerturbationTree) -> StatGradTree:
        """See `gradients_at`."""
        return self._run({}, detach_perturbation(perturbation), True, Grouping(1, self.samples), 0)[1]

    def mixed(self, perturbation: PerturbationTree, grouping: Grouping, clean: int, stat_grads: bool) -> MixedOutput:
        """See `mixed_pass`."""
        shifts = in_groups(perturbation, clean, grouping.groups)
        grads, by_shifts, found = self._run(self._params, shifts, stat_grads, grouping, clean)
        loss, clean_loss, adversarial_loss, output, aux, buffers, stats, others = found
        return MixedOutput(
            clean_loss, adversarial_loss, output, grads, buffers, stats, by_shifts, others, batch_loss=loss, aux=aux
        )

    def _run(
        self, params: Tensors, shifts: PerturbationTree, by_shifts: bool, grouping: Grouping, clean: int
    ) -> tuple[Tensors, StatGradTree, Results]:
        """Run the pass at some shifts; return gradients by some parameters and, if wanted, by the shifts."""
        inputs: tuple[Any, ...] = (params, shifts) if by_shifts else (params,)
        fixed: tuple[Any, ...] = () if by_shifts else (shifts,)
        compute = partial(self._forward_and_backward, fixed, grouping, clean)
        try:
            grads, results = gradients(compute, inputs, self._fmodel.training.proof if params else None)
        except ForeignParametersError as error:
            raise foreign_parameters([self._name_of(parameter) for parameter in error.args[0]]) from None
        scale = self._precision.loss_scale
        of_params, of_shifts = grads[0], grads[1] if by_shifts else {}
        if scale is not None:
            of_params = {name: grad if is_unreached(grad) else grad / scale for name, grad in of_params.items()}
            of_shifts = {name: (mean / scale, var / scale) for name, (mean, var) in of_shifts.items()}
        return of_params, {name: StatGrads(*pair) for name, pair in of_shifts.items()}, results

    def _forward_and_backward(self, fixed: tuple[Any, ...], grouping: Grouping, clean: int, *given: Any) -> Any:
        """Run the model while it holds some parameters and its layers are at some shifts, and go back from its loss."""
        *point, backward = given
        params, shifts = *point, *fixed
        record = Record(clean, self._fmodel.training.replace_buffer, self.dtype)
        layers = PerturbedLayers(shifts, grouping, record, backward_task())

        def body(stateless: StatelessModule) -> Any:
            # Copies, since a forward may change its input in place, and a loss its target.
            inputs, target = copied((self._inputs, self._target))
            args, kwargs = module_arguments(inputs)
            with self._autocast():
                try:
                    output = stateless.module(*args, **kwargs)
                except TypeError as error:
                    check_arguments(stateless.module, args, kwargs, error)
                    raise
                check_unchanged((args, kwargs), "the model's forward changes its input")
                if layers.mixes:
                    check_output(output, self.samples)
                loss, aux = loss_and_aux(self._loss_fn(output, target))
                check_unchanged(target, "loss_fn changes its target")
                parts = loss, loss
                if layers.mixes:
                    known = self._fmodel.coupled
                    parts = losses_by_part(self._loss_fn, loss, output, target, grouping.groups, clean, known)
            layers.check_rows()
            moved = stateless.buffers(self._buffers)
            results = Results(loss, *parts, output, aux, moved, record.clean_stats(), record.perturbed_stats())
            scale = self._precision.loss_scale
            return backward(loss if scale is None else loss * scale, detach_if_eager(results))

        return self._fmodel.run({**self._params, **params}, self._buffers, layers, body)

    def _autocast(self) -> AbstractContextManager[Any]:
        dtype = self._precision.autocast
        return nullcontext() if dtype is None else torch.autocast(self.device.type, dtype=dtype)

    def _name_of(self, parameter: nn.Parameter) -> str:
        criterion = self._loss_fn.named_parameters() if isinstance(self._loss_fn, nn.Module) else ()
        found = [f"loss_fn.{name}" for name, own in criterion if own is parameter]
        return self._fmodel.name_of(parameter) or (found or [f"one of shape {tuple(parameter.shape)}"])[0]
