"""What a perturbation does to statistics, and how far it lasts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from apart_func._torch import is_concrete
from apart_func.checks import is_number
from apart_func.errors import SettingError, StateError
from apart_func.summary import summarised
from apart_func.trees import BatchStats, PerturbationTree, StatTree, check_named_tensors


def sign_flips(previous: PerturbationTree, current: PerturbationTree) -> Tensor:
    """The share of shifts that point the other way than before: about 0.5 if two directions have nothing in common.

    Args:
        previous: δ of a step, `(C,)` each, or with leading dimensions.
        current: δ of a later one, of the same layers and shapes; a StateError says if they are not.

    Returns:
        0-d: of the shifts that are zero in neither, those whose sign differs; NaN if there are none.

    Example:
        >>> from apart_func import Perturbation
        >>> before = {"bn": Perturbation(mean=torch.tensor([0.1, -0.1]), scale=torch.tensor([0.1, 0.0]))}
        >>> after = {"bn": Perturbation(mean=torch.tensor([0.1, 0.1]), scale=torch.tensor([-0.1, 0.1]))}
        >>> sign_flips(before, after)  # two of three
        tensor(0.6667)
    """
    check_named_tensors("previous", previous)
    check_named_tensors("current", current)
    shapes = [{layer: tuple(shift.mean.shape) for layer, shift in tree.items()} for tree in (previous, current)]
    if shapes[0] != shapes[1] or not shapes[0]:
        raise StateError(
            f"two perturbations are compared whose layers are {shapes[0]} and {shapes[1]}. Compare those of two steps "
            "of the same model."
        )
    before, now = (torch.cat([v.flatten() for layer in previous for v in tree[layer]]) for tree in (previous, current))
    products = before.sign() * now.sign()
    return (products < 0).sum() / (products != 0).sum()


@summarised
class PerturbedStats(NamedTuple):
    """The statistics that a perturbed layer normalises by.

    Attributes:
        mean: μ' = μ(1 + δμ), of the statistics' shape.
        std: s' = s / (1 + δσ) with s = sqrt(σ² + eps).
    """

    mean: Tensor
    std: Tensor


def perturbed_stats(
    stats: StatTree, perturbation: PerturbationTree, eps: float | Mapping[str, float] = 1e-5
) -> dict[str, PerturbedStats]:
    """Apply a perturbation to batch statistics.

    With |δ| ≤ ε, |μ' − μ| ≤ ε|μ| and |s/s' − 1| ≤ ε. Of the statistics that an adversarial pass returns, these are
    exactly what it normalised by; of the proxy pass's they are that in the first layer and one group alone, since
    deeper layers see what earlier ones changed.

    Args:
        stats: batch statistics by layer, `(C,)`, `(G, C)`, or with a leading K.
        perturbation: relative shifts of those layers, `(C,)`.
        eps: BN's constant, one for all layers or one for each.

    Returns:
        μ' and s' for every layer in `stats`.

    Raises:
        SettingError: a |δσ| ≥ 1, where the standard deviation would be infinite or negative.
        StateError: a layer in `stats` has no perturbation, or one of another width.

    Example:
        >>> from apart_func import Perturbation
        >>> stats = {"bn": BatchStats(mean=torch.tensor([2.0]), var=torch.tensor([4.0]))}
        >>> shift = {"bn": Perturbation(mean=torch.tensor([0.5]), scale=torch.tensor([-0.5]))}
        >>> mean, std = perturbed_stats(stats, shift, eps=0.0)["bn"]
        >>> mean, std
        (tensor([3.]), tensor([4.]))
    """
    check_named_tensors("stats", stats)
    check_named_tensors("perturbation", perturbation)
    if not is_number(eps) and not (isinstance(eps, Mapping) and set(stats) <= set(eps)):
        raise SettingError(f"eps is a {type(eps).__name__}; expected BN's constant, or one for every layer in stats.")
    return {
        layer: _perturbed(layer, moments, perturbation, eps[layer] if isinstance(eps, Mapping) else eps)
        for layer, moments in stats.items()
    }


def _perturbed(layer: str, stats: BatchStats, perturbation: PerturbationTree, eps: float) -> PerturbedStats:
    if layer not in perturbation:
        raise StateError(
            f"layer {layer!r} has statistics and no perturbation. Pass the tree that a rule made for them."
        )
    shift = perturbation[layer]
    if shift.mean.shape[-1] != stats.mean.shape[-1]:
        raise StateError(
            f"layer {layer!r} has {stats.mean.shape[-1]} channels, and its perturbation {shift.mean.shape[-1]}."
        )
    radius = shift.scale.abs().max().item() if is_concrete(shift.scale) else 0.0
    if radius >= 1:
        raise SettingError(
            f"layer {layer!r} has |δσ| up to {radius:g}, and s' = s/(1 + δσ) needs |δσ| < 1. Use a radius below 1."
        )
    std = torch.sqrt(stats.var + eps)
    return PerturbedStats(stats.mean * (1 + shift.mean), std / (1 + shift.scale))
