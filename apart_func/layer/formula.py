"""The layer in arithmetic that every transform, compiler and device knows.

    y = γ' x̂ + β − ω sg(μ/s)       x̂ = (x − μ)/s, s² = σ² + eps: by the statistics of every channel of every ghost group

It is the definition in operators of PyTorch, so vmap, every order of derivative, and Inductor work on it.
"""

from collections.abc import Callable

import torch
from einops import rearrange
from torch import Tensor

from apart_func._torch import as_shaped

# Sample i is in ghost group i mod G: the group is what varies fastest along the batch.
GROUP = "(b g) c ... -> b g c ..."
UNGROUP = "b g c ... -> (b g) c ..."
FOLD = "(b g) c ... -> b (g c) ..."
UNFOLD = "b (g c) ... -> (b g) c ..."

# From mean and variance of every channel of every group on this rank to those over all ranks, for synchronised layers.
Reduce = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of moments for activations of `dtype`: at least float32."""
    return torch.promote_types(dtype, torch.float32)


def arithmetic_layer(
    x: Tensor,
    gamma: Tensor,
    omega: Tensor | None,
    beta: Tensor,
    eps: float,
    groups: int,
    reduce: Reduce | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Normalise by perturbed statistics.

    The groups stand in a dimension of their own, which is a view in every memory layout. `start` is the mean as a
    constant: a backward through `grouped - mean` would have to sum over the activations once more.

    Args:
        x: activations `(N, C, ...)`; row i is in group i mod `groups`.
        gamma: γ' of every group, `(G·C,)`, in the dtype of the statistics.
        omega: ω, likewise; None is 0.
        beta: β, likewise.
        eps: BN's constant, added to the variance.
        groups: number of ghost groups G.
        reduce: makes moments over all ranks of those of this one, differentiably; None keeps these.

    Returns:
        y, of `x`'s shape and dtype, and mean and biased variance `(G·C,)` of every group.
    """
    grouped = rearrange(x, GROUP, g=groups).to(gamma.dtype)
    dims = (0, *range(3, grouped.dim()))
    mean = grouped.mean(dims, keepdim=True)
    start = mean.detach()
    centred = grouped - start
    var = centred.square().mean(dims, keepdim=True) - (mean - start).square()
    if reduce is not None:
        mean, var = reduce(mean, var)
    invstd = torch.rsqrt(var + eps)
    slope = gamma.view_as(invstd) * invstd
    intercept = beta.view_as(invstd) - (mean - start) * slope
    if omega is not None:
        intercept = intercept - omega.view_as(invstd) * (mean * invstd).detach()
    y = (centred * slope + intercept).to(x.dtype)
    return as_shaped(rearrange(y, UNGROUP), x.shape), mean.flatten(), var.flatten()


def indexed_layer(
    x: Tensor, gamma: Tensor, omega: Tensor, beta: Tensor, eps: float, groups: Tensor, sizes: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The layer for groups of any rows, which need not be alike in number.

    Args:
        x: activations `(R, C, ...)`.
        gamma: γ' of every group, `(G, C)`.
        omega: ω, likewise.
        beta: β, likewise.
        eps: BN's constant.
        groups: the group of every row, `(R,)`.
        sizes: values a channel in each group, `(G, 1)`.

    Returns:
        y, and mean and biased variance `(G, C)` of every group.
    """
    rows = x.to(gamma.dtype)
    positions = list(range(2, x.dim()))

    def mean_of(values: Tensor) -> Tensor:
        of_rows = values.sum(positions) if positions else values
        return torch.zeros_like(gamma).index_add(0, groups, of_rows) / sizes

    def to_rows(of_groups: Tensor) -> Tensor:
        return of_groups[groups].reshape(*x.shape[:2], *[1] * len(positions))

    mean = mean_of(rows)
    centred = rows - to_rows(mean)
    var = mean_of(centred.square())
    invstd = torch.rsqrt(var + eps)
    intercept = beta - omega * (mean * invstd).detach()
    y = (centred * to_rows(gamma * invstd) + to_rows(intercept)).to(x.dtype)
    return y, mean, var
