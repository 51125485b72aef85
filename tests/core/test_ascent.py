"""Projected ascent by gradients at δ, written with the parts: `adversarial_pass(..., stat_grads=True)`."""

from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from oracle import oracle_adversarial, oracle_ascent, oracle_step
from small import images, smooth
from torch import Tensor
from torch.utils._pytree import tree_leaves

from apart_func import (
    Perturbation,
    Precision,
    adversarial_pass,
    functionalize,
    init_perturbation,
    make_apart_step,
    sign_perturbation,
    split_state,
)

# The compared computations differ in the order of float64 sums only.
ROUNDING = {"rtol": 1e-9, "atol": 1e-12}
EPSILON = 0.5  # so far from zero that signs change on the way


def ascent(take: Any, model: Any, batch: Any, steps: int, length: float) -> Any:
    """The recipe of docs/method.md."""
    state, shifts = split_state(model), init_perturbation(model)
    for _ in range(steps):
        found = take(*state, batch, shifts).stat_grads
        ascended = {layer: zip(shifts[layer], g, strict=True) for layer, g in found.items()}
        shifts = {
            layer: Perturbation(*((at + length * EPSILON * g.sign()).clamp(-EPSILON, EPSILON) for at, g in pairs))
            for layer, pairs in ascended.items()
        }
    return shifts


def taken(model: Any, way: str = "eager") -> Any:
    take = partial(adversarial_pass, functionalize(model), F.cross_entropy, stat_grads=True)
    return torch.compile(take, fullgraph=True, backend="aot_eager") if way == "compiled" else take


@pytest.mark.parametrize(("steps", "length"), [(2, 1.25), (3, 0.3), (5, 0.4)])
@pytest.mark.parametrize("seed", range(3))
def test_an_ascent_and_the_step_that_follows_are_what_the_definition_says(seed: int, steps: int, length: float) -> None:
    model, (x, y) = smooth(seed), images(seed=seed)
    found = ascent(taken(model), model, (x, y), steps, length)
    expected, gradients = oracle_ascent(model, F.cross_entropy, x, y, epsilon=EPSILON, steps=steps, step_size=length)
    assert min(g.abs().min() for g in leaves_of(gradients)) > 1e-9  # so that every sign is beyond rounding
    torch.testing.assert_close(leaves_of(found), leaves_of(expected), **ROUNDING)
    step = make_apart_step(model, F.cross_entropy, groups=2)
    out = step(*split_state(model), (x, y), perturbation=found)
    definition = oracle_step(
        model, F.cross_entropy, (x, y), epsilon=EPSILON, groups=2, ratio=1.0, perturbation=expected
    )
    for field in ("loss", "output", "buffers", "adversarial_loss", "grads"):
        torch.testing.assert_close(getattr(out, field), getattr(definition, field), **ROUNDING)


@pytest.mark.parametrize("way", ["eager", "compiled"])
def test_gradients_at_a_perturbation_are_those_of_the_loss_there(way: str) -> None:
    """By central differences, of the last layer: past it no other is, whose μ/s would be a constant to the gradient."""
    model, batch = smooth(), images()
    state = split_state(model)
    first = taken(model)(*state, batch, init_perturbation(model)).stat_grads
    one = sign_perturbation({}, first, torch.tensor(0.2).double())
    shifts = {layer: Perturbation(*(torch.stack([part, -part]) for part in pair)) for layer, pair in one.items()}
    scaled = Precision(loss_scale=torch.tensor(8.0).double())
    found = taken(model, way)(*state, batch, shifts, groups=2, precision=scaled).stat_grads
    *_, last = shifts
    for part, grads in zip(shifts[last], found[last], strict=True):
        losses = []
        for h in (1e-6, -1e-6):
            before = part[1, 0].item()
            part[1, 0] += h
            losses.append(oracle_adversarial(model, F.cross_entropy, *batch, shifts, 2).loss)
            part[1, 0] = before
        torch.testing.assert_close(grads[1, 0], (losses[0] - losses[1]) / 2e-6, rtol=1e-6, atol=1e-9)


def leaves_of(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]
