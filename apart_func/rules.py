"""Rules: how far, and which way, the statistics of the adversarial pass are moved.

A rule is any function `(stats, stat_grads, epsilon) -> perturbation`, layer by layer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from apart_func.checks import check_epsilon
from apart_func.errors import SettingError
from apart_func.trees import Perturbation, PerturbationTree, StatGrads, StatGradTree, StatTree, check_named_tensors


class Rule(Protocol):
    """A function from statistics and their gradients to a perturbation of every layer in `stat_grads`."""

    def __call__(self, stats: StatTree, stat_grads: StatGradTree, epsilon: Tensor) -> PerturbationTree:
        """See `sign_perturbation`."""


class RuleKind(NamedTuple):
    """What the steps have to know of a rule; the defaults are those of a rule that `rule_kind` does not describe.

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
    stats: StatTree,
    stat_grads: Mapping[str, StatGrads | Perturbation],
    epsilon: float | Tensor,
    generator: torch.Generator | None = None,
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
    parts = [part for pair in stat_grads.values() for part in pair]
    if not parts:
        return {}
    bits = torch.randint(2, (sum(part.numel() for part in parts),), generator=generator, device=parts[0].device)
    signs = (2 * bits - 1).to(parts[0].dtype).split([part.numel() for part in parts])
    # Products own their memory: views of the draw have offsets, which a compiler makes symbols of.
    shifts = iter([(epsilon * sign).view(part.shape).to(part.dtype) for sign, part in zip(signs, parts, strict=True)])
    return {layer: Perturbation(*(next(shifts) for _ in pair)) for layer, pair in stat_grads.items()}


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
    return random_sign_perturbation({}, layers, epsilon, generator)


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
