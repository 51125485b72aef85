"""What the step decides by itself: how many samples, which dtype, what is kept."""

import pytest
import torch
import torch.nn.functional as F
from oracle import oracle_step
from small import convolutional, images
from torch import nn

from apart_func import make_apart_step, split_state


@pytest.mark.parametrize(("samples", "ratio", "groups", "kept"), [(10, 1.0, 4, 8), (10, 0.5, 2, 4), (9, 0.5, 0, 4)])
def test_dropping_the_remainder_lowers_the_samples_and_their_weight(
    samples: int, ratio: float, groups: int, kept: int
) -> None:
    model, batch = convolutional(), images(samples)
    step = make_apart_step(model, F.cross_entropy, epsilon=0.1, groups=groups, ratio=ratio, remainder="drop")
    out = step(*split_state(model), batch)
    # The definition knows no remainder: it is told the share that leaves exactly the kept samples.
    share = (kept + 0.5) / samples
    expected = oracle_step(
        model, F.cross_entropy, batch, epsilon=0.1, groups=groups, ratio=share, perturbation=out.perturbation
    )
    torch.testing.assert_close(out.adversarial_loss, expected.adversarial_loss, rtol=1e-10, atol=0)
    torch.testing.assert_close(out.grads, expected.grads, rtol=1e-8, atol=1e-12)


def test_a_ratio_that_is_no_fraction_of_the_batch_is_rounded_down() -> None:
    model, batch = convolutional(), images(7)
    out = make_apart_step(model, F.cross_entropy, epsilon=0.0, ratio=0.5)(*split_state(model), batch)
    alone = F.cross_entropy(model(batch[0][:3]), batch[1][:3])
    torch.testing.assert_close(out.adversarial_loss, alone.detach())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_statistics_of_half_precision_activations_are_those_of_float32(dtype: torch.dtype) -> None:
    """Moments summed up in half precision would be off by a thousand times as much."""
    model = nn.Sequential(nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(32, 3)).to(dtype)
    x, y = images(64, dtype=dtype)
    out = make_apart_step(model, F.cross_entropy, groups=2)(*split_state(model), (x, y))
    var, mean = torch.var_mean(x.double(), (0, 2, 3), correction=0)
    torch.testing.assert_close(out.stats["0"].mean.double(), mean, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(out.stats["0"].var.double(), var, rtol=1e-5, atol=1e-6)


def test_statistics_of_a_float64_model_are_float64_also_under_autocast() -> None:
    model = convolutional()
    step = make_apart_step(model, F.cross_entropy, groups=2, autocast_dtype=torch.bfloat16)
    out = step(*split_state(model), images())
    parts = [part for tree in (out.stats, out.stat_grads, out.perturbation) for pair in tree.values() for part in pair]
    assert {part.dtype for part in parts} == {torch.float64}


def test_a_mean_far_from_zero_costs_no_precision() -> None:
    """Variances are not differences of squares: the mean here is a million standard deviations from zero."""
    model = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 3)).double()
    x = 1e6 + torch.randn(32, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    out = make_apart_step(model, F.cross_entropy, groups=4)(*split_state(model), (x, torch.arange(32) % 3))
    torch.testing.assert_close(out.stats["0"].var, x.var(0, correction=0), rtol=1e-8, atol=0)


def test_buffers_that_nothing_moves_come_back_as_they_were() -> None:
    model = convolutional()
    model[4].eval()
    model[8].weight.requires_grad_(False)
    params, buffers = split_state(model)
    out = make_apart_step(model, F.cross_entropy)(params, buffers, images())
    still = ["4.running_mean", "4.running_var", "4.num_batches_tracked", "8.weight"]
    torch.testing.assert_close({n: out.buffers[n] for n in still}, {n: buffers[n] for n in still}, rtol=0, atol=0)
    assert not torch.equal(out.buffers["1.running_mean"], buffers["1.running_mean"])


def test_the_modes_are_those_that_the_layers_had_when_the_step_was_made() -> None:
    model = convolutional()
    step = make_apart_step(model, F.cross_entropy)
    before = step(*split_state(model), images())
    model.eval()
    torch.testing.assert_close(step(*split_state(model), images())._asdict(), before._asdict(), rtol=0, atol=0)
