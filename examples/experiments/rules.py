"""Rules that were tried in one pass and are not the library's, each a function as `apart_func` takes them.

blended        δ = ε · (sign g, or a random sign, as a coin says)
standardised   δμ = ε · s/|μ| · sign g, δσ = ε/√2 · sign g: radii in the standard errors of a ghost group's statistics.
               Those of n independent values are s/√n for the mean, and s/√(2n) for the standard deviation.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from apart_func import Perturbation, PerturbationTree, StatGradTree, StatTree, random_sign_perturbation

SMALLEST_MEAN = 0.1  # of |μ|/s; below it the relative shift of a mean would grow without bound


def blended_perturbation(stats: StatTree, stat_grads: StatGradTree, epsilon: Tensor) -> PerturbationTree:
    """Push half of the statistics, drawn by lot, to where the loss rises, and the others at random."""
    drawn = random_sign_perturbation(stats, stat_grads, epsilon)

    def blend(g: Tensor, at_random: Tensor) -> Tensor:
        return torch.where(torch.rand_like(g) < 0.5, epsilon * g.sign(), at_random)

    return {
        layer: Perturbation(blend(g.mean, drawn[layer].mean), blend(g.scale, drawn[layer].scale))
        for layer, g in stat_grads.items()
    }


def standardised_perturbation(stats: StatTree, stat_grads: StatGradTree, epsilon: Tensor) -> PerturbationTree:
    """Push every statistic by as many of its standard errors, in the direction that raises the loss."""
    found = {}
    for layer, g in stat_grads.items():
        mean, var = (moment if moment.dim() == 1 else moment.mean(0) for moment in stats[layer])
        relative_mean = mean.abs() / torch.sqrt(var + torch.finfo(var.dtype).tiny)
        radius = epsilon / relative_mean.clamp(min=SMALLEST_MEAN)
        found[layer] = Perturbation(radius * g.mean.sign(), epsilon / math.sqrt(2) * g.scale.sign())
    return found
