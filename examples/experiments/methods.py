"""The methods as training steps of one form: `make_step(model, settings)`.

    plain          one forward and backward                      its gradient
    apart          a second one with perturbed statistics        the weighted sum of both
    one_pass       some groups of the batch perturbed            the weighted sum of both, by one backward
    apart_sam      apart, with the second one at θ + ρ ∇L/‖∇L‖   the weighted sum of both
    sam, sam_on, momentum_sam, ghost_noise                       see rivals.py

`step(params, buffers, batch, carried)` is pure whatever the method is: gradients, new buffers and what the next step
gets as `carried` come out.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from apart_func import (
    Rule,
    StepOutput,
    Tensors,
    init_perturbation,
    l2_perturbation,
    make_apart_sam_step,
    make_apart_step,
    make_one_pass_step,
    multi_step,
    random_sign_perturbation,
    sign_perturbation,
)
from experiments import ranks, rivals
from experiments.settings import MethodName, MethodSettings, RuleName, SettingsError

Batch = tuple[Tensor, Tensor]
Carried = dict[str, Any]  # tensors, or tuples of them, by name

# What the forward-backward passes of a step are called, in their order.
PASSES: dict[MethodName, tuple[str, ...]] = {
    "plain": ("training",),
    "apart": ("proxy", "adversarial"),
    "one_pass": ("training",),
    "apart_sam": ("proxy", "adversarial"),
    "sam": ("first", "second"),
    "sam_on": ("first", "second"),
    "momentum_sam": ("training",),
    "ghost_noise": ("training",),
}

# Settings that only some methods read; the others concern all.
_APART = ("apart", "one_pass", "apart_sam")
_TWO_PASSES = tuple(name for name, passes in PASSES.items() if len(passes) == 2)
READ_BY: dict[str, tuple[str, ...]] = {
    "method.epsilon": _APART,
    "method.epsilon_schedule": _APART,
    "method.rule": _APART,
    "method.groups": _APART,
    "method.ascent_steps": ("apart", "apart_sam"),
    "method.clean_fraction": ("one_pass",),
    "method.ratio": ("apart", "apart_sam"),
    "method.remainder": ("apart", "apart_sam"),
    "method.rho": ("apart_sam", "sam", "sam_on", "momentum_sam"),
    "method.norm": ("sam_on",),
    "method.ghost_size": ("ghost_noise",),
    "method.every": _TWO_PASSES,
    "method.microbatches": _APART,
}

# The rule that a method has where none is said, if it is not that of the settings.
OWN_RULES: dict[str, RuleName] = {"one_pass": "random_sign"}

ONE_GRADIENT_RULES: dict[str, Rule] = {
    "sign": sign_perturbation,
    "random_sign": random_sign_perturbation,
    "l2": l2_perturbation,
}


class Step(Protocol):
    """One training step as a pure function."""

    def __call__(
        self, params: Tensors, buffers: Tensors, batch: Batch, carried: Carried, *, epsilon: Tensor | None = None
    ) -> tuple[StepOutput, Carried]:
        """Take one step.

        Args:
            params: trained tensors by name.
            buffers: all other tensors by name.
            batch: samples and labels.
            carried: `initially_carried`, then what the step before returned.
            epsilon: 0-d, another radius than that of the settings; those who have none leave it unread.

        Returns:
            The output as `apart_func` has it, and what is carried to the next step. `adversarial_loss` is that of the
            second pass or the perturbed groups, NaN where there is neither; the trees of statistics are empty but for
            APART.
        """


def passes_of(settings: MethodSettings) -> tuple[str, ...]:
    """What the passes of a step are called, with those that a rule of several steps adds."""
    passes = PASSES[settings.name]
    if settings.rule != "multi_step" or "adversarial" not in passes:
        return passes
    return (passes[0], *["ascent"] * (settings.ascent_steps - 1), passes[-1])


def initially_carried(model: nn.Module, settings: MethodSettings) -> Carried:
    """What the first step carries: zeros for a perturbation or a momentum, and nothing for the other methods."""
    if settings.name == "one_pass" and settings.rule != "random_sign":  # which draws in every step
        return init_perturbation(model)
    if settings.name == "momentum_sam":
        trained = ((name, param) for name, param in model.named_parameters() if param.requires_grad)
        return {name: torch.zeros_like(param) for name, param in trained}
    return {}


def is_plain_step(settings: MethodSettings, number: int, done: float) -> bool:
    """Whether a step is a plain one for once."""
    skipped = settings.name in READ_BY["method.every"] and number % settings.every != 0
    too_early = settings.epsilon_schedule == "late" and settings.name in _APART and done < 2 / 3
    return skipped or too_early


def radius(settings: MethodSettings, done: float) -> float | None:
    """The radius ε at a point of the run, from 0 to 1; None where it is always the same."""
    if settings.name not in _APART or settings.epsilon_schedule in ("constant", "late"):
        return None
    return settings.epsilon * (done if settings.epsilon_schedule == "rising" else 1 - done)


def make_step(
    model: nn.Module, settings: MethodSettings, autocast_dtype: torch.dtype | None = None, momentum: float = 0.9
) -> Step:
    """Make the training step of a method, with cross-entropy as the loss.

    Raises:
        ApartError: a setting is out of range, or the network has no batch norm to perturb.
        SettingsError: likewise, of what is written here.
    """
    loss_fn: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy
    if settings.label_smoothing:
        loss_fn = partial(F.cross_entropy, label_smoothing=settings.label_smoothing)
    if settings.name not in _APART:
        if settings.microbatches > 1:
            raise SettingsError(f"micro-batches are APART's: {settings.name} has none. Take a smaller batch.")
        return rivals.make_rival_step(rivals.make_gradient(model, loss_fn, autocast_dtype), settings, momentum)
    shared: dict[str, Any] = {
        "epsilon": settings.epsilon,
        "groups": settings.groups,
        "microbatches": settings.microbatches,
        "rule": ONE_GRADIENT_RULES.get(settings.rule) or multi_step(settings.ascent_steps),
        "autocast_dtype": autocast_dtype,
        "process_group": ranks.group(),
    }
    if settings.name == "one_pass":
        return _carrying(make_one_pass_step(model, loss_fn, clean_fraction=settings.clean_fraction, **shared))
    shared |= {"ratio": settings.ratio, "remainder": settings.remainder}
    if settings.name == "apart_sam":
        return _carrying_nothing(make_apart_sam_step(model, loss_fn, rho=settings.rho, **shared))
    return _carrying_nothing(make_apart_step(model, loss_fn, **shared))


def _carrying(one_pass_step: Callable[..., StepOutput]) -> Step:
    def step(
        params: Tensors, buffers: Tensors, batch: Batch, carried: Carried, *, epsilon: Tensor | None = None
    ) -> tuple[StepOutput, Carried]:
        out = one_pass_step(params, buffers, batch, *([carried] if carried else []), epsilon=epsilon)
        return out, out.perturbation if carried else carried

    return step


def _carrying_nothing(stateless_step: Callable[..., StepOutput]) -> Step:
    def step(
        params: Tensors, buffers: Tensors, batch: Batch, carried: Carried, *, epsilon: Tensor | None = None
    ) -> tuple[StepOutput, Carried]:
        return stateless_step(params, buffers, batch, epsilon=epsilon), carried

    return step
