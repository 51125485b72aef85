"""The method in one forward and backward: the perturbation is carried from step to step.

    samples of the first r·G ghost groups    clean: a proxy pass                   →  ∇L_p, g = ∂L_p/∂δ, statistics
    samples of the other groups              at the δ of the step before           →  ∇L_a
    gradient                                 r ∇L_p + (1 − r) ∇L_a, by one backward
    δ for the next step                      ε · sign(g)

Ghost groups share no statistics, so both kinds can stand in one batch. A step costs what plain training costs.
"""

from typing import Any, Protocol

import torch
from torch import Tensor, nn

from apart_func.batch_norm import number_of_groups, over_layers
from apart_func.errors import SettingError
from apart_func.functional import FunctionalModel, LossFunction, functionalize, layer_specs
from apart_func.intercept import training_layers
from apart_func.passes import Precision, mixed_pass, statistics_like, zero_shifts
from apart_func.perturbation import IterativeRule, Rule, check_epsilon, sign_perturbation
from apart_func.pytrees import (
    BatchStats,
    PerturbationTree,
    StatTree,
    StepOutput,
    Tensors,
    batch_size,
    constant,
    merge_trees,
    vectors,
)
from apart_func.step import all_finite, check_microbatches, chosen, over_microbatches, scalar


class OnePassStep(Protocol):
    """One training step as a function; see `make_one_pass_step`."""

    def __call__(
        self,
        params: Tensors,
        buffers: Tensors,
        batch: tuple[Any, Any],
        perturbation: PerturbationTree,
        *,
        epsilon: float | Tensor | None = None,
        loss_scale: float | Tensor | None = None,
    ) -> StepOutput:
        """Take one step.

        Args:
            params: trained tensors by name.
            buffers: all other tensors by name.
            batch: `(input, target)`, pytrees of M samples.
            perturbation: δ of this step, `(C,)` each: `init_perturbation(model)`, then `out.perturbation`.
            epsilon: overrides the radius of the next perturbation; a 0-d tensor that changes does not recompile.
            loss_scale: factor on the loss during its backward, divided out of all gradients.

        Returns:
            Where `all_finite` is False, `buffers` and `perturbation` are those that came in.
        """


def make_one_pass_step(
    model: nn.Module | FunctionalModel,
    loss_fn: LossFunction,
    *,
    epsilon: float | Tensor,
    groups: int,
    clean_fraction: float = 0.5,
    microbatches: int = 1,
    rule: Rule = sign_perturbation,
    autocast_dtype: torch.dtype | None = None,
) -> OnePassStep:
    """Make a training step of APART that costs one pass: a pure function of parameters, buffers, batch and δ.

    Running statistics advance by those of the clean samples, all of their groups together: perturbed samples would
    move them towards activations that evaluation never sees.

    Args:
        model: a module with BN layers in training mode, or what `functionalize` made of it.
        loss_fn: `(output, target) -> scalar`. It is called twice, with the clean samples and with the others.
        epsilon: perturbation radius ε ≥ 0, as a fraction of the statistic.
        groups: ghost groups G ≥ 2 of the batch; -1 is a group for every sample.
        clean_fraction: share r of the groups that are clean, rounded to whole groups: at least one, less than all.
        microbatches: k parts of the batch, one after another, each in G groups. All run under the same perturbation,
            and the next one comes from the mean of their statistic gradients.
        rule: makes the next perturbation from the clean statistics and their gradients.
        autocast_dtype: dtype of an autocast region around each forward; None opens none.

    Returns:
        `one_pass_step(params, buffers, batch, perturbation, *, epsilon=None, loss_scale=None) -> StepOutput`.

    Raises:
        ApartError: a setting is out of range, or the model has no batch norm to perturb.
    """
    fmodel = model if isinstance(model, FunctionalModel) else functionalize(model)
    check_epsilon(epsilon)
    check_microbatches(microbatches)
    if isinstance(rule, IterativeRule):
        raise rule.refusal()
    if groups != -1:
        clean_groups(clean_fraction, groups)
    default_epsilon = epsilon

    def one_batch(
        params: Tensors,
        buffers: Tensors,
        batch: tuple[Any, Any],
        perturbation: PerturbationTree,
        radius: Tensor,
        precision: Precision,
    ) -> StepOutput:
        parts = number_of_groups(groups, batch_size(batch))
        clean = clean_groups(clean_fraction, parts)
        mixed = mixed_pass(
            fmodel, loss_fn, params, buffers, batch, perturbation, groups=parts, clean=clean, precision=precision
        )
        stat_grads = clean_stat_grads(mixed.stat_grads, clean)
        values = [mixed.loss, mixed.adversarial_loss, radius, *mixed.grads.values(), *vectors(stat_grads)]
        return StepOutput(
            grads=mixed.grads,
            buffers=mixed.buffers,
            loss=mixed.loss,
            adversarial_loss=mixed.adversarial_loss,
            output=mixed.output,
            stats=mixed.stats,
            stat_grads=stat_grads,
            perturbation=perturbation,
            all_finite=all_finite(values) & (radius >= 0),
        )

    def one_pass_step(
        params: Tensors,
        buffers: Tensors,
        batch: tuple[Any, Any],
        perturbation: PerturbationTree,
        *,
        epsilon: float | Tensor | None = None,
        loss_scale: float | Tensor | None = None,
    ) -> StepOutput:
        if epsilon is not None:
            check_epsilon(epsilon)
        like = statistics_like({**params, **buffers})
        radius = scalar(default_epsilon if epsilon is None else epsilon, like.dtype, like.device)
        precision = Precision(
            autocast_dtype, None if loss_scale is None else scalar(loss_scale, torch.float32, like.device)
        )
        before = constant(perturbation)
        out = over_microbatches(
            lambda moved, part: one_batch(params, moved, part, before, radius, precision), buffers, batch, microbatches
        )
        stat_grads = out.stat_grads if microbatches == 1 else merge_trees([out.stat_grads], lambda one: one[0].mean(0))
        after = constant(rule(out.stats, stat_grads, radius))
        return out._replace(perturbation=chosen(out.all_finite, after, before))

    return one_pass_step


def init_perturbation(model: nn.Module) -> PerturbationTree:
    """The perturbation of a first step: zero for every BN layer in training mode, `(C,)` each.

    Raises:
        ModelError: there is no such layer.
    """
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return zero_shifts(layer_specs(training_layers(model)), statistics_like(tensors))


def clean_groups(clean_fraction: float, groups: int) -> int:
    """How many of G ghost groups are clean.

    Raises:
        SettingError: that would be none or all of them.
    """
    clean = round(clean_fraction * groups) if 0 < clean_fraction < 1 else 0
    if not 0 < clean < groups:
        raise SettingError(
            f"groups={groups} and clean_fraction={clean_fraction} make {clean} clean groups; expected at least one, "
            "and one that is not. Use groups=2 or more, and a fraction such as 0.5."
        )
    return clean


def clean_stat_grads(stat_grads: StatTree, clean: int) -> StatTree:
    """∂L_p/∂δ, `(C,)`, from gradients of the whole batch's loss by the shifts of every group, `(G, C)`."""

    def of_layer(mean: Tensor, var: Tensor) -> tuple[Tensor, ...]:
        share = clean / mean.shape[0]
        return mean[:clean].sum(0) / share, var[:clean].sum(0) / share

    sums = over_layers(of_layer, list(stat_grads.values()), [()] * len(stat_grads))
    return {layer: BatchStats(*pair) for layer, pair in zip(stat_grads, sums, strict=True)}
