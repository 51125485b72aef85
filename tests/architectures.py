"""Random batch-norm networks for Hypothesis: a description that prints well, and what it describes.

A failing example shows an `Architecture`, which is all that is needed to build the same model and batch again.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch
from hypothesis import assume
from hypothesis import strategies as st
from torch import Tensor, nn

# How many networks a test tries: EXAMPLES=1000 python -m pytest -k any_architecture tests/core
EXAMPLES = int(os.environ.get("EXAMPLES", 60))
CLASSES = 3
ORDERS = ("consecutive", "interleaved", "function", "uneven")
CONVOLUTIONS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)  # by number of position axes
NORMS = (nn.BatchNorm1d, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
SMOOTH = {"identity": nn.Identity, "tanh": nn.Tanh, "silu": nn.SiLU, "elu in place": lambda: nn.ELU(inplace=True)}
KINKED = {
    "relu": nn.ReLU,
    "relu in place": lambda: nn.ReLU(inplace=True),
    "leaky relu in place": lambda: nn.LeakyReLU(inplace=True),
}
ACTIVATIONS = SMOOTH | KINKED


@dataclass(frozen=True)
class Norm:
    """A batch-norm layer; the block calls it `calls` times."""

    affine: bool
    frozen_scale: bool
    momentum: float | None
    eps: float
    tracked: bool
    training: bool
    calls: int


@dataclass(frozen=True)
class Block:
    """Convolution, then norm and activation `norm.calls` times, and a shortcut around it all if it is residual."""

    width: int
    bias: bool
    norm: Norm
    activation: str
    residual: bool


@dataclass(frozen=True)
class Architecture:
    """A network, its batch and the settings of a step; `positions` has the lengths of up to three axes.

    With more than one point a sample, the rows of the first blocks' layers are points; from block `pooled_from` on they
    are samples. `rows` says how points stand in a batch: those of a sample after one another (also where a function
    says so), one of every sample in turn, or "uneven": some samples have fewer.
    """

    channels: int
    positions: tuple[int, ...]
    blocks: tuple[Block, ...]
    uncalled_norm: bool
    samples: int
    ratio: float
    groups: int
    epsilon: float
    dtype: torch.dtype
    seed: int
    points: int = 1
    rows: str = "consecutive"
    pooled_from: int = 0

    def settings(self) -> dict[str, Any]:
        """Those of a step of two passes."""
        return {"epsilon": self.epsilon, "groups": self.groups, "ratio": self.ratio, "rows": self.rows_setting()}

    def rows_setting(self) -> Any:
        """The setting `rows` that tells a step which rows are a sample's."""
        if self.points == 1:
            return None
        return self._sample_of_rows if self.rows in ("function", "uneven") else self.rows

    def _sample_of_rows(self, layer: str, x: Tensor) -> Tensor:
        if int(layer.split(".")[1]) >= self.pooled_from:
            return torch.arange(len(x))
        return samples_of_points(self.samples, self.points, self.rows)[: len(x)]

    def build(self) -> tuple[nn.Module, tuple[Tensor, Tensor]]:
        """The model in its mode, and one batch `(input, target)`; the seed decides every value in them."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            model = Network(self)
            # Channels with means of their own: where μ = 0, a shifted mean changes nothing.
            shape = (self.samples, *([self.points] if self.points > 1 else []), self.channels, *self.positions)
            x = torch.randn(shape) + torch.randn(self.channels).reshape(-1, *[1] * len(self.positions))
            y = torch.randint(CLASSES, (self.samples,))
        return model.to(self.dtype), (x.to(self.dtype), y)


def samples_of_points(samples: int, points: int, rows: str) -> Tensor:
    """The sample of every point in a batch: `points` of each, or from 1 to `points` where they are uneven."""
    counts = 1 + torch.arange(samples) % points if rows == "uneven" else torch.full((samples,), points)
    return torch.arange(samples).repeat_interleave(counts)


class Network(nn.Module):
    """Blocks, the mean over positions, and a linear head."""

    def __init__(self, architecture: Architecture) -> None:
        super().__init__()
        axes, channels, blocks = len(architecture.positions), architecture.channels, []
        for block in architecture.blocks:
            blocks.append(BlockLayers(block, channels, axes))
            channels = block.width
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(channels, CLASSES)
        self.points, self.rows, self.pooled_from = architecture.points, architecture.rows, architecture.pooled_from
        if architecture.uncalled_norm:
            self.uncalled = nn.BatchNorm1d(2)

    def forward(self, x: Tensor) -> Tensor:
        if self.points > 1:
            take, pool = self.to_points(x)
            x = pool(self.blocks[: self.pooled_from](take(x)))
        x = self.blocks[self.pooled_from :](x)
        return self.head(x.flatten(2).mean(2) if x.dim() > 2 else x)

    def to_points(self, x: Tensor) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
        """From `(samples, points, ...)` to rows, and from rows to the mean over those of each sample."""
        samples, points = len(x), self.points
        if self.rows == "interleaved":
            return lambda x: x.transpose(0, 1).flatten(0, 1), lambda rows: rows.unflatten(0, (points, samples)).mean(0)
        of_rows = samples_of_points(samples, points, self.rows)
        counts = of_rows.bincount()
        kept = torch.arange(points) < counts[:, None]

        def pool(rows: Tensor) -> Tensor:
            sums = rows.new_zeros(samples, *rows.shape[1:]).index_add(0, of_rows, rows)
            return sums / counts.to(rows.dtype).view(-1, *[1] * (rows.dim() - 1))

        return lambda x: x[kept], pool


class BlockLayers(nn.Module):
    """The layers of one `Block`, none of them at its initial value."""

    def __init__(self, block: Block, channels: int, axes: int) -> None:
        super().__init__()
        size = () if axes == 0 else (3,)
        padding = {} if axes == 0 else {"padding": 1}
        self.conv = CONVOLUTIONS[axes](channels, block.width, *size, bias=block.bias, **padding)
        self.norm = NORMS[axes](
            block.width,
            eps=block.norm.eps,
            momentum=block.norm.momentum,
            affine=block.norm.affine,
            track_running_stats=block.norm.tracked,
        )
        self.norm.train(block.norm.training)
        if block.norm.affine:
            # γ of both signs: the statistic gradients change theirs with it
            nn.init.uniform_(self.norm.weight, 0.5, 1.5)
            self.norm.weight.data *= torch.randn(block.width).sign()
            nn.init.normal_(self.norm.bias)
            self.norm.weight.requires_grad_(not block.norm.frozen_scale)
        if block.norm.tracked:
            self.norm.running_mean.normal_()
            self.norm.running_var.uniform_(0.5, 2)
            self.norm.num_batches_tracked.random_(5)
        self.activation = ACTIVATIONS[block.activation]()
        self.calls, self.residual = block.norm.calls, block.residual

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        for _ in range(self.calls):
            y = self.activation(self.norm(y))
        return x + y if self.residual else y


def norms(max_calls: int) -> st.SearchStrategy[Norm]:
    """Layers of every kind, most of them ordinary."""
    return st.builds(
        Norm,
        affine=st.sampled_from([True, True, True, False]),
        frozen_scale=st.sampled_from([False, False, False, True]),
        momentum=st.sampled_from([0.1, 0.3, 0.0, 1.0, None]),
        eps=st.sampled_from([1e-5, 1e-3]),
        tracked=st.sampled_from([True, True, True, False]),
        training=st.sampled_from([True, True, True, False]),
        calls=st.sampled_from([1, 1, 1, max_calls]),
    )


def group_counts(samples: int, positions: int, smallest: int) -> list[int]:
    """Every setting of `groups` under which each group has at least `smallest` values a channel; the finest first."""
    divisors = [g for g in range(samples, 0, -1) if samples % g == 0 and samples // g * positions >= smallest]
    return [-1, *divisors] if samples in divisors else divisors


@st.composite
def architectures(draw: st.DrawFn) -> Architecture:
    """Networks with one layer in training mode at least, on batches where every group has a variance.

    What would enlarge rounding errors is left to float64: groups of a few values, which can have next to no variance,
    and radii that make another network. Half precision is also spared what makes its errors large in plain training:
    kinks, layers of one or two channels, and normalising a second time what a saturated activation has left. It
    gets no three axes either: oneDNN's Conv3d returns garbage for some small inputs (torch 2.14 on a Xeon with AMX).
    """
    dtype = draw(st.sampled_from([torch.float64, torch.float64, torch.float64, torch.float32, torch.bfloat16]))
    double, half = dtype is torch.float64, dtype is torch.bfloat16
    positions = tuple(draw(st.lists(st.integers(1, 3), max_size=3)))
    assume(not (half and len(positions) == 3))
    samples = draw(st.sampled_from([4, 8, 6, 12, 5, 2])) * (1 if double else 8)
    ratio = draw(st.sampled_from([1.0, 0.5, 0.75]))
    smallest_group = 2 if double else 8
    if int(ratio * samples) * prod(positions) < smallest_group:
        ratio = 1.0
    groups = draw(st.sampled_from([0, *group_counts(int(ratio * samples), prod(positions), smallest_group)]))

    widths = (4, 8) if half else (1, 4)
    channels = width = draw(st.integers(*widths))
    blocks = []
    for _ in range(draw(st.integers(1, 4))):
        norm = draw(norms(max_calls=1 if half else 2))
        residual = draw(st.booleans())
        width = width if residual else draw(st.integers(*widths))
        # Without a β, a channel that is constant (all ReLUs before it are off) sits on the kink of the next one.
        kinks = norm.affine and not half
        activation = draw(st.sampled_from(sorted(ACTIVATIONS if kinks else SMOOTH)))
        blocks.append(Block(width, draw(st.booleans()), norm, activation, residual))
    points = draw(st.sampled_from([1, 1, 2, 3]))
    if not any(block.norm.training for block in blocks):
        first = blocks[0]
        blocks[0] = replace(first, norm=replace(first.norm, training=True))

    return Architecture(
        channels=channels,
        positions=positions,
        blocks=tuple(blocks),
        uncalled_norm=draw(st.sampled_from([False, False, True])),
        samples=samples,
        ratio=ratio,
        groups=groups,
        epsilon=draw(st.sampled_from([0.05, 0.2, 0.9] if double else [0.05, 0.2])),
        dtype=dtype,
        seed=draw(st.integers(0, 2**16)),
        points=points,
        rows=draw(st.sampled_from(ORDERS)) if points > 1 else ORDERS[0],
        pooled_from=draw(st.integers(1, len(blocks))) if points > 1 else 0,
    )
