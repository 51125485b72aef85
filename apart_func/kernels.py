"""The layer as one node of autograd on PyTorch's own kernels: the formula at the cost of plain batch norm.

    perturbed_batch_norm    the one place that chooses between the formula and the node
    KernelBatchNorm         (x, γ, β, δμ, δσ) → y, and the gradients of all five from one training-mode backward

The statistics come first, then batch norm's evaluation-mode kernel with the perturbed ones; no pass over the
activations is added. Two things PyTorch does badly on a CPU are arithmetic here: moments of contiguous float32
activations, which it sums one by one, and groups of channels_last ones, which it would have to copy.
"""

from __future__ import annotations

from typing import Any, NamedTuple

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
        invstd = (var + eps).rsqrt_()
        ratio = mean * invstd
        slope = torch.addcmul(gamma, gamma, scaled)
        slope = slope.expand_as(mean).contiguous() if mean.dim() > slope.dim() else slope
        offset = torch.addcmul(beta, slope * shifted, ratio, value=-1)
        layout.apply(x, y, mean, var, slope, offset, eps)
        ctx.eps, ctx.layout = eps, layout
        ctx.save_for_backward(x, weight, bias, shift, scale, mean, invstd, ratio, slope)
        ctx.mark_non_differentiable(mean, var)
        ctx.set_materialize_grads(False)  # no zeros for these two
        return y, mean, var

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *_: Tensor) -> tuple[Tensor | None, ...]:
        """Differentiate."""
        if grad is None:
            return (None,) * 7
        x, weight, bias, shift, scale, mean, invstd, ratio, slope = ctx.saved_tensors
        wanted, vectors = ctx.needs_input_grad, affine(x, weight, bias, shift, scale)
        if torch.is_grad_enabled():  # the derivative is to be differentiated again
            y = differentiable_batch_norm(x, vectors, mean, invstd, ctx.eps, ctx.layout.groups)
            inputs = x, weight, bias, shift, scale
            by = [tensor for tensor, needed in zip(inputs, wanted, strict=False) if needed]
            again = iter(torch.autograd.grad(y, by, grad, create_graph=True))
            return tuple(next(again) if needed else None for needed in wanted)
        # Σ grad · x̂ and Σ grad of every group: BN's own backward makes both on its way.
        grad_x, by_slope, by_offset = ctx.layout.backward(grad, x, mean, invstd, slope, wanted[0])
        by_shift = by_offset * ratio  # of −γ(1 + δσ) δμ
        normalized = torch.addcmul(by_slope, vectors.shift, by_shift, value=-1)  # Σ grad · (x̂ − δμ μ/s)
        return (
            grad_x,
            _as_input(torch.addcmul(normalized, normalized, vectors.scale), weight) if wanted[1] else None,
            _as_input(by_offset, bias) if wanted[2] else None,
            _as_input((by_shift * slope).neg_(), shift) if wanted[3] else None,
            _as_input(normalized * vectors.weight, scale) if wanted[4] else None,
            None,
            None,
        )


def _as_input(grad: Tensor, like: Tensor) -> Tensor:
    """Sum the gradient of every group, `(G, C)`, where one vector serves all groups."""
    if grad.dim() != like.dim():
        grad = grad.sum(0) if grad.dim() == 2 else grad.unsqueeze(0)
    return grad if grad.dtype is like.dtype else grad.to(like.dtype)


def differentiable_batch_norm(
    x: Tensor, vectors: Affine, mean: Tensor, invstd: Tensor, eps: float, groups: int
) -> Tensor:
    """Normalise by PyTorch's own batch norm, of channels that are ghost groups: it knows its second derivative."""
    gamma, beta, shift, scale = vectors
    is_folded = groups > 1 or len(x) == 1  # one sample of two dimensions has a derivative that depends on its strides
    folded = rearrange(x, "(b g) c ... -> b (g c) (...)", g=groups) if is_folded else x
    slope = torch.addcmul(gamma, gamma, scale)
    offset = torch.addcmul(beta, slope * shift, mean * invstd, value=-1)
    flat = slope.expand(groups, -1).contiguous().view(-1), offset.reshape(-1)
    y = torch.batch_norm(folded, *flat, None, None, True, 0.0, eps, torch.backends.cudnn.enabled)
    return y.unflatten(1, (groups, -1)).flatten(0, 1).view(x.shape) if is_folded else y


def layout_of(x: Tensor, groups: int) -> Native | Rows:
    """Choose the layout in which a device works fastest. A GPU copies faster than it starts many kernels."""
    if x.is_contiguous():
        return Native(groups, is_last=False)
    is_rows = x.movedim(1, -1).is_contiguous()
    if is_rows and groups > 1 and x.device.type == "cpu" and x.dtype == statistics_dtype(x.dtype):
        return Rows(groups)
    return Native(groups, is_last=is_rows and groups == 1 and len(x) > 1 and x.dim() in (4, 5))


class Native(NamedTuple):
    """PyTorch's kernels on contiguous memory, in which ghost groups are channels of their own: a view.

    Vectors are `(C,)` for one group, else `(G, C)`, in the dtype of the statistics.

    Attributes:
        groups: number of ghost groups G.
        is_last: whether the memory of the one group is channels_last, which the kernels walk over as it is.
    """

    groups: int
    is_last: bool

    def fold(self, x: Tensor) -> Tensor:
        """Return `(N/G, G·C, positions)`, or activations of one group as they are."""
        if self.is_last:  # the kernels take a gradient in other strides for one in those of x
            return x.movedim(1, -1).contiguous().movedim(-1, 1)
        x = x.contiguous()
        return x if self.groups == 1 else x.view(x.size(0) // self.groups, self.groups * x.size(1), -1)

    def moments(self, x: Tensor, scratch: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and biased variance; `scratch`, like x, may be overwritten."""
        folded = self.fold(x)
        is_fast = x.numel() >= FAST_MOMENTS_MIN_NUMEL and x.dtype == torch.float32 and x.device.type == "cpu"
        if not (is_fast and folded.dim() > 2 and not self.is_last and scratch.is_contiguous()):
            mean, var = native_moments(folded)
            return self._split(mean), self._split(var)
        folded, out = folded.flatten(2), self.fold(scratch).flatten(2)
        size = folded.shape[0] * folded.shape[2]
        mean = folded.sum((0, 2)).div_(size)
        torch.sub(folded, mean.unsqueeze(1), out=out)
        return self._split(mean), self._split(out.square_().sum((0, 2)).div_(size))

    def apply(self, x: Tensor, y: Tensor, mean: Tensor, var: Tensor, slope: Tensor, offset: Tensor, eps: float) -> None:
        """Write slope · x̂ + offset into y: in evaluation mode BN computes any affine map of x."""
        out, unused = self.fold(y), mean.new_empty(0)
        vectors = _flat(slope), _flat(offset), _flat(mean), _flat(var)
        torch.ops.aten.native_batch_norm.out(
            self.fold(x), *vectors, False, 0.0, eps, out=out, save_mean=unused, save_invstd=unused
        )
        if out.data_ptr() != y.data_ptr():
            y.copy_(out.view(y.shape))

    def backward(
        self, grad: Tensor, x: Tensor, mean: Tensor, invstd: Tensor, slope: Tensor, for_x: bool
    ) -> tuple[Tensor | None, Tensor, Tensor]:
        """Return the gradient of x, if wanted, Σ grad · x̂, and Σ grad: BN's own backward in training mode."""
        grad_x, by_slope, by_offset = torch.ops.aten.native_batch_norm_backward.default(
            self.fold(grad),
            self.fold(x),
            _flat(slope),
            None,
            None,
            _flat(mean),
            _flat(invstd),
            True,
            0.0,
            (for_x, True, True),  # eps has gone into invstd
        )
        return (grad_x.view(x.shape) if for_x else None), self._split(by_slope), self._split(by_offset)

    def _split(self, vector: Tensor) -> Tensor:
        return vector if self.groups == 1 else vector.view(self.groups, -1)


def _flat(vector: Tensor) -> Tensor:
    return vector if vector.dim() == 1 else vector.view(-1)


class Rows(NamedTuple):
    """channels_last memory in several groups: arithmetic on the view `(N/G, G, positions, C)`, with y as scratch."""

    groups: int

    def _view(self, x: Tensor) -> Tensor:
        return rearrange(x, "(b g) c ... -> b g (...) c", g=self.groups)

    def moments(self, x: Tensor, scratch: Tensor) -> tuple[Tensor, Tensor]:
        """See `Native`."""
        rows, out = self._view(x), self._view(scratch)
        size = rows.shape[0] * rows.shape[2]
        mean = _sum_rows(rows).div_(size)
        torch.sub(rows, mean.unsqueeze(1), out=out)
        return mean, _sum_rows(out.square_()).div_(size)

    def apply(self, x: Tensor, y: Tensor, mean: Tensor, var: Tensor, slope: Tensor, offset: Tensor, eps: float) -> None:
        """See `Native`."""
        steep = slope * torch.rsqrt(var + eps)
        intercept = torch.addcmul(offset, mean, steep, value=-1)
        torch.addcmul(intercept.unsqueeze(1), self._view(x), steep.unsqueeze(1), out=self._view(y))

    def backward(
        self, grad: Tensor, x: Tensor, mean: Tensor, invstd: Tensor, slope: Tensor, for_x: bool
    ) -> tuple[Tensor | None, Tensor, Tensor]:
        """See `Native`: γ/s (grad − Σ grad / n − x̂ Σ grad·x̂ / n), as one affine map of x and grad."""
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
