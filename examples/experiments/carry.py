"""Other ways to carry a perturbation than that of `make_one_pass_step`, made of the library's parts.

clean     the library's: from the statistic gradients of the clean groups
all       from those of all groups, the perturbed ones too
average   from a decayed average of those of the clean groups, which is what is carried
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from apart_func import (
    Perturbation,
    PerturbationTree,
    Rule,
    StatGradTree,
    StepOutput,
    Tensors,
    all_finite,
    clean_stat_grads,
    functionalize,
    mixed_pass,
)
from experiments.settings import MethodSettings

if TYPE_CHECKING:
    from experiments.methods import Batch, Carried, Step

DECAY = 0.9  # of the average


def make_carrying_step(
    model: nn.Module, loss_fn: Callable[[Tensor, Tensor], Tensor], settings: MethodSettings, rule: Rule
) -> Step:
    """Make a step of one pass that carries in the way that the settings name."""
    fmodel, groups = functionalize(model), settings.groups
    clean = min(max(round(settings.clean_fraction * groups), 1), groups - 1)

    def step(
        params: Tensors, buffers: Tensors, batch: Batch, carried: Carried, *, epsilon: Tensor | None = None
    ) -> tuple[StepOutput, Carried]:
        length = torch.tensor(settings.epsilon) if epsilon is None else epsilon
        shifts: Any = rule({}, carried, length) if settings.carry == "average" else carried
        mixed = mixed_pass(fmodel, loss_fn, params, buffers, batch, shifts, groups=groups, clean=clean)
        out = StepOutput(
            grads=mixed.grads,
            buffers=mixed.buffers,
            loss=mixed.loss,
            adversarial_loss=mixed.adversarial_loss,
            output=mixed.output,
            stats=mixed.stats,
            stat_grads=clean_stat_grads(mixed.stat_grads, clean),
            perturbation=shifts,
            all_finite=all_finite(
                [mixed.loss, mixed.adversarial_loss, *mixed.grads.values(), *tree_leaves(mixed.stat_grads)]
            ),
        )
        if settings.carry == "average":
            return out, _averaged(carried, out.stat_grads)
        return out, rule({}, clean_stat_grads(mixed.stat_grads, groups), length)

    return step


def _averaged(average: PerturbationTree, found: StatGradTree) -> PerturbationTree:
    return {
        layer: Perturbation(*(DECAY * old + (1 - DECAY) * new for old, new in zip(average[layer], grads, strict=True)))
        for layer, grads in found.items()
    }
