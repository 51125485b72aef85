"""The layer in arithmetic that every transform, compiler and device knows.

    y = γ (1 + δσ) (x̂ − δμ · sg(μ/s)) + β                        μ, s² = σ² + eps: of every channel of every ghost group

It is the definition in operators of PyTorch, so vmap, every order of derivative, and Inductor work on it.
"""

from collections.abc import Callable

import torch
from einops import rearrange
from torch import Tensor

from apart_func._torch import as_itself

# Sample i is in ghost group i mod G: the group is what varies fastest along the batch.
GROUP = "(b g) c ... -> b g c ..."
UNGROUP = "b g c ... -> (b g) c ..."
FOLD = "(b g) c ... -> b (g c) ..."
UNFOLD = "b (g c) ... -> (b g) c ..."

# The mean over ranks of a mean and a mean square, both `(G, C)`, for layers that are synchronised.
Reduce = Callable[[Tensor], Tensor]


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of moments for activations of `dtype`: at least float32."""
    return torch.promote_types(dtype, torch.float32)


def arithmetic_layer(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    shift: Tensor | None,
    scale: Tensor | None,
    eps: float,
    groups: int,
    reduce: Reduce | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Normalise by perturbed statistics; arguments and results as in `kernels.KernelLayer`.

    The groups stand in a dimension of their own, which is a view in every memory layout. `drift` is zero and has the
    mean's derivative: a backward through `grouped - mean` would have to sum over the activations once more.
    """
    grouped = rearrange(x, GROUP, g=groups).to(weight.dtype)
    dims = (0, *range(3, grouped.dim()))
    mean = grouped.mean(dims, keepdim=True)
    if reduce is not None:
        mean = reduce(mean)
    drift = mean - mean.detach()
    centred = grouped - mean.detach()
    square = centred.square().mean(dims, keepdim=True)
    if reduce is not None:
        square = reduce(square)
    var = square - drift.square()
    invstd = torch.rsqrt(var + eps)
    gamma = _column(weight if scale is None else weight * (1 + scale), x)
    slope = gamma * invstd
    intercept = _column(bias, x) - drift * slope
    if shift is not None:
        intercept = intercept - gamma * _column(shift, x) * (mean * invstd).detach()
    y = (centred * slope + intercept).to(x.dtype)
    return as_itself(rearrange(y, UNGROUP)), mean.flatten(), var.flatten()


def indexed_layer(
    x: Tensor, weight: Tensor, bias: Tensor, shift: Tensor, scale: Tensor, eps: float, groups: Tensor, sizes: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The layer for groups of any rows, which need not be alike in number.

    Args:
        x: activations `(R, C, ...)`.
        weight: γ `(C,)`.
        bias: β `(C,)`.
        shift: δμ, `(C,)` or `(G, C)`.
        scale: δσ, likewise.
        eps: BN's constant.
        groups: the group of every row, `(R,)`.
        sizes: values a channel in each group, `(G, 1)`.

    Returns:
        y, and mean and biased variance `(G, C)` of every group.
    """
    rows = x.to(weight.dtype)
    positions = range(2, x.dim())

    def mean_of(values: Tensor) -> Tensor:
        of_rows = values.sum(list(positions)) if len(positions) else values
        return torch.zeros(len(sizes), x.shape[1], dtype=rows.dtype, device=x.device).index_add(0, groups, of_rows) / sizes

    def to_rows(of_groups: Tensor) -> Tensor:
        return _column(of_groups.expand(len(sizes), -1)[groups], x)

    mean = mean_of(rows)
    centred = rows - to_rows(mean)
    var = mean_of(centred.square())
    invstd = torch.rsqrt(var + eps)
    gamma = weight * (1 + scale)
    intercept = bias - gamma * shift * (mean * invstd).detach()
    y = (centred * to_rows(gamma * invstd) + to_rows(intercept)).to(x.dtype)
    return y, mean, var


def _column(vector: Tensor, x: Tensor) -> Tensor:
    """Vectors of channels as what is broadcast over the positions of every channel."""
    return vector.reshape(*vector.shape, *[1] * (x.dim() - 2))
