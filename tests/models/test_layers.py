"""Layers that do with batch norm what some do: choose its statistics, are shared, skipped, or called in one piece."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from loops import drop_in_step
from plain import Drops, assert_plain, functional_step, one_pass
from small import convolutional, images
from torch import Tensor, nn

from apart_func import make_apart_step, make_one_pass_step, split_state

BATCH = images()


class Frozen(nn.BatchNorm2d):
    """Normalises by its running statistics while it trains its scale and shift."""

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps)


class OtherMomentum(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, True, 0.7, self.eps)


class OtherBuffers(nn.BatchNorm2d):
    """Keeps its statistics under other names."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("var", torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.mean, self.var, self.weight, self.bias, True, self.momentum, eps=self.eps)


class NoStatistics(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, None, None, self.weight, self.bias, training=True, eps=1e-2)


class CountsItself(nn.BatchNorm2d):
    """Counts by replacement, as timm's layers and those of synchronised batch norm do."""

    def forward(self, x: Tensor) -> Tensor:
        self.num_batches_tracked = self.num_batches_tracked + 1
        mean, var = self.running_mean, self.running_var
        return F.batch_norm(x, mean, var, self.weight, self.bias, self.training, self.momentum, self.eps)


@pytest.mark.parametrize("kind", [Frozen, OtherMomentum, OtherBuffers, NoStatistics, CountsItself])
@pytest.mark.parametrize("place", [1, 4])
def test_a_subclass_normalises_by_what_it_passes_and_moves_what_it_passes(kind: type[nn.Module], place: int) -> None:
    def build() -> nn.Module:
        model = convolutional()
        model[place] = kind(model[place].num_features).double()
        model[place].running_var.fill_(2)
        return model

    assert_plain(build, BATCH)


@pytest.mark.parametrize("take", [functional_step, drop_in_step])
def test_a_frozen_subclass_is_not_perturbed(take: Any) -> None:
    model = convolutional()
    model[4] = Frozen(5).double()
    out = take(model, BATCH, epsilon=0.3, groups=2)
    assert list(out.stats) == ["1"]
    assert not out.perturbation["4"].mean.any()
    assert out.perturbation["1"].mean.any()


def test_a_batch_that_calls_no_layer_is_plain_training_and_the_next_is_perturbed() -> None:
    model = Drops()
    assert_plain(lambda: copy.deepcopy(model), BATCH)
    for step in (
        make_apart_step(model, F.cross_entropy, groups=2),
        make_one_pass_step(model, F.cross_entropy, epsilon=0.1, groups=2),
    ):
        for skips in (True, False, True):
            model.skips = skips
            out = step(*split_state(model), BATCH)
            assert out.all_finite
            assert list(out.stats) == ([] if skips else ["norm"])
            assert out.buffers["norm.num_batches_tracked"] == (0 if skips else 1)


def test_a_buffer_of_float64_in_a_float32_model_changes_neither_dtypes_nor_signs() -> None:
    """Profilers leave such counters in every module."""
    clean, left = convolutional(dtype=torch.float32), convolutional(dtype=torch.float32)
    for module in left.modules():
        module.register_buffer("total_ops", torch.zeros(1, dtype=torch.float64))
    batch = images(dtype=torch.float32)
    for take in (functional_step, one_pass):
        found, expected = take(left, batch, groups=2), take(clean, batch, groups=2)
        for field in ("grads", "stats", "perturbation", "adversarial_stats"):
            torch.testing.assert_close(getattr(found, field), getattr(expected, field), rtol=0, atol=0)
