"""What a perturbation does to statistics."""

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
        raise StateError(f"layer {layer!r} has statistics and no perturbation. Pass the tree that was made for them.")
    shift, channels = perturbation[layer], stats.mean.shape[-1]
    if shift.mean.shape[-1] != channels:
        raise StateError(f"layer {layer!r} has {channels} channels, and its perturbation {shift.mean.shape[-1]}.")
    radius = shift.scale.abs().max().item() if is_concrete(shift.scale) else 0.0
    if radius >= 1:
        problem = f"layer {layer!r} has |δσ| up to {radius:g}, and s' = s/(1 + δσ) needs |δσ| < 1"
        raise SettingError(f"{problem}. Use a radius below 1.")
    return PerturbedStats(stats.mean * (1 + shift.mean), torch.sqrt(stats.var + eps) / (1 + shift.scale))
