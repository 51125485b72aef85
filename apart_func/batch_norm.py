"""The layer: batch norm with perturbed statistics, on tensors alone.

With batch mean μ, biased variance σ², s = sqrt(σ² + eps), x̂ = (x − μ)/s and sg = stop-gradient,

    y = γ (1 + δσ) (x̂ − δμ · sg(μ/s)) + β                                              (DESIGN section 2)

for every channel of every ghost group. Ghost groups are channels of their own: `(b g) c -> b (g c)`. So one
kernel serves both passes, and a perturbed layer costs what a plain one costs.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from apart_func.autodiff import is_traced
from apart_func.errors import BatchError, SettingError
from apart_func.kernels import (
    KERNEL_DEVICES,
    differentiate,
    fold_groups,
    moments,
    normalize,
    outruns_batch_norm,
    statistics_dtype,
    unfold_groups,
)
from apart_func.pytrees import BatchStats, Perturbation


class Taps(NamedTuple):
    """The affine parameters of one call of a layer: what the loss is differentiated by for `statistic_gradients`.

    Attributes:
        weight: scale γ of this call, `(C,)`.
        bias: shift β of this call, `(C,)`.
    """

    weight: Tensor
    bias: Tensor


class Call(NamedTuple):
    """One call of a layer in a proxy pass.

    Attributes:
        stats: batch statistics, `(C,)` each.
        size: values a channel in the batch.
        eps: BN's constant.
        taps: the affine parameters, where the pass is eager.
    """

    stats: BatchStats
    size: int
    eps: float
    taps: Taps | None


class RunningStats(NamedTuple):
    """The statistics that a layer keeps for evaluation.

    Attributes:
        mean: running mean `(C,)`.
        var: running variance `(C,)`, unbiased.
        batches: `num_batches_tracked`, 0-d, integer.
    """

    mean: Tensor
    var: Tensor
    batches: Tensor


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
        y, mean, var = _KernelLayer.apply(x, *taps, None, None, eps, 1)
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


def statistic_gradients(calls: list[Call], grads: list[Taps]) -> list[BatchStats]:
    """Gradients by the relative shifts at zero, which BN's backward yields on the way. Eager only.

    From y = γ (1 + δσ) (x̂ − δμ · sg(μ/s)) + β:  ∂/∂δσ = γ ∂/∂γ  and  ∂/∂δμ = −γ (μ/s) ∂/∂β.

    Args:
        calls: calls of layers, with taps.
        grads: gradient of the loss by the taps of each.
    """

    def by_shift_and_scale(
        mean: Tensor, var: Tensor, weight: Tensor, g_weight: Tensor, g_bias: Tensor, eps: Any
    ) -> tuple[Tensor, ...]:
        return -weight * g_bias * mean * torch.rsqrt(var + eps), weight * g_weight

    vectors = [
        (call.stats.mean, call.stats.var, call.taps.weight.detach(), g.weight, g.bias)
        for call, g in zip(calls, grads, strict=True)
        if call.taps
    ]
    return [BatchStats(*pair) for pair in over_layers(by_shift_and_scale, vectors, [(call.eps,) for call in calls])]


def perturbed_batch_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    perturbation: Perturbation,
    *,
    groups: int = 1,
) -> tuple[Tensor, BatchStats]:
    """Normalise by batch statistics that are shifted by a perturbation.

    Args:
        x: activations `(N, C, ...)`; row i is in ghost group i mod `groups`.
        weight: scale γ `(C,)`; None is 1.
        bias: shift β `(C,)`; None is 0.
        eps: BN's constant, added to the variance.
        perturbation: relative shifts (δμ, δσ), `(C,)` for all groups or `(groups, C)` for each.
        groups: number of ghost groups G ≥ 1, a divisor of N.

    Returns:
        The output, of `x`'s shape and dtype, and the groups' statistics without the perturbation, `(C,)` for one
        group, `(groups, C)` else, in at least float32.
    """
    dtype = statistics_dtype(x.dtype)
    weight = x.new_ones(x.shape[1], dtype=dtype) if weight is None else weight.to(dtype)
    bias = x.new_zeros(x.shape[1], dtype=dtype) if bias is None else bias.to(dtype)
    shift, scale = (vector.to(dtype) for vector in perturbation)
    y, mean, var = _layer_for(x, scale)(x, weight, bias, shift, scale, eps, groups)
    return y, BatchStats(mean, var) if groups == 1 else BatchStats(mean.view(groups, -1), var.view(groups, -1))


def _layer_for(x: Tensor, scale: Tensor) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    """The form of the layer that is best for some activations; all compute the same."""
    if is_traced() or x.device.type not in KERNEL_DEVICES:
        return _arithmetic_layer
    if x.numel() < SMALL and x.dtype == scale.dtype:
        return _small_layer
    return _KernelLayer.apply  # type: ignore[no-any-return]


def number_of_groups(groups: int, samples: int) -> int:
    """G for a setting of `groups` (0: one, -1: one a sample).

    Raises:
        SettingError: `groups` is no such setting.
        BatchError: G does not divide the samples.
    """
    if groups < -1:
        raise SettingError(f"groups={groups}; expected a positive number, 0 for one group, or -1 for one a sample.")
    if groups == -1:
        return samples
    if groups > 1 and samples % groups:
        raise BatchError(
            f"groups={groups} does not divide the {samples} samples of the adversarial pass. Use a batch size and "
            "ratio that give a multiple, drop_last=True in the data loader, or remainder='drop'."
        )
    return max(groups, 1)


def check_input(name: str, x: Tensor, channels: int, groups: int = 1) -> None:
    """Make sure that every group has a variance in a layer.

    Raises:
        BatchError: naming the layer.
    """
    if x.dim() < 2 or x.shape[1] != channels:
        raise BatchError(f"layer {name!r} got input of shape {tuple(x.shape)}; expected (N, {channels}, ...).")
    rows = x.shape[0]
    if rows % groups:
        raise BatchError(f"layer {name!r} sees {rows} rows, which groups={groups} does not divide. Use another number.")
    if x.numel() > groups * channels:
        return
    positions = "×".join(map(str, x.shape[2:])) or "1"
    if groups == 1:
        raise BatchError(
            f"layer {name!r} sees one value a channel ({rows} samples, {positions} positions), so it has no variance. "
            "Use a larger batch, or put the layer in evaluation mode."
        )
    raise BatchError(
        f"layer {name!r} sees one value a channel in each of {groups} groups ({rows} samples, {positions} positions), "
        f"so it has no variance. Use fewer groups (groups={max(rows // 2, 1)} leaves two) or a larger batch."
    )


# Below this many activations, it costs more to start operators than to run them.
SMALL = 2**15


class _KernelLayer(torch.autograd.Function):
    """The layer of large activations: `normalize` and `differentiate` of kernels.py, and arithmetic on vectors."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        shift: Tensor | None,
        scale: Tensor | None,
        eps: float,
        groups: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        factor, move = (None if vector is None else 1 + vector for vector in (scale, shift))
        gamma = _for_each_group(weight if factor is None else weight * factor, groups)
        beta = _for_each_group(bias, groups)
        y, mean, var = normalize(x, gamma, beta, None if move is None else _for_each_group(move, groups), eps, groups)
        ctx.groups = groups
        ctx.save_for_backward(x, weight, gamma, shift, factor, mean, (var + eps).rsqrt_())
        ctx.mark_non_differentiable(mean, var)
        ctx.set_materialize_grads(False)  # no zeros for these two
        return y, mean, var

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None, *_: Tensor) -> tuple[Tensor | None, ...]:
        if grad is None:
            return (None,) * 7
        x, weight, gamma, shift, factor, mean, invstd = ctx.saved_tensors
        for_x, for_weight, for_bias, for_shift, for_scale = ctx.needs_input_grad[:5]
        grad_x, g_gamma, g_beta = differentiate(grad, x, gamma, mean, invstd, ctx.groups, for_x)
        g_gamma, g_beta = g_gamma.view(ctx.groups, -1), g_beta.view(ctx.groups, -1)
        g_shift = None
        if shift is not None:  # y = γ' (x̂ − δμ · offset) + β with γ' = γ (1 + δσ) and offset = sg(μ/s)
            g_offset = (mean * invstd).view(ctx.groups, -1) * g_beta
            g_gamma = torch.addcmul(g_gamma, g_offset, shift, value=-1)
            g_shift = _summed(-gamma.view(ctx.groups, -1) * g_offset, shift.shape) if for_shift else None
        return (
            grad_x,
            _summed(g_gamma if factor is None else g_gamma * factor, weight.shape) if for_weight else None,
            _summed(g_beta, weight.shape) if for_bias else None,
            g_shift,
            _summed(g_gamma * weight, factor.shape) if for_scale else None,
            None,
            None,
        )


def _small_layer(
    x: Tensor, weight: Tensor, bias: Tensor, shift: Tensor, scale: Tensor, eps: float, groups: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The layer of small activations: few operators, all of which autograd differentiates without Python."""
    folded = fold_groups(x, groups)
    mean, var = moments(folded.detach())
    moved = ((mean * torch.rsqrt(var + eps)).view(groups, -1) * -shift).view(-1)
    standard = torch.batch_norm(folded, None, moved, None, None, True, 0.0, eps, torch.backends.cudnn.enabled)
    gamma = weight * (1 + scale)
    if gamma.dim() == 1:
        standard = unfold_groups(standard, x)
    else:
        gamma, bias = gamma.view(-1), bias.expand(groups, -1).reshape(-1)
    # An affine map, as batch norm in evaluation mode, whose backward sums both gradients in one go.
    center, spread = torch.zeros_like(gamma), torch.ones_like(gamma)
    y = unfold_groups(torch.batch_norm(standard, gamma, bias, center, spread, False, 0.0, 0.0, False), x)
    return y, mean, var


def _arithmetic_layer(
    x: Tensor, weight: Tensor, bias: Tensor, shift: Tensor, scale: Tensor, eps: float, groups: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The layer in arithmetic that every transform, compiler and device knows.

    The groups stand in a dimension of their own, which is a view in every memory layout. `drift` is zero and has the
    mean's derivative: a backward through `grouped - mean` would have to sum over the activations once more.
    """
    grouped = x.unflatten(0, (-1, groups)).to(weight.dtype)
    dims = (0, *range(3, grouped.dim()))
    mean = grouped.mean(dims, keepdim=True)
    drift = mean - mean.detach()
    centred = grouped - mean.detach()
    var = centred.square().mean(dims, keepdim=True) - drift.square()
    invstd = torch.rsqrt(var + eps)
    gamma = _column(weight * (1 + scale), x)
    slope = gamma * invstd
    intercept = _column(bias, x) - drift * slope - gamma * _column(shift, x) * (mean * invstd).detach()
    y = (centred * slope + intercept).to(x.dtype)
    return unfold_groups(y, x), mean.flatten(), var.flatten()


def _column(vector: Tensor, x: Tensor) -> Tensor:
    """`(C,)` or `(G, C)` as what is broadcast over the positions of every channel."""
    return vector.reshape(*vector.shape, *[1] * (x.dim() - 2))


def _for_each_group(vector: Tensor, groups: int) -> Tensor:
    """`(C,)` or `(G, C)` as `(G·C,)`, contiguous in memory: the kernels do not look at strides."""
    if groups > 1 and vector.dim() == 1:
        vector = vector.expand(groups, -1)
    return vector.contiguous().view(-1)


def _summed(grad: Tensor, shape: torch.Size) -> Tensor:
    """The gradient of a `(C,)` or `(G, C)` vector from `(G, C)`, that of its use in every group."""
    return grad.view(shape) if grad.numel() == shape.numel() else grad.sum(0)


def pooled(stats: list[BatchStats], groups: int) -> list[BatchStats]:
    """Statistics of the samples of the first ghost groups together, for several layers.

    Groups are of one size, so the mean is the mean of their means, and the variance the mean of their variances plus
    the variance of their means.

    Args:
        stats: those of each group, `(G, C)`.
        groups: how many of them to pool.
    """

    def over_groups(mean: Tensor, var: Tensor) -> tuple[Tensor, ...]:
        mean, var = mean[:groups], var[:groups]
        return mean.mean(0), var.mean(0) + mean.var(0, unbiased=False)

    return [BatchStats(*pair) for pair in over_layers(over_groups, stats, [()] * len(stats))]


def advance_running_stats(
    running: list[RunningStats], stats: list[BatchStats], sizes: list[int], momenta: list[float | None]
) -> list[RunningStats]:
    """Move running statistics by one batch, as plain batch norm does, for several layers.

    Args:
        running: the values before.
        stats: batch statistics, `(C,)` each.
        sizes: values a channel in the batch; the running variance takes the unbiased estimate.
        momenta: weight of this batch; None weighs all batches alike (cumulative average).

    Returns:
        The values after, in the dtypes they had.
    """
    counts = [before.batches + 1 for before in running]

    def moved(
        old_mean: Tensor, old_var: Tensor, mean: Tensor, var: Tensor, correction: Any, weight: Any
    ) -> tuple[Tensor, ...]:
        # computed in the dtype of the batch's statistics, and returned in that of the running ones
        mean = torch.lerp(old_mean.to(mean.dtype), mean, weight).to(old_mean.dtype)
        var = torch.lerp(old_var.to(var.dtype), var * correction, weight).to(old_var.dtype)
        return mean, var

    vectors = [(old.mean, old.var, new.mean, new.var) for old, new in zip(running, stats, strict=True)]
    numbers = [
        (size / (size - 1), torch.reciprocal(count.to(new.mean.dtype)) if momentum is None else momentum)
        for size, momentum, count, new in zip(sizes, momenta, counts, stats, strict=True)
    ]
    after = over_layers(moved, vectors, numbers)
    return [RunningStats(mean, var, count) for (mean, var), count in zip(after, counts, strict=True)]


def over_layers(
    function: Callable[..., tuple[Tensor, ...]],
    vectors: Sequence[tuple[Tensor, ...]],
    numbers: Sequence[tuple[Any, ...]],
) -> list[tuple[Tensor, ...]]:
    """Apply arithmetic to the statistics of all layers at once: a kernel for all, and not one for each.

    Args:
        function: of as many vectors and numbers as a layer has; every channel by itself.
        vectors: for every layer, tensors of one shape, with channels last.
        numbers: for every layer, floats or 0-d tensors.

    Returns:
        What the function returns, for every layer.
    """
    columns = list(zip(*vectors, strict=True))
    alike = all(len({(v.device, v.dtype) for v in column}) == 1 for column in columns)
    if is_traced() or not alike or len(vectors) == 1:
        return [function(*of_layer, *values) for of_layer, values in zip(vectors, numbers, strict=True)]
    lengths = [of_layer[0].shape[-1] for of_layer in vectors]
    joined = [torch.cat(column, dim=-1) for column in columns]
    results = function(*joined, *(_per_channel(values, lengths, joined[-1]) for values in zip(*numbers, strict=True)))
    return list(zip(*(torch.split(result, lengths, dim=-1) for result in results), strict=True))


def _per_channel(values: tuple[Any, ...], lengths: list[int], like: Tensor) -> Any:
    """One number for all layers where they agree, else a vector with each layer's number in all of its channels."""
    if not any(isinstance(value, Tensor) for value in values):
        if len(set(values)) == 1:
            return values[0]
        values = tuple(like.new_tensor(values).unbind())
    return torch.cat(
        [
            torch.as_tensor(v, dtype=like.dtype, device=like.device).expand(n)
            for v, n in zip(values, lengths, strict=True)
        ]
    )
