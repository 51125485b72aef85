"""Rules: how far, and which way, the statistics of the adversarial pass are moved.

A rule is any function `(stats, stat_grads, epsilon) -> perturbation`, layer by layer. An `IterativeRule` also asks for
gradients at perturbations of its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from apart_func.checks import check_epsilon
from apart_func.errors import SettingError
from apart_func.trees import (
    Perturbation,
    PerturbationTree,
    StatGrads,
    StatGradTree,
    StatTree,
    check_named_tensors,
)


class Rule(Protocol):
    """A function from statistics and their gradients to a perturbation of every layer in `stat_grads`."""

    def __call__(self, stats: StatTree, stat_grads: StatGradTree, epsilon: Tensor) -> PerturbationTree:
        """See `sign_perturbation`."""


class RuleKind(NamedTuple):
    """What the steps have to know of a rule; `rule_kind` says it of one. As it is here of a rule that nobody described.

    Attributes:
        is_bounded: whether it moves every statistic by at most ε, so that ε has to be below 1.
        draws: whether it may find something else on every rank, from the same gradients.
        needs_gradients: whether it looks at the values of gradients. One pass differentiates by the statistics, and
            carries a perturbation from step to step, for such rules alone.
    """

    is_bounded: bool = False
    draws: bool = True
    needs_gradients: bool = True


AnyRule = TypeVar("AnyRule", bound=Callable[..., PerturbationTree])


def rule_kind(
    *, is_bounded: bool = False, draws: bool = True, needs_gradients: bool = True
) -> Callable[[AnyRule], AnyRule]:
    """Describe a rule of your own, as a decorator; see `RuleKind`."""

    def describe(rule: AnyRule) -> AnyRule:
        rule.kind = RuleKind(is_bounded, draws, needs_gradients)  # type: ignore[attr-defined]  # a function takes it
        return rule

    return describe


def kind_of(rule: Any) -> RuleKind:
    """Return the kind of a rule, or of one whose further arguments `functools.partial` has fixed."""
    while isinstance(rule, partial):
        rule = rule.func
    return getattr(rule, "kind", RuleKind())


# The kind of a rule of gradients that moves every statistic by at most ε.
GRADIENT_RULE = RuleKind(is_bounded=True, draws=False)

# From a perturbation to the gradient of the proxy loss there, by one more pass over the batch.
GradientsAt = Callable[[PerturbationTree], StatGradTree]


@dataclass(frozen=True)
class IterativeRule:
    """A rule that asks for gradients at perturbations of its own, each of which costs a pass.

    `make_apart_step` runs these. In the drop-in the passes are the user's, and one pass has one: both refuse them.

    Attributes:
        search: `(stats, stat_grads, epsilon, gradients_at) -> perturbation`, where `gradients_at(perturbation)` is
            ∂L_p/∂δ there.
        name: what messages call it.
        kind: see `RuleKind`.
    """

    search: Callable[[StatTree, StatGradTree, Tensor, GradientsAt], PerturbationTree]
    name: str
    kind: RuleKind = GRADIENT_RULE

    def __call__(self, stats: StatTree, stat_grads: StatGradTree, epsilon: Tensor) -> PerturbationTree:
        """Refuse: whoever calls it as a rule of one gradient has no others to give."""
        raise self.refusal()

    def refusal(self) -> SettingError:
        """Return what to say if there are no further passes."""
        return SettingError(
            f"rule={self.name} needs further passes over the batch, and there are none here. Use it in "
            "make_apart_step or make_apart_sam_step, or take a rule of one gradient, such as sign_perturbation."
        )


def perturbation_by(
    rule: Rule, stats: StatTree, stat_grads: StatGradTree, epsilon: Tensor, gradients_at: GradientsAt
) -> PerturbationTree:
    """Return the perturbation that a rule of either kind makes."""
    given = stats, stat_grads, epsilon
    return rule.search(*given, gradients_at) if isinstance(rule, IterativeRule) else rule(*given)


@rule_kind(is_bounded=True, draws=False)
def sign_perturbation(stats: StatTree, stat_grads: StatGradTree, epsilon: Tensor) -> PerturbationTree:
    """Push every statistic to its radius, in the direction that raises the loss.

    The L∞ ascent step δ = ε · sign(∂L_p/∂δ), layer by layer.

    Args:
        stats: batch statistics of the proxy pass. This rule ignores them; rules that scale by them do not.
        stat_grads: gradient of the proxy loss with respect to the relative shifts, `(C,)` each.
        epsilon: perturbation radius, 0-d, ≥ 0, as a fraction of the statistic.

    Returns:
        A perturbation for every layer in `stat_grads`: |δ| ≤ ε, and 0 where the gradient is 0.

    Example:
        >>> grads = {"bn": StatGrads(mean=torch.tensor([0.3, -2.0]), scale=torch.tensor([0.0, 0.1]))}
        >>> sign_perturbation({}, grads, torch.tensor(0.5))["bn"].mean
        tensor([ 0.5000, -0.5000])
    """
    return {layer: Perturbation(epsilon * g.mean.sign(), epsilon * g.scale.sign()) for layer, g in stat_grads.items()}


@rule_kind(is_bounded=True, draws=True, needs_gradients=False)
def random_sign_perturbation(
    stats: StatTree, stat_grads: StatGradTree, epsilon: Tensor, generator: torch.Generator | None = None
) -> PerturbationTree:
    """Push every statistic to its radius, up or down at random.

    The rule of one pass, and in two passes the control for whether the direction matters. See `random_signs`.

    Args:
        stats: batch statistics of the proxy pass, ignored.
        stat_grads: their gradients, of which only shape, dtype and device are looked at.
        epsilon: perturbation radius, 0-d, ≥ 0, as a fraction of the statistic.
        generator: of the signs; None is torch's default one. `functools.partial` fixes it.

    Returns:
        A perturbation for every layer in `stat_grads`: |δ| = ε.
    """
    return _drawn(stat_grads, epsilon, generator)


def random_signs(
    layers: Mapping[str, StatGrads | Perturbation], epsilon: float | Tensor, generator: torch.Generator | None = None
) -> PerturbationTree:
    """Draw random signs of a radius for all layers, in one draw.

    As a value, they are the way to take a step with a key: `apart_step(..., perturbation=δ)`, or
    `one_pass_step(params, buffers, batch, δ)`, also compiled and mapped.

    From torch's default generator they come as dropout's masks do: under vmap say `randomness="different"`, or "same".
    Ranks of a process group take those of the first one.

    Args:
        layers: a tree of the layers, such as `init_perturbation(model)`, of which only shape, dtype and device are
            looked at.
        epsilon: perturbation radius ≥ 0, a number or 0-d tensor.
        generator: a key, such as `torch.Generator().manual_seed(0)`, on the device of `layers`.

    Returns:
        A perturbation of the same layers and shapes: |δ| = ε.

    Example:
        >>> layers = {"bn": Perturbation(mean=torch.zeros(2), scale=torch.zeros(2))}
        >>> one, same = (random_signs(layers, 0.5, torch.Generator().manual_seed(0)) for _ in range(2))
        >>> bool((one["bn"].mean.abs() == 0.5).all()), bool((one["bn"].scale == same["bn"].scale).all())
        (True, True)
    """
    check_named_tensors("layers", layers)
    check_epsilon(epsilon, is_bounded=True)
    if not (generator is None or isinstance(generator, torch.Generator)):
        raise SettingError(f"generator is a {type(generator).__name__}; expected a torch.Generator, or None.")
    drawn = _drawn(layers, epsilon, generator)  # views of one draw, whose offsets a compiler would make symbols of
    return {layer: Perturbation(mean.clone(), scale.clone()) for layer, (mean, scale) in drawn.items()}


def _drawn(
    layers: Mapping[str, StatGrads | Perturbation], epsilon: float | Tensor, generator: torch.Generator | None
) -> PerturbationTree:
    parts = [part for pair in layers.values() for part in pair]
    if not parts:
        return {}
    sizes = [part.numel() for part in parts]
    bits = torch.randint(2, (sum(sizes),), generator=generator, device=parts[0].device)
    signs = iter((2 * bits - 1).to(parts[0].dtype).mul(epsilon).split(sizes))
    return {
        layer: Perturbation(*(next(signs).view(part.shape).to(part.dtype) for part in pair))
        for layer, pair in layers.items()
    }


@rule_kind(draws=False)
def l2_perturbation(stats: StatTree, stat_grads: StatGradTree, epsilon: Tensor) -> PerturbationTree:
    """Move the statistics of every layer by ε along their gradient.

    The L2 ascent step δ = ε · g/‖g‖, with the norm over δμ and δσ of a layer together. The sign rule's step has norm
    ε√(2C) in a layer of C channels, so this rule wants a radius that is larger by about that factor.

    Args:
        stats: batch statistics of the proxy pass, ignored.
        stat_grads: gradient of the proxy loss with respect to the relative shifts, `(C,)` each.
        epsilon: perturbation radius, 0-d, ≥ 0: the norm of a layer's relative shifts.

    Returns:
        A perturbation for every layer in `stat_grads`: ‖δ‖ = ε, or 0 where all of the layer's gradient is 0.
    """
    return {layer: _of_length(epsilon, g) for layer, g in stat_grads.items()}


def _of_length(epsilon: Tensor, g: StatGrads) -> Perturbation:
    # Squares of tiny or huge gradients leave the range of float32, so the largest entry is made one before.
    largest = torch.maximum(g.mean.abs().max(), g.scale.abs().max())
    divisor = torch.where(largest > 0, largest, torch.ones_like(largest))
    mean, scale = g.mean / divisor, g.scale / divisor
    norm = torch.sqrt(mean.square().sum() + scale.square().sum()).clamp(min=1)  # below 1 only where all is zero
    return Perturbation(epsilon * (mean / norm), epsilon * (scale / norm))


def multi_step(steps: int, step_size: float | None = None) -> IterativeRule:
    """Make the rule that climbs to the worst statistics in several steps: projected gradient ascent.

    From δ = 0, δ ← clip(δ + step_size · ε · sign(∂L_p/∂δ), −ε, ε), with the gradient taken again at every δ. The first
    is the proxy pass's own; each further one costs a forward and a backward without parameter gradients. One step of
    the default size is `sign_perturbation`.

    Args:
        steps: number k ≥ 1 of gradients.
        step_size: length of a step as a fraction of ε. None is 2.5/k: enough to cross the ball, and to come back.

    Returns:
        A rule for `make_apart_step` and `make_apart_sam_step`.

    Raises:
        SettingError: a setting is out of range.
    """
    if not isinstance(steps, int) or isinstance(steps, bool) or steps < 1:
        raise SettingError(f"steps={steps!r}; expected a positive number of gradients, such as 3.")
    length = 2.5 / steps if step_size is None else step_size
    if isinstance(step_size, bool) or not (isinstance(length, (int, float)) and math.isfinite(length) and length > 0):
        raise SettingError(f"step_size={step_size}; expected a positive fraction of the radius, such as 0.5, or None.")
    return IterativeRule(partial(_ascended, steps=steps, length=length), f"multi_step({steps})")


def _ascended(
    stats: StatTree, stat_grads: StatGradTree, epsilon: Tensor, gradients_at: GradientsAt, steps: int, length: float
) -> PerturbationTree:
    """The search of `multi_step`, in units of the radius."""
    where = {layer: Perturbation(*map(torch.zeros_like, g)) for layer, g in stat_grads.items()}
    for step in range(steps):
        grads = gradients_at(_times(epsilon, where)) if step else stat_grads
        where = {
            layer: Perturbation(
                *((at + length * g.sign()).clamp(-1, 1) for at, g in zip(shift, grads[layer], strict=True))
            )
            for layer, shift in where.items()
        }
    return _times(epsilon, where)


def _times(epsilon: Tensor, where: PerturbationTree) -> PerturbationTree:
    return {layer: Perturbation(epsilon * shift.mean, epsilon * shift.scale) for layer, shift in where.items()}
