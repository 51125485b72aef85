"""The layer: batch norm with perturbed statistics, on tensors alone, and the one place that chooses how to compute it.

With batch mean μ, biased variance σ², s = sqrt(σ² + eps), x̂ = (x − μ)/s and sg = stop-gradient,

    y = γ (1 + δσ) (x̂ − δμ · sg(μ/s)) + β

for every channel of every ghost group. Three forms compute the same:

    arithmetic_layer    under transforms and compilers, on any device      formula.py
    native_layer        eagerly, few activations, or float64               native.py
    KernelLayer         eagerly, many activations                          kernels.py

At δ = 0 and in one group, eagerly, `clean_batch_norm` is PyTorch's own.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from apart_func._torch import is_traced
from apart_func.layer.formula import Reduce, arithmetic_layer, statistics_dtype
from apart_func.layer.kernels import KernelLayer, outruns_batch_norm
from apart_func.layer.native import KERNEL_DEVICES, native_layer
from apart_func.trees import BatchStats, Perturbation, StatGrads


class Taps(NamedTuple):
    """The affine parameters of one call of a layer: what the loss is differentiated by for `statistic_gradients`.

    Attributes:
        weight: scale γ of this call, `(C,)`.
        bias: shift β of this call, `(C,)`.
    """

    weight: Tensor
    bias: Tensor


def clean_batch_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, BatchStats, Taps]:
    """Plain training-mode batch norm, and what the method wants to know of it. Eager only.

    Args:
        x: activations `(N, C, ...)`.
        weight: scale γ `(C,)`; None is 1.
        bias: shift β `(C,)`; None is 0.
        eps: BN's constant, added to the variance.

    Returns:
        The output, of `x`'s shape and dtype; batch statistics, `(C,)`, in at least float32; and the taps.
    """
    channels, dtype = x.shape[1], statistics_dtype(x.dtype)
    taps = Taps(_tap(weight, 1.0, channels, dtype, x.device), _tap(bias, 0.0, channels, dtype, x.device))
    if outruns_batch_norm(x):
        y, mean, var = KernelLayer.apply(x, *taps, None, None, eps, 1)
        return y, BatchStats(mean, var), taps
    # Running statistics that start from nothing and take the batch whole are the batch's.
    mean, var = torch.zeros(2, channels, dtype=dtype, device=x.device)
    y = torch.batch_norm(x, *taps, mean, var, True, 1.0, eps, torch.backends.cudnn.enabled)
    size = x.numel() // channels
    return y, BatchStats(mean, var * ((size - 1) / size)), taps


def _tap(vector: Tensor | None, default: float, channels: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor of this call alone, which the loss can be differentiated by."""
    if vector is None:
        return torch.full((channels,), default, dtype=dtype, device=device, requires_grad=True)
    if vector.requires_grad:
        return vector.to(dtype).view_as(vector)
    return vector.to(dtype).detach().requires_grad_()


def statistic_gradients(
    stats: Sequence[BatchStats], eps: Sequence[float], taps: Sequence[Taps], grads: Sequence[Taps]
) -> list[StatGrads]:
    """Gradients by the relative shifts at zero, which BN's backward yields on the way. Eager only.

    From y = γ (1 + δσ) (x̂ − δμ · sg(μ/s)) + β:  ∂/∂δσ = γ ∂/∂γ  and  ∂/∂δμ = −γ (μ/s) ∂/∂β.

    Args:
        stats: batch statistics of every call of a layer, `(C,)`.
        eps: BN's constant of each.
        taps: their affine parameters.
        grads: gradient of the loss by these.
    """

    def by_shift_and_scale(
        mean: Tensor, var: Tensor, weight: Tensor, g_weight: Tensor, g_bias: Tensor, eps: Any
    ) -> tuple[Tensor, ...]:
        return torch.mul(weight, g_bias).mul_(mean).mul_(torch.rsqrt(var + eps)).neg_(), weight * g_weight

    vectors = [
        (moments.mean, moments.var, tap.weight.detach(), g.weight, g.bias)
        for moments, tap, g in zip(stats, taps, grads, strict=True)
    ]
    return [StatGrads(*pair) for pair in over_layers(by_shift_and_scale, vectors, [(value,) for value in eps])]


def perturbed_batch_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    perturbation: Perturbation,
    *,
    groups: int = 1,
    reduce: Reduce | None = None,
) -> tuple[Tensor, BatchStats]:
    """Normalise by batch statistics that are shifted by a perturbation.

    Args:
        x: activations `(N, C, ...)`; row i is in ghost group i mod `groups`.
        weight: scale γ `(C,)`; None is 1.
        bias: shift β `(C,)`; None is 0.
        eps: BN's constant, added to the variance.
        perturbation: relative shifts (δμ, δσ), `(C,)` for all groups or `(groups, C)` for each.
        groups: number of ghost groups G ≥ 1, a divisor of N.
        reduce: averages a moment of every group over ranks, differentiably; None keeps those of this rank.

    Returns:
        The output, of `x`'s shape and dtype, and the groups' statistics without the perturbation, `(C,)` for one
        group, `(groups, C)` else, in at least float32.
    """
    weight, bias, shift, scale = vectors_of(x, weight, bias, perturbation)
    if reduce is not None:
        y, mean, var = arithmetic_layer(x, weight, bias, shift, scale, eps, groups, reduce)
    else:
        y, mean, var = _layer_for(x)(x, weight, bias, shift, scale, eps, groups)
    return y, BatchStats(mean, var) if groups == 1 else BatchStats(mean.view(groups, -1), var.view(groups, -1))


# Below this many activations, it costs more to start operators than to run them: benchmarks/layer_cost.py --sizes
SMALL = 2**15


def _layer_for(x: Tensor) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    """The form of the layer that is best for some activations; all compute the same."""
    if is_traced() or x.device.type not in KERNEL_DEVICES:
        return arithmetic_layer
    if x.dtype == torch.float64 or (x.dtype == torch.float32 and x.numel() < SMALL):
        return native_layer
    return KernelLayer.apply  # type: ignore[no-any-return]


def vectors_of(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, perturbation: Perturbation
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """γ, β, δμ and δσ of a layer, in the dtype of its statistics."""
    dtype = statistics_dtype(x.dtype)
    weight = x.new_ones(x.shape[1], dtype=dtype) if weight is None else weight.to(dtype)
    bias = x.new_zeros(x.shape[1], dtype=dtype) if bias is None else bias.to(dtype)
    mean, scale = perturbation
    return weight, bias, mean.to(dtype), scale.to(dtype)


def over_layers(
    function: Callable[..., tuple[Tensor, ...]],
    vectors: Sequence[tuple[Tensor, ...]],
    numbers: Sequence[tuple[float, ...]],
) -> list[tuple[Tensor, ...]]:
    """Apply arithmetic to the vectors of all layers at once, eagerly: a kernel for all, and not one for each.

    Args:
        function: of as many vectors and numbers as a layer has; every channel by itself.
        vectors: for every layer, tensors of one shape, with channels last.
        numbers: for every layer, what else the function takes.

    Returns:
        What the function returns, for every layer.
    """
    columns = list(zip(*vectors, strict=True))
    alike = all(len({(v.device, v.dtype) for v in column}) == 1 for column in columns) and len(set(numbers)) == 1
    if is_traced() or not alike or len(vectors) == 1:
        return [function(*of_layer, *values) for of_layer, values in zip(vectors, numbers, strict=True)]
    lengths = [of_layer[0].shape[-1] for of_layer in vectors]
    results = function(*(torch.cat(column, dim=-1) for column in columns), *numbers[0])
    return list(zip(*(torch.split(result, lengths, dim=-1) for result in results), strict=True))
