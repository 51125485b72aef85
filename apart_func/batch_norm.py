"""The mathematics: batch norm with perturbed statistics, as a formula in plain operators.

    y = γ (1 + δσ) (x̂ − δμ · sg(μ/s)) + β          x̂ = (x − μ)/s,  s² = σ² + eps,  sg = stop-gradient

for every channel of every ghost group: batch norm whose mean is μ(1 + δμ) and whose deviation is s/(1 + δσ).
Transforms, compilers, every device and every order of derivative know these operators; `kernels.py` is the same as one
node of autograd.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from apart_func._torch import unsafe_view

# From mean and variance of every group on this rank to those over all ranks, for synchronised layers.
Reduce = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


class Normalized(NamedTuple):
    """What a call of a layer returns."""

    y: Tensor  # of the activations' shape and dtype
    mean: Tensor  # batch mean μ, not perturbed, `(G, C)`, or `(C,)` for one group, in at least float32; a constant
    var: Tensor  # biased variance σ², likewise


class Affine(NamedTuple):
    """What a layer applies to x̂, in the dtype of its statistics."""

    weight: Tensor  # γ, `(C,)`
    bias: Tensor  # β, `(C,)`
    shift: Tensor  # δμ, `(C,)` for all ghost groups or `(G, C)` for each
    scale: Tensor  # δσ, likewise


class InterleavedGroups(NamedTuple):
    """Ghost groups in which row i is in group i mod G: a dimension of their own, which one group does without."""

    number: int

    def split(self, x: Tensor) -> Tensor:
        """Return activations `(N, C, ...)` as `(N/G, G, C, ...)`."""
        return x if self.number == 1 else x.unflatten(0, (-1, self.number))

    def mean(self, values: Tensor) -> Tensor:
        """Return the mean over every channel of every group, in a shape that broadcasts over the values."""
        return values.mean((0, *range(2 + (self.number > 1), values.dim())), keepdim=True)

    def spread(self, vectors: Tensor, positions: int) -> Tensor:
        """Return vectors `(C,)` or `(G, C)` in such a shape."""
        return vectors.reshape(*vectors.shape, *[1] * positions)

    def vectors(self, means: Tensor) -> Tensor:
        """Return means as `(G, C)`, or `(C,)` for one group."""
        return means.flatten() if self.number == 1 else means.reshape(self.number, -1)


class IndexedGroups(NamedTuple):
    """Ghost groups of any rows, which need not be alike in number; its methods are those of `InterleavedGroups`."""

    group: Tensor  # of every row, `(N,)`, int64
    sizes: Tensor  # values a channel in each group, `(G, 1)`, in the dtype of the statistics

    def split(self, x: Tensor) -> Tensor:
        """Return activations as they are."""
        return x

    def mean(self, values: Tensor) -> Tensor:
        """Return the mean over every channel of every group, for each row."""
        of_rows = values.flatten(2).sum(2) if values.dim() > 2 else values
        sums = of_rows.new_zeros(len(self.sizes), values.shape[1]).index_add(0, self.group, of_rows)
        return self.spread(sums / self.sizes, values.dim() - 2)

    def spread(self, vectors: Tensor, positions: int) -> Tensor:
        """Return vectors `(C,)` or `(G, C)` for each row."""
        rows = vectors if vectors.dim() == 1 else vectors[self.group]
        return rows.reshape(*rows.shape, *[1] * positions)

    def vectors(self, means: Tensor) -> Tensor:
        """Return means as `(G, C)`."""
        rows = means.flatten(1)
        return rows.new_zeros(len(self.sizes), rows.shape[1]).index_put((self.group,), rows)


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of statistics for activations of `dtype`: at least float32."""
    return torch.float64 if dtype is torch.float64 else torch.float32


def affine(x: Tensor, weight: Tensor | None, bias: Tensor | None, shift: Tensor, scale: Tensor) -> Affine:
    """Take γ, β and δ in the dtype of a layer's statistics; a γ of None is 1, a β of None is 0."""
    dtype = statistics_dtype(x.dtype)
    weight = x.new_ones(x.shape[1], dtype=dtype) if weight is None else weight
    bias = x.new_zeros(x.shape[1], dtype=dtype) if bias is None else bias
    return Affine(*[vector if vector.dtype is dtype else vector.to(dtype) for vector in (weight, bias, shift, scale)])


def formula(
    x: Tensor, vectors: Affine, eps: float, groups: InterleavedGroups | IndexedGroups, reduce: Reduce | None = None
) -> Normalized:
    """Normalise by perturbed statistics.

    Args:
        x: activations `(N, C, ...)`.
        vectors: γ, β, δμ and δσ.
        eps: BN's constant, added to the variance.
        groups: the ghost groups of the rows.
        reduce: makes moments over all ranks from those of this one, differentiably; None keeps these.
    """
    weight, bias, shift, scale = vectors
    values = groups.split(x).to(weight.dtype)
    mean = groups.mean(values)
    centred = values - mean
    var = groups.mean(centred.square())
    if reduce is not None:
        mean, var = reduce(mean, var)
        centred = values - mean
    invstd = torch.rsqrt(var + eps)
    gamma, beta, shifted = (groups.spread(v, x.dim() - 2) for v in (weight * (1 + scale), bias, shift))
    y = centred * (gamma * invstd) + (beta - gamma * shifted * (mean * invstd).detach())
    y = y.to(x.dtype)
    mean, var = groups.vectors(mean.detach()), groups.vectors(var.detach())
    return Normalized(y if y.shape == x.shape else unsafe_view(y, x.shape), mean, var)
