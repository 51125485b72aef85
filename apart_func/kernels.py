"""Batch norm's arithmetic on activations, eagerly: two functions, and the one place where devices and layouts part.

    normalize       statistics of every channel of every ghost group, and an affine map by them
    differentiate   the derivative of training-mode batch norm

Ghost groups become channels, `(b g) c ... -> b (g c) ...`, which is a view of contiguous memory, and PyTorch's own
kernels do the work. Two things they do badly on a CPU, and both are arithmetic on views here: moments of contiguous
float32 and float64 activations, which they sum one by one, and groups of channels_last ones, which would be copied. In
half precision the copies cost less than arithmetic that has no fast sums.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from apart_func.autodiff import is_traced

# Where batch_norm_update_stats and native_batch_norm exist as kernels.
KERNEL_DEVICES = ("cpu", "cuda")
# From this many activations on, summing them faster is worth the few operators more.
MANY = 2**16


class Normalized(NamedTuple):
    """What `normalize` returns.

    Attributes:
        y: of the activations' shape, dtype and layout; no view of anything.
        mean: of every channel of every group, `(G·C,)`, in at least float32.
        var: biased variance, likewise.
    """

    y: Tensor
    mean: Tensor
    var: Tensor


class Derivative(NamedTuple):
    """What `differentiate` returns.

    Attributes:
        x: gradient of the activations, of their shape and layout; None where it is not wanted.
        gamma: gradient of the scale, Σ grad · x̂, `(G·C,)`.
        beta: gradient of the shift, Σ grad, `(G·C,)`.
    """

    x: Tensor | None
    gamma: Tensor
    beta: Tensor


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of moments for activations of `dtype`: at least float32."""
    return torch.promote_types(dtype, torch.float32)


def normalize(x: Tensor, gamma: Tensor, beta: Tensor, move: Tensor | None, eps: float, groups: int) -> Normalized:
    """Compute y = γ (x − move · μ) / s + β, with the statistics of each ghost group.

    Args:
        x: activations `(N, C, ...)`; row i is in group i mod `groups`.
        gamma: scale `(G·C,)`, contiguous, in the dtype of the statistics.
        beta: shift, likewise.
        move: factor on the mean, likewise; None is 1.
        eps: BN's constant, added to the variance.
        groups: number of ghost groups G, a divisor of N.
    """
    if _is_strided(x, groups) and x.dtype == statistics_dtype(x.dtype):
        return _normalize_rows(x, gamma, beta, move, eps, groups)
    folded = fold_groups(x, groups)
    y = torch.empty_like(folded)
    mean, var = moments(folded, scratch=y)
    center = mean if move is None else mean * move
    # In evaluation mode BN computes any affine map of x: give it the perturbed centre and scale.
    unused = gamma.new_empty(0)
    torch.ops.aten.native_batch_norm.out(
        folded, gamma, beta, center, var, False, 0.0, eps, out=y, save_mean=unused, save_invstd=unused
    )
    return Normalized(unfold_groups(y, x), mean, var)


def differentiate(
    grad: Tensor, x: Tensor, gamma: Tensor, mean: Tensor, invstd: Tensor, groups: int, for_x: bool
) -> Derivative:
    """Differentiate y = γ (x − μ) / s + β, where μ and s depend on x.

    Args:
        grad: gradient of y, `(N, C, ...)`.
        x: activations.
        gamma: scale `(G·C,)`.
        mean: μ, likewise.
        invstd: 1 / s, likewise.
        groups: number of ghost groups.
        for_x: whether the gradient of x is wanted.
    """
    if _is_strided(x, groups) and x.dtype == statistics_dtype(x.dtype):
        return _differentiate_rows(grad, x, gamma, mean, invstd, groups)
    grad_x, g_gamma, g_beta = torch.ops.aten.native_batch_norm_backward.default(
        fold_groups(grad, groups),
        fold_groups(x, groups),
        gamma,
        None,
        None,
        mean,
        invstd,
        True,
        0.0,  # eps has gone into invstd
        (for_x, True, True),
    )
    return Derivative(unfold_groups(grad_x, x) if for_x else None, g_gamma, g_beta)


def fold_groups(x: Tensor, groups: int) -> Tensor:
    """Make channels of the ghost groups: `(b g) c ... -> b (g c) ...`, a view of contiguous memory, else a copy."""
    if groups == 1:
        return x
    shape = (x.shape[0] // groups, groups * x.shape[1], *x.shape[2:])
    if not _is_strided(x, groups):
        return x.reshape(shape)
    copied = _rows(x, groups).transpose(1, 2).reshape(shape[0], *shape[2:], shape[1])
    return copied.movedim(-1, 1)  # channels_last again


def unfold_groups(y: Tensor, like: Tensor) -> Tensor:
    """Undo `fold_groups` on a tensor that nobody else holds, in the layout of `like`.

    Autograd must not see a view here: an in-place activation after it would copy gradients.
    """
    if y.shape == like.shape:
        return y
    groups = like.shape[0] // y.shape[0]
    if is_traced() or not _is_strided(like, groups):
        y = torch.ops.aten._unsafe_view.default(y, like.shape)
        return y if is_traced() or like.is_contiguous() else torch.empty_like(like).copy_(y)
    unfolded = torch.empty_like(like)
    rows = y.movedim(1, -1).reshape(y.shape[0], -1, groups, like.shape[1])
    _rows(unfolded, groups).copy_(rows.transpose(1, 2))
    return unfolded


def moments(x: Tensor, scratch: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of every channel, in at least float32; where a reduction over ranks belongs.

    Args:
        x: activations.
        scratch: of their shape and layout, overwritten where it helps.
    """
    dtype = statistics_dtype(x.dtype)
    if scratch is not None and outruns_batch_norm(x):
        dims, size = [0, *range(2, x.dim())], x.numel() // x.shape[1]
        mean = x.sum(dims).div_(size)
        torch.sub(x, mean.view(-1, *[1] * (x.dim() - 2)), out=scratch)
        return mean, scratch.square_().sum(dims).div_(size)
    # Running statistics of a wider dtype are what makes the kernel accumulate half precision in float32.
    blank = None if x.dtype == dtype else x.new_zeros(x.shape[1], dtype=dtype)
    mean, var = torch.batch_norm_update_stats(x, blank, blank, 0.0)
    return mean, var


def outruns_batch_norm(x: Tensor) -> bool:
    """Whether `normalize` is faster than PyTorch's own, which sums such activations one by one."""
    return (
        x.device.type == "cpu"
        and x.dtype == statistics_dtype(x.dtype)
        and x.dim() > 2
        and x.numel() >= MANY
        and x.is_contiguous()
    )


def _is_strided(x: Tensor, groups: int) -> bool:
    """Whether a CPU would copy activations to fold their groups.

    A GPU does: it copies faster than it starts many kernels.
    """
    return groups > 1 and x.device.type == "cpu" and not x.is_contiguous() and x.movedim(1, -1).is_contiguous()


def _rows(x: Tensor, groups: int) -> Tensor:
    """A view `(b, G, positions, C)` of channels_last activations."""
    return x.movedim(1, -1).reshape(x.shape[0] // groups, groups, -1, x.shape[1])


def _normalize_rows(x: Tensor, gamma: Tensor, beta: Tensor, move: Tensor | None, eps: float, groups: int) -> Normalized:
    """`normalize` for groups of channels_last activations: arithmetic on a view, with y as scratch."""
    y = torch.empty_like(x)
    rows, out = _rows(x, groups), _rows(y, groups)
    size, shape = rows.shape[0] * rows.shape[2], (groups, x.shape[1])
    mean = _sum_rows(rows).div_(size)
    torch.sub(rows, mean.unsqueeze(1), out=out)
    var = _sum_rows(out.square_()).div_(size)
    slope = torch.rsqrt(var + eps).mul_(gamma.view(shape))
    center = mean if move is None else mean * move.view(shape)
    intercept = torch.addcmul(beta.view(shape), center, slope, value=-1)
    torch.addcmul(intercept.unsqueeze(1), rows, slope.unsqueeze(1), out=out)
    return Normalized(y, mean.view(-1), var.view(-1))


def _differentiate_rows(
    grad: Tensor, x: Tensor, gamma: Tensor, mean: Tensor, invstd: Tensor, groups: int
) -> Derivative:
    """`differentiate`, likewise: γ/s (grad − Σ grad / n − x̂ Σ grad·x̂ / n), as one affine map of x and grad."""
    grad_x = torch.empty_like(x)
    rows, grads, out = _rows(x, groups), _rows(grad, groups), _rows(grad_x, groups)
    size, shape = rows.shape[0] * rows.shape[2], (groups, 1, x.shape[1])
    torch.sub(rows, mean.view(shape), out=out)
    g_gamma = _sum_rows(out.mul_(grads)).view(-1) * invstd
    g_beta = _sum_rows(grads).view(-1)
    of_grad = gamma * invstd
    of_x = of_grad * invstd * g_gamma / -size
    constant = of_grad * g_beta / -size - of_x * mean
    torch.addcmul(constant.view(shape), rows, of_x.view(shape), out=out).addcmul_(grads, of_grad.view(shape))
    return Derivative(grad_x, g_gamma, g_beta)


def _sum_rows(rows: Tensor) -> Tensor:
    """Σ over samples and positions, `(G, C)`: first over samples, where the memory of a sample is one vector."""
    return rows.sum(0).sum(1)
