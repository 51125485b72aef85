"""The rule of several steps, `multi_step`: against the definition, and in what a step can do."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from oracle import oracle_ascent, oracle_step
from small import images, smooth
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from apart_func import (
    IterativeRule,
    Perturbation,
    functionalize,
    gradients_at,
    make_apart_sam_step,
    make_apart_step,
    multi_step,
    proxy_pass,
    sign_perturbation,
    split_state,
)

# The compared computations differ in the order of float64 sums only.
ROUNDING = {"rtol": 1e-9, "atol": 1e-12}
BATCH = images()
EPSILON = 0.5  # so far from zero that signs change on the way


def step_of(model: nn.Module, batch: Any, **options: Any) -> Any:
    settings = {"epsilon": EPSILON, "groups": 2, "rule": multi_step(3), **options}
    return make_apart_step(model, F.cross_entropy, **settings)(*split_state(model), batch)


# What it is.


@pytest.mark.parametrize(("steps", "step_size"), [(2, None), (3, None), (3, 0.3), (5, 0.4)])
@pytest.mark.parametrize("seed", range(5))
def test_its_perturbation_and_the_step_that_follows_are_what_the_definition_says(seed, steps, step_size):
    model, (x, y) = smooth(seed), images(seed=seed)
    out = step_of(model, (x, y), rule=multi_step(steps, step_size))
    expected, gradients = oracle_ascent(
        model,
        F.cross_entropy,
        x,
        y,
        epsilon=EPSILON,
        steps=steps,
        step_size=2.5 / steps if step_size is None else step_size,
    )
    assert min(g.abs().min() for g in leaves_of(gradients)) > 1e-9  # so that every sign is beyond rounding
    torch.testing.assert_close(leaves_of(out.perturbation), leaves_of(expected), **ROUNDING)
    definition = oracle_step(
        model, F.cross_entropy, (x, y), epsilon=EPSILON, groups=2, ratio=1.0, perturbation=expected
    )
    for field in ("loss", "output", "buffers", "adversarial_loss", "grads"):
        torch.testing.assert_close(getattr(out, field), getattr(definition, field), **ROUNDING)


def leaves_of(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def test_signs_change_on_the_way() -> None:
    """So that the test above compares more than the first gradient."""
    one, three = (step_of(smooth(), BATCH, rule=multi_step(k)).perturbation for k in (1, 3))
    changed = [(a.sign() != b.sign()).any() for a, b in zip(leaves_of(one), leaves_of(three), strict=True)]
    assert any(changed)


def test_a_single_step_is_the_sign_rule() -> None:
    one, sign = (step_of(smooth(), BATCH, rule=rule) for rule in (multi_step(1), sign_perturbation))
    torch.testing.assert_close(one._asdict(), sign._asdict(), rtol=0, atol=0)


def test_it_stays_below_a_top_that_a_single_step_leaps_over() -> None:
    """L = −(mean of y − t)², where the mean of y is −(1 + δσ) δμ μ/s: it falls once δμ is past the top."""
    model = nn.Sequential(nn.BatchNorm1d(1)).double()
    x = 1 + torch.randn(64, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def loss(output: Tensor, target: Tensor) -> Tensor:
        return -(output.mean() - target).square()

    single, several = (
        make_apart_step(model, loss, epsilon=0.2, rule=rule)(*split_state(model), (x, torch.tensor(0.05).double()))
        for rule in (sign_perturbation, multi_step(8, step_size=0.05))
    )
    assert single.adversarial_loss < single.loss < several.adversarial_loss <= 0


# What it costs.


def test_k_steps_run_k_minus_one_passes_more_and_these_differentiate_by_no_parameter() -> None:
    wanted: list[tuple[bool, bool]] = []

    class Product(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
            ctx.save_for_backward(x, weight)
            return x * weight

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> Any:
            x, weight = ctx.saved_tensors
            wanted.append(ctx.needs_input_grad)
            return g * weight, (g * x).sum_to_size(weight.shape) if ctx.needs_input_grad[1] else None

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.tensor(1.5).double())

        def forward(self, x: Tensor) -> Tensor:
            return Product.apply(x, self.weight)

    step_of(nn.Sequential(smooth(), Scaled()), BATCH, rule=multi_step(3))
    assert wanted == [(True, True), (True, False), (True, False), (True, True)]


# What it leaves alone.


class Counting(nn.Module):
    """Counts its calls in a buffer, which the output depends on."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.tensor(1.0).double())

    def forward(self, x: Tensor) -> Tensor:
        y = x / self.calls.clone()
        self.calls += 1
        return y


def test_the_gradient_at_zero_is_the_proxy_passes_own_also_with_buffers_that_the_model_moves() -> None:
    model = nn.Sequential(smooth(), Counting())
    fmodel, (params, buffers) = functionalize(model), split_state(model)
    proxy = proxy_pass(fmodel, F.cross_entropy, params, buffers, BATCH)
    zero = {layer: Perturbation(0 * g.mean, 0 * g.scale) for layer, g in proxy.stat_grads.items()}
    found = gradients_at(fmodel, F.cross_entropy, params, buffers, BATCH, zero)
    torch.testing.assert_close(found, proxy.stat_grads, **ROUNDING)


def test_a_layer_that_is_never_called_is_not_moved() -> None:
    model = smooth()
    model[0].uncalled = nn.BatchNorm2d(7).double()
    shift = step_of(model, BATCH).perturbation["0.uncalled"]
    assert not any(part.any() for part in shift)


# In what a step can do.


def test_gradients_that_a_rule_asks_for_come_without_the_loss_scale() -> None:
    seen: list[Any] = []

    def search(stats: Any, stat_grads: Any, epsilon: Tensor, gradients_at: Any) -> Any:
        seen.append(gradients_at(sign_perturbation(stats, stat_grads, epsilon)))
        return sign_perturbation(stats, stat_grads, epsilon)

    step = make_apart_step(smooth(), F.cross_entropy, epsilon=EPSILON, rule=IterativeRule(search, "looking"))
    for scale in (None, 1024.0):
        step(*split_state(smooth()), BATCH, loss_scale=scale)
    torch.testing.assert_close(*seen, **ROUNDING)


def test_autocast_reaches_its_passes() -> None:
    dtypes = []

    def loss(output: Tensor, target: Tensor) -> Tensor:
        dtypes.append(output.dtype)
        return F.cross_entropy(output.float(), target)

    model = smooth(dtype=torch.float32)
    step = make_apart_step(model, loss, rule=multi_step(3), autocast_dtype=torch.bfloat16)
    step(*split_state(model), images(dtype=torch.float32))
    assert dtypes == [torch.bfloat16] * 4


def test_with_a_ratio_it_still_climbs_on_the_whole_batch() -> None:
    half, whole = (step_of(smooth(), BATCH, ratio=ratio).perturbation for ratio in (0.5, 1.0))
    torch.testing.assert_close(half, whole, rtol=0, atol=0)


def test_it_is_the_rule_of_apart_sam_too() -> None:
    model, batch = smooth(), BATCH
    options: dict[str, Any] = {"epsilon": EPSILON, "groups": 2, "ratio": 0.5, "rho": 0.3}
    out = make_apart_sam_step(model, F.cross_entropy, rule=multi_step(2), **options)(*split_state(model), batch)
    torch.testing.assert_close(out.perturbation, step_of(model, batch, rule=multi_step(2)).perturbation, **ROUNDING)
    definition = oracle_step(model, F.cross_entropy, batch, perturbation=out.perturbation, **options)
    torch.testing.assert_close(out.grads, definition.grads, **ROUNDING)
