"""Other ways to carry a perturbation than that of `make_one_pass_step`, made of the library's parts.

    clean         the library's: from the statistic gradients of the clean groups
    all           from those of all groups, the perturbed ones too
    average       from a decayed average of those of the clean groups, which is what is carried
    alternating   a clean step finds the perturbation, the next step of the whole batch runs under it
    refreshed     as clean, and every fourth step is one of two passes

They are here to be compared by the error that they lead to. Those that choose between two kinds of step compute both,
so that the choice can be mapped over networks: what they take says nothing of what they would cost.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from apart_func import (
    Perturbation,
    Rule,
    StepOutput,
    adversarial_pass,
    functionalize,
    make_apart_step,
    make_one_pass_step,
    mixed_pass,
    proxy_pass,
)
from apart_func.one_pass import clean_groups, clean_stat_grads
from apart_func.pytrees import BatchStats, PerturbationTree, StatTree, merge_trees, tree_leaves
from apart_func.step import all_finite
from training.settings import CarryName, MethodSettings

Tensors = dict[str, Tensor]
Batch = tuple[Tensor, Tensor]
CarryingStep = Callable[[Tensors, Tensors, Batch, PerturbationTree], tuple[StepOutput, PerturbationTree]]

DECAY = 0.9  # of the average
EVERY = 4  # steps from one of two passes to the next


def make_carrying_step(model: nn.Module, settings: MethodSettings, rule: Rule) -> CarryingStep:
    """Make a step that carries its perturbation in the way that the settings name.

    Args:
        model: the network, in training mode.
        settings: of the method.
        rule: makes the perturbation.

    Returns:
        The step, without a loss scale, micro-batches or autocast.
    """
    return MAKERS[settings.carry](model, settings, rule)


def _from_groups(
    model: nn.Module,
    settings: MethodSettings,
    used: Callable[[PerturbationTree], PerturbationTree],
    carried_on: Callable[[StatTree, PerturbationTree], PerturbationTree],
) -> CarryingStep:
    """A mixed pass, with the perturbation made from what was carried, and what is carried from its gradients."""
    fmodel, groups = functionalize(model), settings.groups
    clean = clean_groups(settings.clean_fraction, groups)

    def step(
        params: Tensors, buffers: Tensors, batch: Batch, carried: PerturbationTree
    ) -> tuple[StepOutput, PerturbationTree]:
        shifts = used(carried)
        mixed = mixed_pass(fmodel, F.cross_entropy, params, buffers, batch, shifts, groups=groups, clean=clean)
        values = [mixed.loss, mixed.adversarial_loss, *mixed.grads.values(), *tree_leaves(mixed.stat_grads)]
        out = StepOutput(
            grads=mixed.grads,
            buffers=mixed.buffers,
            loss=mixed.loss,
            adversarial_loss=mixed.adversarial_loss,
            output=mixed.output,
            stats=mixed.stats,
            stat_grads=clean_stat_grads(mixed.stat_grads, clean),
            perturbation=shifts,
            all_finite=all_finite(values),
        )
        return out, carried_on(mixed.stat_grads, carried)

    return step


def _all(model: nn.Module, settings: MethodSettings, rule: Rule) -> CarryingStep:
    def carried_on(of_groups: StatTree, _: PerturbationTree) -> PerturbationTree:
        return rule({}, clean_stat_grads(of_groups, settings.groups), torch.tensor(settings.epsilon))

    return _from_groups(model, settings, lambda carried: carried, carried_on)


def _average(model: nn.Module, settings: MethodSettings, rule: Rule) -> CarryingStep:
    clean = clean_groups(settings.clean_fraction, settings.groups)

    def used(average: PerturbationTree) -> PerturbationTree:
        return rule({}, {layer: BatchStats(*g) for layer, g in average.items()}, torch.tensor(settings.epsilon))

    def carried_on(of_groups: StatTree, average: PerturbationTree) -> PerturbationTree:
        found = clean_stat_grads(of_groups, clean)
        return {
            layer: Perturbation(*(DECAY * old + (1 - DECAY) * new for old, new in zip(average[layer], g, strict=True)))
            for layer, g in found.items()
        }

    return _from_groups(model, settings, used, carried_on)


def _alternating(model: nn.Module, settings: MethodSettings, rule: Rule) -> CarryingStep:
    fmodel = functionalize(model)

    def step(
        params: Tensors, buffers: Tensors, batch: Batch, carried: PerturbationTree
    ) -> tuple[StepOutput, PerturbationTree]:
        proxy = proxy_pass(fmodel, F.cross_entropy, params, buffers, batch)
        found = rule(proxy.stats, proxy.stat_grads, torch.tensor(settings.epsilon))
        hard = adversarial_pass(fmodel, F.cross_entropy, params, buffers, batch, carried, groups=settings.groups)
        perturbed = torch.stack([leaf.abs().amax() for leaf in tree_leaves(carried)]).amax() > 0
        grads = _either(perturbed, hard.grads, proxy.grads)
        out = StepOutput(
            grads=grads,
            buffers=_either(perturbed, buffers, proxy.buffers),
            loss=proxy.loss,
            adversarial_loss=hard.loss,
            output=proxy.output,
            stats=proxy.stats,
            stat_grads=proxy.stat_grads,
            perturbation=carried,
            all_finite=all_finite([proxy.loss, hard.loss, *grads.values(), *tree_leaves(proxy.stat_grads)]),
        )
        return out, _either(perturbed, merge_trees([found], lambda one: torch.zeros_like(one[0])), found)

    return step


def _refreshed(model: nn.Module, settings: MethodSettings, rule: Rule) -> CarryingStep:
    one_pass = _clean(model, settings, rule)
    two_passes = make_apart_step(model, F.cross_entropy, epsilon=settings.epsilon, groups=settings.groups, rule=rule)

    def step(
        params: Tensors, buffers: Tensors, batch: Batch, carried: PerturbationTree
    ) -> tuple[StepOutput, PerturbationTree]:
        steps = next(value for name, value in buffers.items() if name.endswith("num_batches_tracked"))
        one, _ = one_pass(params, buffers, batch, carried)
        out = _either(steps % EVERY == 0, two_passes(params, buffers, batch), one)
        return out, out.perturbation

    return step


def _clean(model: nn.Module, settings: MethodSettings, rule: Rule) -> CarryingStep:
    one_pass = make_one_pass_step(
        model,
        F.cross_entropy,
        epsilon=settings.epsilon,
        groups=settings.groups,
        clean_fraction=settings.clean_fraction,
        rule=rule,
    )

    def step(
        params: Tensors, buffers: Tensors, batch: Batch, carried: PerturbationTree
    ) -> tuple[StepOutput, PerturbationTree]:
        out = one_pass(params, buffers, batch, carried)
        return out, out.perturbation

    return step


def _either(condition: Tensor, one: Any, other: Any) -> Any:
    return merge_trees([one, other], lambda pair: torch.where(condition, pair[0], pair[1]))


MAKERS: dict[CarryName, Callable[[nn.Module, MethodSettings, Rule], CarryingStep]] = {
    "clean": _clean,
    "all": _all,
    "average": _average,
    "alternating": _alternating,
    "refreshed": _refreshed,
}
