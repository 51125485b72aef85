"""The method in one pass: a forward and backward on a batch of which a part is perturbed.

    samples of the first r·G ghost groups    clean: a proxy pass        →  ∇L_p, statistics
    samples of the other groups              at δ                       →  ∇L_a
    gradient                                 r ∇L_p + (1 − r) ∇L_a, by one backward of the batch's loss

Ghost groups share no statistics, so both kinds can stand in one batch. A step costs what plain training costs. Its δ
has to be there before its gradients are: random signs, drawn in the step or given; or ε · sign(g), of the step before.
"""

from __future__ import annotations  # Dynamo of old versions traces those of inner functions

from types import EllipsisType
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from apart_func.calls import Begun, Step, find_perturbation, joined, split_batch
from apart_func.checks import clean_groups, is_count
from apart_func.errors import SettingError, StateError
from apart_func.functional import FunctionalModel, as_functional
from apart_func.groups import Grouping, Rows, number_of_groups
from apart_func.intercept import check_unmixed
from apart_func.layers import in_groups
from apart_func.losses import LossFunction
from apart_func.passes import Pass
from apart_func.ranks import Ranks
from apart_func.rules import Rule, kind_of, random_sign_perturbation
from apart_func.settings import settings_of
from apart_func.trees import (
    PerturbationTree,
    StatGrads,
    StatGradTree,
    StepOutput,
    Tensors,
    all_finite,
    check_named_tensors,
    detach_perturbation,
    leaves,
    replace,
    statistics_kind,
    where_tree,
    zero_perturbation,
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
        loss_fn: `(output, target) -> scalar`, or `-> (scalar, aux)`: a pure function. The loss of the whole batch is
            differentiated, whatever kind of mean it is; those of the clean samples and of the others are reported.
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
        `one_pass_step(params, buffers, batch, [perturbation], *, epsilon=None, loss_scale=None) -> StepOutput`.

    Raises:
        ApartError: a setting is out of range, or the model has no batch norm to perturb.
    """
    settings = settings_of(locals())
    if groups != -1:
        clean_groups(clean_fraction, groups)
    fmodel = as_functional(model)
    check_unmixed(fmodel.training.module)
    return OnePassStep(fmodel, loss_fn, settings)


class OnePassStep(Step):
    """One training step of APART in one pass, as a function; `make_one_pass_step` makes it.

        out = one_pass_step(params, buffers, batch)
        out = one_pass_step(params, buffers, batch, perturbation)      # given; of rules of gradients, out.perturbation

    Like an `ApartStep` it is a value, and no call changes it, or its arguments.
    """

    def __call__(
        self,
        params: Tensors,
        buffers: Tensors,
        batch: tuple[Any, Any],
        perturbation: PerturbationTree | EllipsisType = ...,
        *,
        epsilon: float | Tensor | None = None,
        loss_scale: float | Tensor | None = None,
    ) -> StepOutput:
        """Take one step; nothing that goes in is changed.

        Args:
            params: trained tensors by name.
            buffers: all other tensors by name.
            batch: `(input, target)`, pytrees of M samples.
            perturbation: δ of this step, `(C,)` each. Without it, a rule that needs no gradients draws one. Other rules
                want `init_perturbation(model)` in the first step, then `out.perturbation`.
            epsilon: overrides the radius of the perturbation that is drawn or found; a 0-d tensor that changes does not
                recompile.
            loss_scale: factor on the loss during its backward, divided out of all gradients.

        Returns:
            If `all_finite` is False, `buffers` and `perturbation` are those that came in. Layers that the forward does
            not call keep their perturbation. `stat_grads` is empty if the perturbation was drawn.

        Raises:
            ApartError: an argument does not fit the model or the settings; the message says which, and how to mend it.
        """
        rule, is_given, kind = self.settings.rule, perturbation is not ..., kind_of(self.settings.rule)
        if not is_given and kind.needs_gradients:
            raise StateError(
                "the step got no perturbation, and its rule finds one from the gradients of the step before. Pass "
                "init_perturbation(model) to the first step, and out.perturbation to the next; or take "
                "rule=random_sign_perturbation, the default, which needs none."
            )
        if perturbation is None:  # a mistake, and no request to draw
            raise SettingError("the perturbation is None; expected a dict by layer, or no argument, which draws one.")
        given: Any = perturbation if is_given else None
        begun = self._begin(params, buffers, batch, epsilon, loss_scale, given)
        if is_given:
            before = detach_perturbation(given)
        else:
            zero = zero_perturbation(self.fmodel.layers, *statistics_kind(params))
            before = draw_perturbation(rule, zero, begun.radius, begun.ranks)
        outputs, moved = [], buffers
        for part in split_batch(batch, self.settings.microbatches):
            outputs.append(self._mixed_pass(moved, part, before, is_given, begun))
            moved = outputs[-1].buffers
        out = replace(joined(outputs), perturbation=before)
        if is_given:
            known = None if kind.needs_gradients else before
            stat_grads, after = find_perturbation(
                rule, before, out.stats, out.stat_grads, begun.radius, begun.ranks, known
            )
            finite = out.all_finite & all_finite(leaves(after))
            out = replace(out, stat_grads=stat_grads, perturbation=after, all_finite=finite)
        out = self._finish(out, buffers, begun)
        return replace(out, perturbation=where_tree(out.all_finite, out.perturbation, before))

    def _mixed_pass(
        self, buffers: Tensors, batch: Any, perturbation: PerturbationTree, by_perturbation: bool, begun: Begun
    ) -> StepOutput:
        """Run the method on a batch or micro-batch."""
        settings = self.settings
        run = Pass(self.fmodel, self.loss_fn, begun.params, buffers, batch, begun.precision)
        groups = number_of_groups(settings.groups, run.samples)
        clean = clean_groups(settings.clean_fraction, groups)
        grouping = Grouping(groups, run.samples, settings.rows)
        mixed = run.at(in_groups(perturbation, clean, groups), grouping, clean, by_perturbation)
        stat_grads = clean_stat_grads(mixed.stat_grads, clean) if by_perturbation else {}
        values = [mixed.batch_loss, *mixed.grads.values(), *leaves(stat_grads), *leaves(perturbation)]
        return StepOutput(
            grads=mixed.grads,
            buffers=mixed.buffers,
            loss=mixed.loss,
            adversarial_loss=mixed.adversarial_loss,
            output=mixed.output,
            stats=mixed.stats,
            stat_grads=stat_grads,
            perturbation=perturbation,
            adversarial_stats=mixed.adversarial_stats,
            all_finite=all_finite(values),
            aux=mixed.aux,
        )


def draw_perturbation(rule: Rule, layers: PerturbationTree, epsilon: Tensor, ranks: Ranks) -> PerturbationTree:
    """Draw the perturbation of a rule that needs no gradients, of the shapes of `layers`, the same on all ranks."""
    drawn = rule({}, {layer: StatGrads(*shift) for layer, shift in layers.items()}, epsilon)
    return ranks.of_first(detach_perturbation(drawn))


def clean_stat_grads(stat_grads: StatGradTree, clean: int) -> StatGradTree:
    """Compute ∂L_p/∂δ, `(C,)`, from gradients of the whole batch's loss by the shifts of every group, `(G, C)`.

    Args:
        stat_grads: of a `mixed_pass`.
        clean: how many of the groups were clean, the first ones.
    """
    check_named_tensors("stat_grads", stat_grads)
    counts = [mean.shape[0] if mean.dim() == 2 else 0 for mean, _ in stat_grads.values()]
    groups = min(counts) if counts else 0
    if not is_count(clean) or not 0 < clean <= groups:
        raise SettingError(f"clean={clean!r} of {groups} groups; expected at least one, and no more than there are.")
    share = clean / groups
    return {
        layer: StatGrads(mean[:clean].sum(0) / share, scale[:clean].sum(0) / share)
        for layer, (mean, scale) in stat_grads.items()
    }
