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
    mean: (
        Tensor  # batch mean μ of every ghost group, without the perturbation, `(G, C)`, in at least float32; a constant
    )
    var: Tensor  # biased variance σ², likewise


class Affine(NamedTuple):
    """What a layer applies to x̂, in the dtype of its statistics."""

    weight: Tensor  # γ, `(C,)`
    bias: Tensor  # β, `(C,)`
    shift: Tensor  # δμ, `(C,)` for all ghost groups or `(G, C)` for each
    scale: Tensor  # δσ, likewise


class InterleavedGroups(NamedTuple):
    """Ghost groups in which row i is in group i mod G: a dimension of their own, which is a view in every layout."""

    number: int

    def split(self, x: Tensor) -> Tensor:
        """Return activations `(N, C, ...)` as `(N/G, G, C, ...)`."""
        split: Tensor = x.unflatten(0, (-1, self.number))
        return split

    def mean(self, values: Tensor) -> Tensor:
        """Return the mean over every channel of every group, `(G, C)`."""
        return values.mean((0, *range(3, values.dim())))

    def spread(self, vectors: Tensor, values: Tensor) -> Tensor:
        """Return vectors `(G, C)` in a shape that broadcasts over `values`."""
        return vectors.reshape(*vectors.shape, *[1] * (values.dim() - 3))


class IndexedGroups(NamedTuple):
    """Ghost groups of any rows, which need not be alike in number; its methods are those of `InterleavedGroups`."""

    group: Tensor  # of every row, `(N,)`, int64
    sizes: Tensor  # values a channel in each group, `(G, 1)`, in the dtype of the statistics

    def split(self, x: Tensor) -> Tensor:
        """Return activations as they are."""
        return x

    def mean(self, values: Tensor) -> Tensor:
        """Return the mean over every channel of every group, `(G, C)`."""
        of_rows = values.flatten(2).sum(2) if values.dim() > 2 else values
        return of_rows.new_zeros(len(self.sizes), values.shape[1]).index_add(0, self.group, of_rows) / self.sizes

    def spread(self, vectors: Tensor, values: Tensor) -> Tensor:
        """Return vectors `(G, C)`, one for each row."""
        rows = vectors.expand(len(self.sizes), -1)[self.group]
        return rows.reshape(*rows.shape, *[1] * (values.dim() - 2))


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of statistics for activations of `dtype`: at least float32."""
    return torch.float64 if dtype is torch.float64 else torch.float32


def affine(x: Tensor, weight: Tensor | None, bias: Tensor | None, shift: Tensor, scale: Tensor) -> Affine:
    """Take γ, β and δ in the dtype of a layer's statistics; a γ of None is 1, a β of None is 0."""
    dtype = statistics_dtype(x.dtype)
    weight = x.new_ones(x.shape[1], dtype=dtype) if weight is None else weight
    bias = x.new_zeros(x.shape[1], dtype=dtype) if bias is None else bias
    return Affine(_to(weight, dtype), _to(bias, dtype), _to(shift, dtype), _to(scale, dtype))


def _to(vector: Tensor, dtype: torch.dtype) -> Tensor:
    return vector if vector.dtype is dtype else vector.to(dtype)


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
    # As a constant, `start` spares the backward a sum over the activations; `drift` is zero and has the mean's
    # gradient.
    start = mean.detach()
    drift = mean - start
    centred = values - groups.spread(start, values)
    var = groups.mean(centred.square()) - drift.square()
    if reduce is not None:
        mean, var = reduce(mean, var)
        drift, start = mean - start, mean.detach()
    invstd = torch.rsqrt(var + eps)
    gamma = weight * (1 + scale)
    slope = gamma * invstd
    intercept = bias - gamma * shift * (start * invstd.detach()) - drift * slope
    y = centred * groups.spread(slope, values) + groups.spread(intercept, values)
    return Normalized(unsafe_view(y.to(x.dtype), x.shape), start, var.detach())
