"""The method in one forward and backward, on a batch of which a part is perturbed.

    samples of the first r·G ghost groups    clean: a proxy pass        →  ∇L_p, g = ∂L_p/∂δ, statistics
    samples of the other groups              at δ                       →  ∇L_a
    gradient                                 r ∇L_p + (1 − r) ∇L_a, by one backward

Ghost groups share no statistics, so both kinds can stand in one batch. A step costs what plain training costs. Its δ
has to be there before its gradients are: random signs, drawn in the step; or ε · sign(g), of the step before.
"""

from __future__ import annotations  # Dynamo of old versions traces those of inner functions

from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from apart_func.distributed import of_first_rank
from apart_func.errors import SettingError, StateError
from apart_func.functional import FunctionalModel, LossFunction, as_functional, check_model, named_tensors
from apart_func.intercept import training_layers
from apart_func.layer.rows import Rows, number_of_groups
from apart_func.passes import Precision, check_perturbation, mixed_pass, statistics_like, zero_shifts
from apart_func.rules import IterativeRule, Rule, is_drawn, may_draw, random_sign_perturbation
from apart_func.settings import Settings
from apart_func.step import Step, chosen, found_perturbation, over_microbatches
from apart_func.trees import (
    PerturbationTree,
    StatGrads,
    StatGradTree,
    StepOutput,
    Tensors,
    all_finite,
    batch_size,
    check_by_name,
    constant,
    replaced,
    vectors,
)

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def make_one_pass_step(
    model: nn.Module | FunctionalModel,
    loss_fn: LossFunction,
    *,
    epsilon: float | Tensor,
    groups: int,
    clean_fraction: float = 0.5,
    microbatches: int = 1,
    rule: Rule = random_sign_perturbation,
    rows: Rows | None = None,
    autocast_dtype: torch.dtype | None = None,
    process_group: ProcessGroup | Literal["world", "local"] | None = None,
) -> OnePassStep:
    """Make a training step of APART that costs one pass: a pure function of parameters, buffers and batch.

    Running statistics advance by those of the clean samples, all of their groups together: perturbed samples would
    move them towards activations that evaluation never sees.

    Args:
        model: a module with BN layers in training mode, or what `functionalize` made of it.
        loss_fn: `(output, target) -> scalar`. It is called twice, with the clean samples and with the others.
        epsilon: perturbation radius ε ≥ 0, as a fraction of the statistic; below 1 for a rule of signs. Random signs
            want about twice the radius of those of the gradient: try 0.1 to 0.4.
        groups: ghost groups G ≥ 2 of the batch; -1 is a group for every sample.
        clean_fraction: share r of the groups that are clean, rounded to whole groups: at least one, less than all.
        microbatches: k parts of the batch, one after another, each in G groups. All run under the same perturbation,
            and the next one comes from the mean of their statistic gradients.
        rule: makes the perturbation. Random signs need nothing but the radius. Any other rule, as `sign_perturbation`,
            makes that of the next step from the clean statistics and their gradients.
        rows: how rows belong to samples in layers that see others than one a sample, as in `make_apart_step`.
        autocast_dtype: dtype of an autocast region around each forward; None opens none.
        process_group: ranks to take the step together with, as in `make_apart_step`.

    Returns:
        `one_pass_step(params, buffers, batch, perturbation="drawn", *, epsilon=None, loss_scale=None) -> StepOutput`.

    Raises:
        ApartError: a setting is out of range, or the model has no batch norm to perturb.
    """
    settings = Settings(
        epsilon=epsilon,
        groups=groups,
        clean_fraction=clean_fraction,
        microbatches=microbatches,
        rule=rule,
        rows=rows,
        autocast_dtype=autocast_dtype,
        process_group=process_group,
    )
    if isinstance(rule, IterativeRule):
        raise rule.refusal()
    if groups != -1:
        clean_groups(clean_fraction, groups)
    fmodel = as_functional(model)
    fmodel.check_unmixed()
    return OnePassStep(fmodel, loss_fn, settings)


class OnePassStep(Step):
    """One training step of APART in one pass, as a function; `make_one_pass_step` makes it.

        out = one_pass_step(params, buffers, batch)
        out = one_pass_step(params, buffers, batch, perturbation)      # of other rules; the next is out.perturbation

    Like an `ApartStep` it is a value, and no call changes it, or its arguments.
    """

    def __call__(
        self,
        params: Tensors,
        buffers: Tensors,
        batch: tuple[Any, Any],
        perturbation: PerturbationTree | Literal["drawn"] = "drawn",
        *,
        epsilon: float | Tensor | None = None,
        loss_scale: float | Tensor | None = None,
    ) -> StepOutput:
        """Take one step; nothing that goes in is changed.

        Args:
            params: trained tensors by name.
            buffers: all other tensors by name.
            batch: `(input, target)`, pytrees of M samples.
            perturbation: δ of this step, `(C,)` each. Random signs are drawn here; other rules want
                `init_perturbation(model)` in the first step, then `out.perturbation`.
            epsilon: overrides the radius of the perturbation that is drawn or found; a 0-d tensor that changes does not
                recompile.
            loss_scale: factor on the loss during its backward, divided out of all gradients.

        Returns:
            Where `all_finite` is False, `buffers` and `perturbation` are those that came in. Layers that the forward
            does not call keep their perturbation.

        Raises:
            ApartError: an argument does not fit the model or the settings; the message says which, and how to mend it.
        """
        radius, precision, in_range = self._call_settings(params, buffers, epsilon, loss_scale)
        is_given = not isinstance(perturbation, str)
        if perturbation == "drawn":
            group = self._ranks(params, buffers, batch, {})
            before = self._drawn({**params, **buffers}, radius, group)
        else:
            check_perturbation(self.fmodel.layers, perturbation, 1)
            before = constant(perturbation)
            group = self._ranks(params, buffers, batch, before)
        out = over_microbatches(
            lambda moved, part: self._one_batch(params, moved, part, before, precision),
            buffers,
            batch,
            self.settings.microbatches,
            self._over_ranks(buffers, group),
        )
        stat_grads, after = found_perturbation(
            before,
            out.stats,
            out.stat_grads,
            lambda stats, grads: (
                self.settings.rule(stats, grads, radius) if is_given else {layer: before[layer] for layer in grads}
            ),
            group,
            is_given and may_draw(self.settings.rule),
        )
        finite = out.all_finite & in_range & all_finite(vectors(after))
        return replaced(
            out,
            buffers=chosen(finite, out.buffers, dict(buffers)),
            stat_grads=stat_grads,
            perturbation=chosen(finite, after, before),
            all_finite=finite,
        )

    def _drawn(self, tensors: Tensors, radius: Tensor, group: ProcessGroup | None) -> PerturbationTree:
        """The perturbation of a step that carries none, the same on all ranks.

        Raises:
            StateError: the rule finds it from gradients.
        """
        if not is_drawn(self.settings.rule):
            raise StateError(
                "the step got no perturbation, and its rule finds one from the gradients of the step before. Pass "
                "init_perturbation(model) to the first step, and out.perturbation to the next; or take "
                "rule=random_sign_perturbation, the default, which needs none."
            )
        return drawn_perturbation(
            self.settings.rule, zero_shifts(self.fmodel.layers, statistics_like(tensors)), radius, group
        )

    def _one_batch(
        self, params: Tensors, buffers: Tensors, batch: Any, perturbation: PerturbationTree, precision: Precision
    ) -> StepOutput:
        settings = self.settings
        groups = number_of_groups(settings.groups, batch_size(batch))
        clean = clean_groups(settings.clean_fraction, groups)
        mixed = mixed_pass(
            self.fmodel,
            self.loss_fn,
            params,
            buffers,
            batch,
            perturbation,
            groups=groups,
            clean=clean,
            rows=settings.rows,
            precision=precision,
        )
        stat_grads = clean_stat_grads(mixed.stat_grads, clean)
        return StepOutput(
            grads=mixed.grads,
            buffers=mixed.buffers,
            loss=mixed.loss,
            adversarial_loss=mixed.adversarial_loss,
            output=mixed.output,
            stats=mixed.stats,
            stat_grads=stat_grads,
            perturbation=perturbation,
            all_finite=all_finite([mixed.loss, mixed.adversarial_loss, *mixed.grads.values(), *vectors(stat_grads)]),
        )


def init_perturbation(model: nn.Module) -> PerturbationTree:
    """The perturbation of a first step, for rules of gradients: zero for every BN layer in training mode, `(C,)` each.

    Raises:
        ModelError: there is no such layer.
    """
    check_model(model)
    layers = {name: layer.num_features for name, layer in training_layers(model).items()}
    return zero_shifts(layers, statistics_like(dict(named_tensors(model))))


def drawn_perturbation(
    rule: Rule, like: PerturbationTree, epsilon: Tensor, group: ProcessGroup | None
) -> PerturbationTree:
    """The perturbation of a rule that asks no gradient, the same on all ranks.

    Args:
        rule: one that `is_drawn`.
        like: a perturbation of the layers, for shapes, dtypes and devices.
        epsilon: perturbation radius, 0-d.
        group: the ranks that draw one perturbation together.
    """
    drawn = rule({}, {layer: StatGrads(*shift) for layer, shift in like.items()}, epsilon)
    return drawn if group is None else of_first_rank(drawn, group)


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


def clean_stat_grads(stat_grads: StatGradTree, clean: int) -> StatGradTree:
    """∂L_p/∂δ, `(C,)`, from gradients of the whole batch's loss by the shifts of every group, `(G, C)`.

    Args:
        stat_grads: of a `mixed_pass`.
        clean: how many of the groups were clean, the first ones.
    """
    check_by_name("stat_grads", stat_grads)
    counts = [mean.shape[0] if mean.dim() == 2 else 0 for mean, _ in stat_grads.values()]
    groups = min(counts) if counts else 0
    if not isinstance(clean, int) or isinstance(clean, bool) or not 0 < clean <= groups:
        raise SettingError(f"clean={clean!r} of {groups} groups; expected at least one, and no more than there are.")

    share = clean / groups
    return {
        layer: StatGrads(mean[:clean].sum(0) / share, scale[:clean].sum(0) / share)
        for layer, (mean, scale) in stat_grads.items()
    }
