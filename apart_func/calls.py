"""What the steps share: what a call checks, how a rule is asked, and how a batch is taken in micro-batches."""

from __future__ import annotations  # Dynamo of old versions traces those of inner functions

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from apart_func._torch import Constants
from apart_func.autodiff import is_unreached
from apart_func.checks import check_epsilon, check_layers, check_perturbation, scalar
from apart_func.errors import BatchError
from apart_func.functional import FunctionalModel, check_call
from apart_func.losses import LossFunction, check_loss_function
from apart_func.passes import Precision
from apart_func.ranks import (
    ConsistencyCheck,
    Ranks,
    check_groups,
    described_batch,
    described_state,
    described_values,
    group_of,
)
from apart_func.rules import Rule, kind_of
from apart_func.samples import batch_size, cut_batch
from apart_func.settings import Settings
from apart_func.trees import (
    PerturbationTree,
    StatGrads,
    StatGradTree,
    StatTree,
    StepOutput,
    Tensors,
    concatenate,
    detach_perturbation,
    leaves,
    replace,
    stack_by_layer,
    statistics_kind,
    where_tree,
)


class Begun(NamedTuple):
    """What a step knows once its arguments are checked."""

    params: Tensors
    radius: Tensor  # ε, 0-d
    is_valid: Tensor  # whether it is one, 0-d bool, if its value cannot be read
    precision: Precision
    ranks: Ranks


class Step:
    """What the steps have in common: a functional model, a loss, and settings. A value: it can be copied and pickled.

    Attributes:
        fmodel: the model as a function.
        loss_fn: `(output, target) -> scalar`, or `-> (scalar, aux)`.
    """

    def __init__(self, fmodel: FunctionalModel, loss_fn: LossFunction, settings: Settings) -> None:
        check_loss_function(loss_fn)
        self.fmodel, self.loss_fn = fmodel, loss_fn
        self._constants: Any = Constants(settings=settings)
        self._check = ConsistencyCheck()

    @property
    def settings(self) -> Settings:
        """What the step does."""
        settings: Settings = self._constants.settings
        return settings

    def __repr__(self) -> str:
        loss = getattr(self.loss_fn, "__name__", type(self.loss_fn).__name__)
        return f"{type(self).__name__}({self.fmodel!r}, {loss}, {self.settings})"

    def _begin(
        self, params: Tensors, buffers: Tensors, batch: Any, epsilon: Any, loss_scale: Any, perturbation: Any
    ) -> Begun:
        """Check, once a step, all that a call is given; `perturbation` is None if it is not."""
        settings, fmodel, is_bounded = self.settings, self.fmodel, kind_of(self.settings.rule).is_bounded
        params = check_call(fmodel, self.loss_fn, params, buffers)
        check_groups(settings.groups, fmodel.training.layers.values())
        if epsilon is not None:
            check_epsilon(epsilon, is_bounded)
        if perturbation is not None:
            check_perturbation(fmodel.layers, perturbation, 1)
        dtype, device = statistics_kind(params)
        radius = scalar(settings.epsilon if epsilon is None else epsilon, "epsilon", dtype, device)
        scale = None if loss_scale is None else scalar(loss_scale, "loss_scale", torch.float32, device)
        ranks = Ranks(group_of(settings.process_group))
        ranks.check(
            self._check,
            lambda: {
                "the settings": f"{type(self).__name__}: {settings.described()}",
                "the names, shapes and dtypes of params": described_state(params),
                "the names, shapes and dtypes of buffers": described_state(buffers),
                "the batch-norm layers": repr(list(fmodel.layers)),
                "the values of params and buffers": described_values([*params.values(), *buffers.values()]),
                "the values of the perturbation": described_values(leaves(perturbation or {})),
                "the tensors of the batch": described_batch(batch),
            },
        )
        is_valid = (radius >= 0) & (radius < (1 if is_bounded else torch.inf))
        return Begun(params, radius, is_valid, Precision(settings.autocast_dtype, scale), ranks)

    def _finish(self, out: StepOutput, buffers: Tensors, begun: Begun) -> StepOutput:
        """Make one output of those of all ranks; one that is not finite gets the old buffers."""
        out = replace(out, all_finite=out.all_finite & begun.is_valid)
        out = begun.ranks.mean_output(out, buffers, self.fmodel.training.constants.moving)
        return replace(out, buffers=where_tree(out.all_finite, out.buffers, dict(buffers)))


def find_perturbation(
    rule: Rule,
    before: PerturbationTree,
    stats: StatTree,
    stat_grads: StatGradTree,
    radius: Tensor,
    ranks: Ranks,
    given: PerturbationTree | None = None,
) -> tuple[StatGradTree, PerturbationTree]:
    """Ask a rule for the perturbation of the layers that were called; the others keep the one that they had `before`.

    Returns the statistic gradients, averaged over ranks, and the perturbation, which nothing is differentiated by. One
    that is `given` is taken instead of the rule's.
    """
    called, stat_grads = ranks.called_layers(stats, stat_grads)
    if given is not None:
        return stat_grads, detach_perturbation(given)
    if not called.stat_grads:
        return stat_grads, before
    of_batch = {  # the mean over its micro-batches
        layer: g if g.mean.dim() == 1 else StatGrads(g.mean.mean(0), g.scale.mean(0))
        for layer, g in called.stat_grads.items()
    }
    found = rule(called.stats, of_batch, radius)
    check_layers(called.stat_grads, found)
    found = detach_perturbation(found)
    return stat_grads, called.update(before, ranks.of_first(found) if kind_of(rule).draws else found)


def split_batch(batch: Any, parts: int) -> list[Any]:
    """Cut a batch into equal parts, or raise a BatchError if there are none."""
    if parts == 1:
        return [batch]
    samples = batch_size(batch)
    if samples % parts:
        problem = f"microbatches={parts} does not divide the batch of {samples} samples"
        raise BatchError(f"{problem}. Use a divisor, and drop_last=True in the data loader.")
    size = samples // parts
    return [cut_batch(batch, start, start + size, samples) for start in range(0, samples, size)]


def joined(outputs: Sequence[StepOutput]) -> StepOutput:
    """Make one output of those of micro-batches: means of losses and gradients, the rest joined."""
    if len(outputs) == 1:
        return outputs[0]
    grads = outputs[0].grads
    for count, out in enumerate(outputs[1:], 2):
        grads = interpolate(grads, out.grads, 1 / count)
    of: dict[str, Any] = dict(zip(StepOutput._fields, zip(*outputs, strict=True), strict=True))
    joined: dict[str, Any] = {name: torch.stack(of[name]).mean() for name in ("loss", "adversarial_loss")}
    joined |= {"output": concatenate(of["output"]), "aux": concatenate(of["aux"], lists_numbers=True)}
    joined |= {name: stack_by_layer(of[name]) for name in ("stats", "stat_grads", "perturbation", "adversarial_stats")}
    finite = torch.stack(of["all_finite"]).all()
    return StepOutput(grads=grads, buffers=outputs[-1].buffers, all_finite=finite, **joined)


def interpolate(start: Tensors, end: Tensors, weight: float) -> Tensors:
    """Return (1 − weight) · start + weight · end; what neither loss reaches stays so."""

    def between(one: Tensor, other: Tensor) -> Tensor:
        if is_unreached(one) and is_unreached(other):
            return one
        if one.is_sparse or other.is_sparse:
            return one * (1 - weight) + other * weight
        return torch.lerp(one, other, weight)

    return {name: between(grad, end[name]) for name, grad in start.items()}
