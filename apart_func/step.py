"""The method in two passes: a proxy pass, a perturbation, an adversarial pass, and the weighted sum of both gradients.

    proxy = proxy_pass(fmodel, loss_fn, params, buffers, batch)                        # ∇L_p, and g = ∂L_p/∂δ
    δ     = sign_perturbation(proxy.stats, proxy.stat_grads, epsilon)                  # ε · sign(g)
    θ'    = sam_ascent(params, proxy.grads, rho)                                       # θ; with ρ > 0, APART-SAM
    adver = adversarial_pass(fmodel, loss_fn, θ', buffers, first N samples, δ)         # ∇L_a at δ
    grads = r ∇L_p + (1 − r) ∇L_a                                                      # r = M / (M + N)

`ApartStep._both_passes` is these lines; everything it does can be done by hand with these parts.
"""

from __future__ import annotations  # Dynamo of old versions traces those of inner functions

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from apart_func.batch_norm import statistics_dtype
from apart_func.calls import Begun, Step, find_perturbation, interpolate, joined, split_batch
from apart_func.checks import check_radius
from apart_func.errors import BatchError
from apart_func.functional import FunctionalModel, as_functional
from apart_func.groups import Grouping, Rows, number_of_groups
from apart_func.losses import LossFunction
from apart_func.passes import Pass
from apart_func.rules import Rule, sign_perturbation
from apart_func.samples import cut_batch
from apart_func.settings import Settings, settings_of
from apart_func.trees import (
    PerturbationTree,
    StepOutput,
    Tensors,
    all_finite,
    check_named_tensors,
    dense_values,
    leaves,
)

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def make_apart_step(
    model: nn.Module | FunctionalModel,
    loss_fn: LossFunction,
    *,
    epsilon: float | Tensor = 0.1,
    groups: int = 0,
    ratio: float = 1.0,
    rho: float = 0.0,
    remainder: Literal["error", "drop"] = "error",
    microbatches: int = 1,
    rule: Rule = sign_perturbation,
    rows: Rows | None = None,
    autocast_dtype: torch.dtype | None = None,
    process_group: ProcessGroup | Literal["world", "local"] | None = None,
) -> ApartStep:
    """Make the training step of APART, or of APART-SAM: a pure function of parameters, buffers and batch.

    Args:
        model: a module with BN layers in training mode, or what `functionalize` made of it.
        loss_fn: `(output, target) -> scalar`, or `-> (scalar, aux)`: a pure function, and a mean over samples if r is
            to weigh both passes as the method says.
        epsilon: perturbation radius ε ≥ 0, as a fraction of the statistic; below 1 for a rule of signs.
        groups: ghost groups G of the adversarial pass: 0 and 1 one group, -1 a group for every sample.
        ratio: N = int(ratio · M) of the M samples go through the adversarial pass, the first ones.
        rho: radius ρ ≥ 0 of the weight perturbation, in the norm over all of `params` together: the adversarial pass is
            taken at θ + ρ ∇L_p/‖∇L_p‖ (APART-SAM).
        remainder: what to do if G does not divide N: "error", or "drop" to lower N to a multiple of G.
        microbatches: k parts of the batch, one after another; each runs both passes with its own N and δ.
        rule: makes the perturbation from statistics and their gradients.
        rows: how rows belong to samples in layers that see others than one a sample: "consecutive" (those of a sample
            follow one another), "interleaved" (one of every sample, and again), or a function `(layer, input) -> sample
            of every row`.
        autocast_dtype: dtype of an autocast region around each forward; None opens none.
        process_group: ranks to take the step together with, each with its part of the batch; "world" is all of them.
            Statistics and their gradients are averaged before the rule; gradients, losses and floating buffers at the
            end, both passes together (with ρ > 0 those of the proxy pass before the ascent as well). Ranks weigh alike,
            however many samples they have, and N and r are those of each. None and "local" reduce nothing.

    Returns:
        `apart_step(params, buffers, batch, *, epsilon=None, loss_scale=None, perturbation=None) -> StepOutput`.

    Raises:
        ApartError: a setting is out of range, or the model has no batch norm to perturb.
    """
    settings = settings_of(locals())
    return ApartStep(as_functional(model), loss_fn, settings)


def make_apart_sam_step(
    model: nn.Module | FunctionalModel, loss_fn: LossFunction, *, rho: float = 0.05, **settings: Any
) -> ApartStep:
    """Make the step of APART-SAM: `make_apart_step` with a weight perturbation by default.

    Args:
        model: as in `make_apart_step`, like all that follows.
        loss_fn: likewise.
        rho: radius of the weight perturbation.
        **settings: likewise.
    """
    return make_apart_step(model, loss_fn, rho=rho, **settings)


class ApartStep(Step):
    """One training step of APART as a function of parameters, buffers and a batch; `make_apart_step` makes it.

        out = apart_step(params, buffers, batch)             # a StepOutput: out.grads, out.buffers, out.loss, ...

    It holds a copy of the model without its tensors, the loss, and `settings`; no call changes it, or its arguments. It
    can be copied, pickled, compiled by `torch.compile`, mapped by `torch.func.vmap`, and called from several threads.
    """

    def __call__(
        self,
        params: Tensors,
        buffers: Tensors,
        batch: tuple[Any, Any],
        *,
        epsilon: float | Tensor | None = None,
        loss_scale: float | Tensor | None = None,
        perturbation: PerturbationTree | None = None,
    ) -> StepOutput:
        """Take one step; nothing that goes in is changed.

        Args:
            params: trained tensors by name.
            buffers: all other tensors by name.
            batch: `(input, target)`, pytrees of M samples.
            epsilon: overrides the radius for this call; a 0-d tensor that changes does not recompile.
            loss_scale: factor on both losses during their backward, divided out of all gradients.
            perturbation: δ of the adversarial pass, `(C,)` each, such as `random_signs(...)`; None asks the rule.

        Returns:
            If `all_finite` is False, `buffers` are those that came in.

        Raises:
            ApartError: an argument does not fit the model or the settings; the message says which, and how to mend it.
        """
        begun = self._begin(params, buffers, batch, epsilon, loss_scale, perturbation)
        outputs, moved = [], buffers
        for part in split_batch(batch, self.settings.microbatches):
            outputs.append(self._both_passes(moved, part, perturbation, begun))
            moved = outputs[-1].buffers
        return self._finish(joined(outputs), buffers, begun)

    def _both_passes(
        self, buffers: Tensors, batch: Any, perturbation: PerturbationTree | None, begun: Begun
    ) -> StepOutput:
        """Run the method on a batch or micro-batch."""
        settings, params = self.settings, begun.params
        run = Pass(self.fmodel, self.loss_fn, params, buffers, batch, begun.precision)
        number, zero = num_adversarial(run.samples, settings), run.zero
        proxy = run.at(zero, Grouping(1, run.samples), clean=1, by_shifts=True)
        stat_grads, found = find_perturbation(
            settings.rule, zero, proxy.stats, proxy.stat_grads, begun.radius, begun.ranks, perturbation
        )
        start = sam_ascent(params, begun.ranks.mean_gradients(proxy.grads), settings.rho) if settings.rho else params
        part = cut_batch(batch, 0, number, run.samples)
        second = Pass(self.fmodel, self.loss_fn, start, proxy.buffers, part, begun.precision)
        grouping = Grouping(number_of_groups(settings.groups, number), number, settings.rows)
        adversarial = second.at(found, grouping, clean=0, by_shifts=False)
        grads = interpolate(proxy.grads, adversarial.grads, number / (run.samples + number))
        # A gradient of either pass that is not finite leaves its mark on their sum.
        values = [proxy.loss, adversarial.loss, *grads.values(), *leaves(stat_grads), *leaves(found)]
        return StepOutput(
            grads=grads,
            buffers=proxy.buffers,
            loss=proxy.loss,
            adversarial_loss=adversarial.loss,
            output=proxy.output,
            stats=proxy.stats,
            stat_grads=stat_grads,
            perturbation=found,
            adversarial_stats=adversarial.adversarial_stats,
            all_finite=all_finite(values),
            aux=proxy.aux,
        )


def sam_ascent(params: Mapping[str, Tensor], grads: Mapping[str, Tensor], rho: float) -> Tensors:
    """Climb along the gradient: θ + ρ g/‖g‖, SAM's ascent, with the norm over all tensors together.

    Args:
        params: θ by name.
        grads: g, likewise. Where it is zero, θ comes back.
        rho: radius ρ ≥ 0.

    Example:
        >>> sam_ascent({"weight": torch.zeros(2)}, {"weight": torch.tensor([3.0, 4.0])}, rho=0.5)["weight"]
        tensor([0.3000, 0.4000])
    """
    check_named_tensors("params", params)
    check_named_tensors("grads", grads)
    check_radius("rho", rho)
    values = [dense_values(grads[name]) for name in params]
    squares = [value.to(statistics_dtype(value.dtype)).square().sum() for value in values]
    norm = torch.sqrt(sum(squares, torch.zeros_like(squares[0])))
    length = torch.where(norm > 0, rho / norm, torch.zeros_like(norm))
    return {name: param + length.to(param.real.dtype) * grads[name] for name, param in params.items()}


def num_adversarial(samples: int, settings: Settings) -> int:
    """Return N, how many of the M samples go through the adversarial pass; or raise a BatchError."""
    ratio, groups = settings.ratio, settings.groups
    number = int(ratio * samples)
    if settings.remainder == "drop" and groups > 1:
        number -= number % groups
    if number < 1:
        raise BatchError(
            f"ratio={ratio} and groups={groups} leave no sample of a batch of {samples} for the adversarial pass. "
            "Use a larger batch or ratio, or fewer groups."
        )
    number_of_groups(groups, number, ", another ratio, or remainder='drop'")
    return number
