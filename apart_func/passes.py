"""The passes of the method: functions from parameters, buffers and a batch to losses and gradients.

    proxy_pass        plain training at δ = 0    →  ∇L_p, the statistics, and g = ∂L_p/∂δ
    adversarial_pass  statistics pushed by δ     →  ∇L_a, and ∂L_a/∂δ if it is wanted
    mixed_pass        some ghost groups at 0, the others at δ: both in one forward and backward

All are one forward and backward of the functional model (`Pass`), with another δ, other groups, and other results.
"""

from __future__ import annotations  # Dynamo would trace the annotations of the functions below

from contextlib import nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from apart_func._torch import backward_task, is_differentiated, specialize
from apart_func.autodiff import detach_if_eager, gradients, is_unreached
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
    Tensors,
    copied,
    detached,
    input_and_target,
    replace,
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
    run = _checked(fmodel, loss_fn, params, buffers, batch, precision)
    out = run.at(run.zero, Grouping(1, run.samples), clean=1, by_shifts=True)
    return ProxyOutput(out.loss, out.output, out.grads, out.buffers, out.stats, out.stat_grads, out.aux)


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
    stat_grads: bool = False,
) -> AdversarialOutput:
    """Run a forward and backward with perturbed statistics, in ghost groups. No buffer moves.

    Args:
        fmodel: as in `proxy_pass`, like the next three.
        loss_fn: likewise.
        params: likewise.
        buffers: likewise.
        batch: `(input, target)` with the N samples of this pass.
        perturbation: relative shifts of every BN layer, `(C,)`, or `(groups, C)` for one in each group. `torch.func`
            differentiates the loss by them.
        groups: number of ghost groups; sample i is in group i mod `groups`. 0 and 1 make one group of the whole
            batch, -1 makes a group of every sample.
        rows: how the rows of a layer belong to samples, if there are others than one a sample; see `groups.py`.
        precision: mixed-precision settings.
        stat_grads: whether to differentiate by the perturbation as well, as an ascent of several steps does.
    """
    run = _checked(fmodel, loss_fn, params, buffers, batch, precision)
    grouping = _grouping(run, groups, rows)
    check_perturbation(fmodel.layers, perturbation, grouping.groups)
    out = run.at(perturbation, grouping, clean=0, by_shifts=stat_grads)
    return AdversarialOutput(out.loss, out.output, out.grads, out.adversarial_stats, out.stat_grads, out.aux)


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
        rows: as in `adversarial_pass`.
        precision: mixed-precision settings.
        stat_grads: whether to differentiate by the perturbation as well.
    """
    run = _checked(fmodel, loss_fn, params, buffers, batch, precision)
    grouping = _grouping(run, groups, rows)
    check_clean(clean, grouping.groups)
    check_perturbation(fmodel.layers, perturbation, 1)
    return run.at(in_groups(perturbation, clean, grouping.groups), grouping, clean, by_shifts=stat_grads)


def _checked(
    fmodel: FunctionalModel, loss_fn: LossFunction, params: Tensors, buffers: Tensors, batch: Any, precision: Precision
) -> Pass:
    params = check_call(fmodel, loss_fn, params, buffers)
    return Pass(fmodel, loss_fn, params, buffers, batch, precision)


def _grouping(run: Pass, groups: int, rows: Rows | None) -> Grouping:
    check_groups(groups, run.fmodel.training.layers.values())
    check_rows(rows)
    return Grouping(number_of_groups(groups, run.samples), run.samples, rows)


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
        self.fmodel, self._loss_fn, self._precision = fmodel, loss_fn, precision
        # Of the arguments, params alone are differentiated by, whatever the others require.
        given: Any = buffers, input_and_target(batch)
        self._params, (self._buffers, pair) = params, given if is_differentiated() else detached(given)
        self._inputs, self._target = pair
        self.samples = batch_size(batch)
        self._dtype, self._device = statistics_kind(params)
        specialize([*params.values(), *buffers.values(), *tensors_of(batch)])

    @property
    def zero(self) -> PerturbationTree:
        """No perturbation."""
        return zero_perturbation(self.fmodel.layers, self._dtype, self._device)

    def at(self, shifts: PerturbationTree, grouping: Grouping, clean: int, by_shifts: bool) -> MixedOutput:
        """Run the pass at some shifts, its first groups clean; differentiate by parameters, and by shifts if wanted.

        Without samples of both kinds, both losses are that of the batch.
        """
        compute = partial(self._forward_and_backward, grouping, clean)
        inputs: tuple[Any, ...] = (shifts, self._params)
        if not by_shifts:
            compute, inputs = partial(compute, shifts), (self._params,)
        grads, out = gradients(compute, inputs, self._name_of, self.fmodel.training.proof)
        scale = self._precision.loss_scale
        of_params, of_shifts = grads[-1], grads[0] if by_shifts else {}
        if scale is not None:
            of_params = {name: grad if is_unreached(grad) else grad / scale for name, grad in of_params.items()}
            of_shifts = {name: (mean / scale, var / scale) for name, (mean, var) in of_shifts.items()}
        stat_grads = {name: StatGrads(*pair) for name, pair in of_shifts.items()}
        made: MixedOutput = replace(out, grads=of_params, stat_grads=stat_grads)
        return made

    def _forward_and_backward(
        self, grouping: Grouping, clean: int, shifts: PerturbationTree, params: Tensors, backward: Any
    ) -> Any:
        """Run the model while it holds some parameters and its layers are at some shifts, and go back from its loss."""
        record = Record(clean, self.fmodel.training.replace_buffer, self._dtype)
        layers = PerturbedLayers(shifts, grouping, record, backward_task())
        autocast, scale = self._precision

        def body(stateless: StatelessModule) -> Any:
            # Copies, since a forward may change its input in place, and a loss its target.
            inputs, target = copied((self._inputs, self._target))
            args, kwargs = module_arguments(inputs)
            with nullcontext() if autocast is None else torch.autocast(self._device.type, dtype=autocast):
                try:
                    output = stateless.module(*args, **kwargs)
                except TypeError as error:
                    check_arguments(stateless.module, args, kwargs, error)
                    raise
                advice = "x = x.clone() first, or inplace=False in the first layer"
                check_unchanged((args, kwargs), "the model's forward changes its input", advice)
                if layers.mixes:
                    check_output(output, self.samples)
                loss, aux = loss_and_aux(self._loss_fn(output, target))
                check_unchanged(target, "loss_fn changes its target", "target = target.clone() first")
                parts = loss, loss
                if layers.mixes:
                    known = self.fmodel.coupled
                    parts = losses_by_part(self._loss_fn, loss, output, target, grouping.groups, clean, known)
            layers.check_rows()
            found = loss, parts, output, stateless.buffers(self._buffers), aux
            value, (clean_loss, other_loss), output, moved, aux = detach_if_eager(found)
            stats, others = record.clean_stats(), record.perturbed_stats()  # which are constants already
            out = MixedOutput(clean_loss, other_loss, output, {}, moved, stats, {}, others, value, aux)
            return backward(loss if scale is None else loss * scale, out)

        return self.fmodel.run(params, self._buffers, layers, body)

    def _name_of(self, parameter: nn.Parameter) -> str:
        criterion = self._loss_fn.named_parameters() if isinstance(self._loss_fn, nn.Module) else ()
        found = [f"loss_fn.{name}" for name, own in criterion if own is parameter]
        return self.fmodel.name_of(parameter) or (found or [f"one of shape {tuple(parameter.shape)}"])[0]
