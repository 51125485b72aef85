"""The layer: batch norm with perturbed statistics, on tensors alone.

With batch mean μ, biased variance σ², s = sqrt(σ² + eps), x̂ = (x − μ)/s and sg = stop-gradient,

    y = γ (1 + δσ) (x̂ − δμ · sg(μ/s)) + β                                              (DESIGN section 2)

for every channel of every ghost group. Ghost groups are channels of their own: `(b g) c -> b (g c)`. So one
kernel serves both passes, and a perturbed layer costs what a plain one costs.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor
from torch.autograd.function import once_differentiable

from apart_func.autodiff import is_traced
from apart_func.errors import BatchError, SettingError
from apart_func.pytrees import BatchStats, Perturbation


class Taps(NamedTuple):
    """The affine parameters of one call of a layer: what the loss is differentiated by for `statistic_gradients`.

    Attributes:
        weight: scale γ of this call, `(C,)`.
        bias: shift β of this call, `(C,)`.
    """

    weight: Tensor
    bias: Tensor


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


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of moments for activations of `dtype`: at least float32."""
    return torch.promote_types(dtype, torch.float32)


def clean_batch_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, BatchStats, Taps]:
    """Plain training-mode batch norm, by PyTorch's own call, and what the method wants to know of it. Eager only.

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
    # Running statistics that start from nothing and take the batch whole are the batch's.
    mean, var = torch.zeros(2, channels, dtype=dtype, device=x.device)
    y = F.batch_norm(x, mean, var, *taps, True, 1.0, eps)
    size = x.numel() // channels
    return y, BatchStats(mean, var * ((size - 1) / size)), taps


def _tap(vector: Tensor | None, default: float, channels: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor of this call alone, which the loss can be differentiated by."""
    if vector is None:
        return torch.full((channels,), default, dtype=dtype, device=device, requires_grad=True)
    if vector.requires_grad:
        return vector.to(dtype).view_as(vector)
    return vector.to(dtype).detach().requires_grad_()


def statistic_gradients(stats: BatchStats, eps: float, weight: Tensor, grads: Taps) -> BatchStats:
    """The gradient by the relative shifts at zero, which BN's backward yields on the way.

    From y = γ (1 + δσ) (x̂ − δμ · sg(μ/s)) + β:  ∂/∂δσ = γ ∂/∂γ  and  ∂/∂δμ = −γ (μ/s) ∂/∂β.

    Args:
        stats: batch statistics of a call, `(C,)`.
        eps: BN's constant.
        weight: scale γ of the call, `(C,)`.
        grads: gradient of the loss by the taps of the call.
    """
    weight = weight.detach()
    return BatchStats(-weight * stats.mean * torch.rsqrt(stats.var + eps) * grads.bias, weight * grads.weight)


def perturbed_batch_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    perturbation: Perturbation,
    *,
    groups: int = 1,
    at_zero: bool = False,
) -> tuple[Tensor, BatchStats]:
    """Normalise by batch statistics that are shifted by a perturbation.

    Args:
        x: activations `(N, C, ...)`; row i is in ghost group i mod `groups`.
        weight: scale γ `(C,)`; None is 1.
        bias: shift β `(C,)`; None is 0.
        eps: BN's constant, added to the variance.
        perturbation: relative shifts (δμ, δσ), `(C,)` for all groups or `(groups, C)` for each.
        groups: number of ghost groups G ≥ 1, a divisor of N.
        at_zero: promises that the perturbation is zero and only there to be differentiated, which saves arithmetic.

    Returns:
        The output, of `x`'s shape and dtype, and the groups' statistics without the perturbation, `(C,)` for one
        group, `(groups, C)` else, in at least float32.
    """
    dtype = statistics_dtype(x.dtype)
    weight = x.new_ones(x.shape[1], dtype=dtype) if weight is None else weight.to(dtype)
    bias = x.new_zeros(x.shape[1], dtype=dtype) if bias is None else bias.to(dtype)
    shift, scale = (vector.to(dtype) for vector in perturbation)
    layer = _layer_of_ops if is_traced() or x.device.type not in _NATIVE_DEVICES else _NativeLayer.apply
    y, mean, var = layer(x, weight, bias, shift, scale, eps, groups, at_zero)
    return y, BatchStats(mean, var) if groups == 1 else BatchStats(mean.view(groups, -1), var.view(groups, -1))


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


def fold_groups(x: Tensor, groups: int) -> Tensor:
    """Make channels of the ghost groups: sample i is in group i mod `groups`."""
    return x if groups == 1 else rearrange(x, "(b g) c ... -> b (g c) ...", g=groups)


def unfold_groups(x: Tensor, groups: int) -> Tensor:
    """Undo `fold_groups`."""
    return x if groups == 1 else rearrange(x, "b (g c) ... -> (b g) c ...", g=groups)


def batch_moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of every channel, in at least float32; where a reduction over ranks belongs."""
    dtype = statistics_dtype(x.dtype)
    # Running statistics of a wider dtype are what makes the kernel accumulate half precision in float32.
    blank = None if x.dtype == dtype else x.new_zeros(x.shape[1], dtype=dtype)
    mean, var = torch.batch_norm_update_stats(x, blank, blank, 0.0)
    return mean, var


# Where batch_norm_update_stats and native_batch_norm exist as kernels.
_NATIVE_DEVICES = ("cpu", "cuda")


class _NativeLayer(torch.autograd.Function):
    """The eager layer: BN's own kernels, forward and backward, and arithmetic on `(G·C,)` vectors."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        shift: Tensor,
        scale: Tensor,
        eps: float,
        groups: int,
        at_zero: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        folded = fold_groups(x, groups)
        mean, var = batch_moments(folded)
        invstd = torch.rsqrt(var + eps)
        # BN in evaluation mode computes any affine map of x: give it the perturbed centre and scale.
        centre, gamma = mean, weight
        if not at_zero:
            by_group = mean.view(groups, -1)
            centre = torch.addcmul(by_group, by_group, shift).view(-1)
            gamma = torch.addcmul(weight, weight, scale)
        gamma, beta = (_for_each_group(vector, groups) for vector in (gamma, bias))
        y = torch.native_batch_norm(folded, gamma, beta, centre, var, False, 0.0, eps)[0]
        ctx.eps, ctx.groups, ctx.at_zero = eps, groups, at_zero
        ctx.save_for_backward(folded, weight, gamma, shift, scale, mean, invstd)
        ctx.mark_non_differentiable(mean, var)
        return _unfold_fresh(y, x), mean, var

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        folded, weight, gamma, shift, scale, mean, invstd = ctx.saved_tensors
        for_x, for_weight, for_bias, for_shift, for_scale = ctx.needs_input_grad[:5]
        # BN's own backward, with the perturbed scale: g_gamma = Σ grad · x̂ and g_beta = Σ grad for every group.
        grad_x, g_gamma, g_beta = torch.ops.aten.native_batch_norm_backward(
            fold_groups(grad, ctx.groups),
            folded,
            gamma, None, None, mean, invstd, True, ctx.eps, [for_x, True, True],
        )  # fmt: skip
        g_gamma, g_beta, gamma, mean, invstd = (v.view(ctx.groups, -1) for v in (g_gamma, g_beta, gamma, mean, invstd))
        if for_shift or not ctx.at_zero:
            g_offset = g_beta * mean * invstd  # y holds −γ(1 + δσ) δμ · offset, offset = sg(μ/s)
        if not ctx.at_zero:
            g_gamma = g_gamma - shift * g_offset
        grads = (
            (g_gamma if ctx.at_zero else g_gamma + g_gamma * scale).sum_to_size(weight.shape) if for_weight else None,
            g_beta.sum_to_size(weight.shape) if for_bias else None,
            (-gamma * g_offset).sum_to_size(shift.shape) if for_shift else None,
            (weight * g_gamma).sum_to_size(scale.shape) if for_scale else None,
        )
        return (_unfold_fresh(grad_x, grad) if for_x else None, *grads, None, None, None)


def _layer_of_ops(
    x: Tensor, weight: Tensor, bias: Tensor, shift: Tensor, scale: Tensor, eps: float, groups: int, at_zero: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The layer in operators that every transform, compiler and device knows.

    Compiled, the moments below and those inside batch_norm are one computation, and the perturbation a fused one.
    """
    folded = fold_groups(x, groups)
    dims = [0, *range(2, x.dim())]
    var, mean = torch.var_mean(folded.to(weight.dtype), dims, correction=0, keepdim=True)
    var, mean = var.flatten(), mean.flatten()
    gamma = _for_each_group(weight * (1 + scale), groups)
    offset = (mean * torch.rsqrt(var + eps)).detach()
    beta = _for_each_group(bias, groups) - gamma * _for_each_group(shift, groups) * offset
    y = F.batch_norm(folded, None, None, gamma, beta, True, 0.0, eps)
    return unfold_groups(y, groups), mean, var


def _unfold_fresh(y: Tensor, like: Tensor) -> Tensor:
    """Undo `fold_groups` on a tensor nobody else holds.

    Autograd must not see a view here: an in-place activation after it would copy gradients.
    """
    return y if y.shape == like.shape else torch.ops.aten._unsafe_view(y, like.shape)


def _for_each_group(vector: Tensor, groups: int) -> Tensor:
    """`(C,)` or `(G, C)` as `(G·C,)`, contiguous in memory: the kernels do not look at strides."""
    return (vector if vector.dim() == 2 else vector.expand(groups, -1)).contiguous().view(-1)


def advance_running_stats(running: RunningStats, stats: BatchStats, size: int, momentum: float | None) -> RunningStats:
    """Move running statistics by one batch, as plain batch norm does.

    Args:
        running: the values before.
        stats: batch statistics, `(C,)` each.
        size: values a channel in the batch; the running variance takes the unbiased estimate.
        momentum: weight of this batch; None weighs all batches alike (cumulative average).

    Returns:
        The values after, in the dtypes they had.
    """
    batches = running.batches + 1
    weight = torch.reciprocal(batches.to(stats.mean.dtype)) if momentum is None else momentum

    def moved(old: Tensor, new: Tensor) -> Tensor:
        return torch.lerp(old.to(new.dtype), new, weight).to(old.dtype)

    return RunningStats(moved(running.mean, stats.mean), moved(running.var, stats.var * (size / (size - 1))), batches)
