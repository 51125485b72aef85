"""The layer as one node of autograd on PyTorch's own kernels: the formula at the cost of plain batch norm.

    perturbed_batch_norm    the one place that chooses between the formula and the node
    KernelBatchNorm         (x, γ, β, δμ, δσ) → y, and the gradients of all five from one training-mode backward

The statistics come first, then batch norm's evaluation-mode kernel with the perturbed ones; no pass over the
activations is added. Two things PyTorch does badly on a CPU are arithmetic here: moments of contiguous float32
activations, which it sums one by one, and groups of channels_last ones, which it would have to copy.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import torch
from einops import rearrange
from torch import Tensor

from apart_func._torch import has_dispatch_mode, is_traced
from apart_func.batch_norm import Affine, InterleavedGroups, Normalized, Reduce, affine, formula, statistics_dtype

# Where batch_norm_update_stats and native_batch_norm exist as kernels.
KERNEL_DEVICES = ("cpu", "cuda")

# From this many activations on, summing them faster is worth two operators more: benchmarks/layer.py
FAST_MOMENTS_MIN_NUMEL = 2**16


def perturbed_batch_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    shift: Tensor,
    scale: Tensor,
    eps: float,
    groups: int,
    reduce: Reduce | None = None,
) -> Normalized:
    """Normalise by batch statistics that are shifted by a perturbation.

    Args:
        x: activations `(N, C, ...)`; row i is in ghost group i mod `groups`.
        weight: γ, `(C,)`; None is 1.
        bias: β, `(C,)`; None is 0.
        shift: δμ, `(C,)` for all groups or `(groups, C)` for each.
        scale: δσ, likewise.
        eps: BN's constant, added to the variance.
        groups: number of ghost groups G ≥ 1, a divisor of N.
        reduce: makes moments over all ranks from those of this one, differentiably; None keeps these.
    """
    if is_traced() or reduce is not None or x.device.type not in KERNEL_DEVICES or has_dispatch_mode():
        return formula(x, affine(x, weight, bias, shift, scale), eps, InterleavedGroups(groups), reduce)
    return Normalized(*KernelBatchNorm.apply(x, weight, bias, shift, scale, eps, groups))


class KernelBatchNorm(torch.autograd.Function):
    """The layer; arguments as in `perturbed_batch_norm`, results as in `Normalized`."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        shift: Tensor,
        scale: Tensor,
        eps: float,
        groups: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Normalise."""
        gamma, beta, shifted, scaled = affine(x, weight, bias, shift, scale)
        layout, y = layout_of(x, groups), torch.empty_like(x)
        mean, var = layout.moments(x, y)
        slope = torch.addcmul(gamma, gamma, scaled)
        offset = torch.addcmul(beta, slope * shifted, torch.rsqrt(var + eps).mul_(mean), value=-1)
        layout.apply(x, y, mean, var, slope.expand_as(mean), offset, eps)
        ctx.eps, ctx.layout = eps, layout
        ctx.save_for_backward(x, weight, bias, shift, scale, mean, var)
        ctx.mark_non_differentiable(mean, var)
        ctx.set_materialize_grads(False)  # no zeros for these two
        return y, mean, var

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *_: Tensor) -> tuple[Tensor | None, ...]:
        """Differentiate."""
        if grad is None:
            return (None,) * 7
        x, weight, bias, shift, scale, mean, var = ctx.saved_tensors
        inputs: tuple[Any, ...] = (x, weight, bias, shift, scale)
        wanted = ctx.needs_input_grad[:5]
        if torch.is_grad_enabled():  # the derivative is to be differentiated again
            y = differentiable_batch_norm(x, affine(*inputs), mean, var, ctx.eps)
            by = [tensor for tensor, needed in zip(inputs, wanted, strict=True) if needed]
            again = iter(torch.autograd.grad(y, by, grad, create_graph=True))
            return *(next(again) if needed else None for needed in wanted), None, None
        vectors = affine(*inputs)
        gamma, shifted, scaled = vectors.weight, vectors.shift, vectors.scale
        invstd = (var + ctx.eps).sqrt_().reciprocal_()
        slope = torch.addcmul(gamma, gamma, scaled)
        # Σ grad · x̂ and Σ grad of every group: BN's own backward makes both on its way.
        grad_x, by_slope, by_offset = ctx.layout.backward(grad, x, mean, invstd, slope.expand_as(mean), wanted[0])
        by_shift = mean.mul(invstd).mul_(by_offset).neg_()  # of γ(1 + δσ) δμ
        normalized = torch.addcmul(by_slope, shifted, by_shift)  # Σ grad · (x̂ − δμ μ/s)
        by_inputs = (
            grad_x,
            torch.addcmul(normalized, normalized, scaled) if wanted[1] else None,
            by_offset if wanted[2] else None,
            by_shift.mul_(slope) if wanted[3] else None,
            normalized.mul_(gamma) if wanted[4] else None,
        )
        return *(_as_input(found, tensor) for found, tensor in zip(by_inputs, inputs, strict=True)), None, None


def _as_input(grad: Tensor | None, tensor: Tensor | None) -> Tensor | None:
    """Sum the gradient of every group, `(G, C)`, where one vector serves all groups."""
    if grad is None or tensor is None:
        return None
    if tensor.dim() == 1:
        grad = grad.sum(0) if grad.shape[0] > 1 else grad.view(-1)
    return grad.to(tensor.dtype)


def differentiable_batch_norm(x: Tensor, vectors: Affine, mean: Tensor, var: Tensor, eps: float) -> Tensor:
    """Normalise by PyTorch's own batch norm, of channels that are ghost groups: it knows its second derivative."""
    gamma, beta, shift, scale = vectors
    groups = len(mean)
    is_folded = groups > 1 or len(x) == 1  # one sample of two dimensions has a derivative that depends on its strides
    folded = rearrange(x, "(b g) c ... -> b (g c) (...)", g=groups) if is_folded else x
    slope = torch.addcmul(gamma, gamma, scale)
    offset = torch.addcmul(beta, slope * shift, torch.rsqrt(var + eps).mul_(mean), value=-1)
    flat = slope.expand_as(mean).contiguous().view(-1), offset.view(-1)
    y = torch.batch_norm(folded, *flat, None, None, True, 0.0, eps, torch.backends.cudnn.enabled)
    return y.unflatten(1, (groups, -1)).flatten(0, 1).view(x.shape) if is_folded else y


class Layout(Protocol):
    """How the kernels walk over activations; vectors are `(G, C)`, in the dtype of the statistics."""

    def moments(self, x: Tensor, scratch: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and biased variance; `scratch`, like x, may be overwritten."""

    def apply(self, x: Tensor, y: Tensor, mean: Tensor, var: Tensor, slope: Tensor, offset: Tensor, eps: float) -> None:
        """Write slope · x̂ + offset into y."""

    def backward(
        self, grad: Tensor, x: Tensor, mean: Tensor, invstd: Tensor, slope: Tensor, for_x: bool
    ) -> tuple[Tensor | None, Tensor, Tensor]:
        """Return the gradient of x, if wanted, Σ grad · x̂, and Σ grad."""


def layout_of(x: Tensor, groups: int) -> Layout:
    """Choose the layout in which a device works fastest. A GPU copies faster than it starts many kernels."""
    is_rows = not x.is_contiguous() and x.movedim(1, -1).is_contiguous()
    if is_rows and groups > 1 and x.device.type == "cpu" and x.dtype == statistics_dtype(x.dtype):
        return Rows(groups)
    if is_rows and groups == 1 and len(x) > 1 and x.dim() in (4, 5):
        return ChannelsLast()
    return Channels(groups)


class Channels(NamedTuple):
    """Contiguous memory, in which the ghost groups are channels of their own: `(N/G, G·C, positions)`, a view."""

    groups: int

    def _fold(self, x: Tensor) -> Tensor:
        return x.contiguous().view(x.shape[0] // self.groups, self.groups * x.shape[1], -1)

    def moments(self, x: Tensor, scratch: Tensor) -> tuple[Tensor, Tensor]:
        """See `Layout`."""
        shape = (self.groups, x.shape[1])
        folded = self._fold(x)
        fast = x.device.type == "cpu" and x.dtype == torch.float32 and x.numel() >= FAST_MOMENTS_MIN_NUMEL
        if not (fast and scratch.is_contiguous() and folded.shape[2] > 1):
            mean, var = native_moments(folded)
            return mean.view(shape), var.view(shape)
        size, out = folded.shape[0] * folded.shape[2], self._fold(scratch)
        mean = folded.sum((0, 2)).div_(size)
        torch.sub(folded, mean.unsqueeze(1), out=out)
        return mean.view(shape), out.square_().sum((0, 2)).div_(size).view(shape)

    def apply(self, x: Tensor, y: Tensor, mean: Tensor, var: Tensor, slope: Tensor, offset: Tensor, eps: float) -> None:
        """See `Layout`."""
        folded = self._fold(x)
        if y.is_contiguous():
            normalize_(folded, self._fold(y), mean, var, slope, offset, eps)
            return
        out = torch.empty_like(folded)
        normalize_(folded, out, mean, var, slope, offset, eps)
        y.copy_(out.view(x.shape))

    def backward(
        self, grad: Tensor, x: Tensor, mean: Tensor, invstd: Tensor, slope: Tensor, for_x: bool
    ) -> tuple[Tensor | None, Tensor, Tensor]:
        """See `Layout`."""
        grad_x, by_slope, by_offset = native_backward(self._fold(grad), self._fold(x), mean, invstd, slope, for_x)
        return (grad_x.view(x.shape) if for_x else None), by_slope, by_offset


class ChannelsLast(NamedTuple):
    """channels_last memory in one group, which PyTorch's kernels walk over as it is."""

    groups: int = 1

    def moments(self, x: Tensor, scratch: Tensor) -> tuple[Tensor, Tensor]:
        """See `Layout`."""
        mean, var = native_moments(x)
        return mean.unsqueeze(0), var.unsqueeze(0)

    def apply(self, x: Tensor, y: Tensor, mean: Tensor, var: Tensor, slope: Tensor, offset: Tensor, eps: float) -> None:
        """See `Layout`."""
        normalize_(x, y, mean, var, slope, offset, eps)

    def backward(
        self, grad: Tensor, x: Tensor, mean: Tensor, invstd: Tensor, slope: Tensor, for_x: bool
    ) -> tuple[Tensor | None, Tensor, Tensor]:
        """See `Layout`."""
        # The kernel takes a gradient in other strides for one in those of x.
        same = grad.movedim(1, -1).contiguous().movedim(-1, 1)
        grad_x, by_slope, by_offset = native_backward(same, x, mean, invstd, slope, for_x)
        return (grad_x if for_x else None), by_slope, by_offset


class Rows(NamedTuple):
    """channels_last memory in several groups: arithmetic on the view `(N/G, G, positions, C)`, with y as scratch."""

    groups: int

    def _view(self, x: Tensor) -> Tensor:
        return rearrange(x, "(b g) c ... -> b g (...) c", g=self.groups)

    def moments(self, x: Tensor, scratch: Tensor) -> tuple[Tensor, Tensor]:
        """See `Layout`."""
        rows, out = self._view(x), self._view(scratch)
        size = rows.shape[0] * rows.shape[2]
        mean = _sum_rows(rows).div_(size)
        torch.sub(rows, mean.unsqueeze(1), out=out)
        return mean, _sum_rows(out.square_()).div_(size)

    def apply(self, x: Tensor, y: Tensor, mean: Tensor, var: Tensor, slope: Tensor, offset: Tensor, eps: float) -> None:
        """See `Layout`."""
        steep = slope * torch.rsqrt(var + eps)
        intercept = torch.addcmul(offset, mean, steep, value=-1)
        torch.addcmul(intercept.unsqueeze(1), self._view(x), steep.unsqueeze(1), out=self._view(y))

    def backward(
        self, grad: Tensor, x: Tensor, mean: Tensor, invstd: Tensor, slope: Tensor, for_x: bool
    ) -> tuple[Tensor | None, Tensor, Tensor]:
        """See `Layout`: γ/s (grad − Σ grad / n − x̂ Σ grad·x̂ / n), as one affine map of x and grad."""
        grad_x = torch.empty_like(x)
        rows, grads, out = self._view(x), self._view(grad), self._view(grad_x)
        size = rows.shape[0] * rows.shape[2]
        torch.sub(rows, mean.unsqueeze(1), out=out)
        by_slope = _sum_rows(out.mul_(grads)).mul_(invstd)
        by_offset = _sum_rows(grads)
        if not for_x:
            return None, by_slope, by_offset
        of_grad = slope * invstd
        of_x = of_grad * invstd * by_slope / -size
        constant = of_grad * by_offset / -size - of_x * mean
        torch.addcmul(constant.unsqueeze(1), rows, of_x.unsqueeze(1), out=out)
        out.addcmul_(grads, of_grad.unsqueeze(1))
        return grad_x, by_slope, by_offset


def _sum_rows(rows: Tensor) -> Tensor:
    """Σ over samples and positions, `(G, C)`: first over samples, where the memory of a sample is one vector."""
    return rows.sum(0).sum(1)


def native_moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and biased variance of every channel, in at least float32."""
    dtype = statistics_dtype(x.dtype)
    # Running statistics of a wider dtype are what makes the kernel accumulate half precision in float32.
    blank = None if x.dtype == dtype else x.new_zeros(x.shape[1], dtype=dtype)
    mean, var = torch.batch_norm_update_stats(x, blank, blank, 0.0)
    return mean, var


def normalize_(x: Tensor, y: Tensor, mean: Tensor, var: Tensor, slope: Tensor, offset: Tensor, eps: float) -> None:
    """Write slope (x − mean) / sqrt(var + eps) + offset into y: in evaluation mode BN computes any affine map of x."""
    unused = mean.new_empty(0)
    # contiguous: of one channel, an expanded γ has stride 0 in every view, and the kernels would read past its end
    vectors = (vector.contiguous().view(-1) for vector in (slope, offset, mean, var))
    torch.ops.aten.native_batch_norm.out(x, *vectors, False, 0.0, eps, out=y, save_mean=unused, save_invstd=unused)


def native_backward(
    grad: Tensor, x: Tensor, mean: Tensor, invstd: Tensor, slope: Tensor, for_x: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Run training-mode BN's own backward; the gradients of the vectors come as `(G, C)`."""
    scale, center, inverse = (vector.contiguous().view(-1) for vector in (slope, mean, invstd))
    grad_x, by_slope, by_offset = torch.ops.aten.native_batch_norm_backward.default(
        grad,
        x,
        scale,
        None,
        None,
        center,
        inverse,
        True,
        0.0,
        (for_x, True, True),  # eps has gone into invstd
    )
    return grad_x, by_slope.view(mean.shape), by_offset.view(mean.shape)
