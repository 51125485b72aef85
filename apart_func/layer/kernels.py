"""The layer of many activations, eagerly: no pass over them more than plain batch norm makes.

    normalize       statistics of every channel of every ghost group, and an affine map by them
    differentiate   the derivative of training-mode batch norm
    KernelLayer     both as one operation of autograd

PyTorch's own kernels do the work. Two things they do badly on a CPU, and both are arithmetic on views here: moments of
contiguous float32 activations, which they sum one by one, and groups of channels_last ones, which would be copied. In
half precision the copies cost less than arithmetic that has no fast sums.
"""

from typing import Any, NamedTuple

import torch
from einops import rearrange
from torch import Tensor

from apart_func.layer.formula import statistics_dtype
from apart_func.layer.native import fold, is_strided, moments, native_layer, unfold

# From this many activations on, summing them faster is worth the few operators more: benchmarks/layer_cost.py --forms
MANY = 2**16

# channels_last activations by group: the memory of a sample is one vector of its positions and channels
ROWS = "(b g) c ... -> b g (...) c"


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


class KernelLayer(torch.autograd.Function):
    """The layer of many activations; arguments and results as in `formula.arithmetic_layer`."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, gamma: Tensor, omega: Tensor | None, beta: Tensor, eps: float, groups: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Normalise."""
        y, mean, var = normalize(x, gamma, omega, beta, eps, groups)
        ctx.eps, ctx.groups = eps, groups
        ctx.save_for_backward(x, gamma, omega, beta, mean, var)
        ctx.mark_non_differentiable(mean, var)
        ctx.set_materialize_grads(False)  # no zeros for these two
        return y, mean, var

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *_: Tensor) -> tuple[Tensor | None, ...]:
        """Differentiate; where the derivative is to be differentiated again, that of PyTorch's own batch norm."""
        if grad is None:
            return (None,) * 6
        x, gamma, omega, beta, mean, var = ctx.saved_tensors
        if torch.is_grad_enabled():
            inputs = (x, gamma, omega, beta)
            wanted = [tensor for tensor, needed in zip(inputs, ctx.needs_input_grad, strict=False) if needed]
            y = native_layer(*inputs, ctx.eps, ctx.groups)[0]
            found = iter(torch.autograd.grad(y, wanted, grad, create_graph=True))
            return (*(next(found) if needed else None for needed in ctx.needs_input_grad[:4]), None, None)
        invstd = (var + ctx.eps).rsqrt_()
        grad_x, g_gamma, g_beta = differentiate(grad, x, gamma, mean, invstd, ctx.groups, ctx.needs_input_grad[0])
        g_omega = None if omega is None else (mean * invstd).mul_(g_beta).neg_()
        return grad_x, g_gamma, g_omega, g_beta, None, None


def normalize(x: Tensor, gamma: Tensor, omega: Tensor | None, beta: Tensor, eps: float, groups: int) -> Normalized:
    """Compute y = γ' (x − μ) / s + β − ω μ / s, with the statistics of each ghost group.

    Args:
        x: activations `(N, C, ...)`; row i is in group i mod `groups`.
        gamma: γ' `(G·C,)`, contiguous, in the dtype of the statistics.
        omega: ω, likewise; None is 0.
        beta: β, likewise.
        eps: BN's constant, added to the variance.
        groups: number of ghost groups G, a divisor of N.
    """
    if is_strided(x, groups) and x.dtype == statistics_dtype(x.dtype):
        return _normalize_rows(x, gamma, omega, beta, eps, groups)
    y = torch.empty_like(x)
    folded, out = fold(x, groups), fold(y, groups)
    mean, var = fast_moments(folded, scratch=out)
    if omega is not None:
        beta = torch.addcmul(beta, omega, torch.rsqrt(var + eps).mul_(mean), value=-1)
    # In evaluation mode BN computes any affine map of x.
    unused = gamma.new_empty(0)
    torch.ops.aten.native_batch_norm.out(
        folded, gamma, beta, mean, var, False, 0.0, eps, out=out, save_mean=unused, save_invstd=unused
    )
    if out.data_ptr() != y.data_ptr():  # the groups were copied
        y.copy_(unfold(out, groups, x))
    return Normalized(y, mean, var)


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
    if is_strided(x, groups) and x.dtype == statistics_dtype(x.dtype):
        return _differentiate_rows(grad, x, gamma, mean, invstd, groups)
    grad_x, g_gamma, g_beta = torch.ops.aten.native_batch_norm_backward.default(
        fold(grad, groups),
        fold(x, groups),
        gamma,
        None,
        None,
        mean,
        invstd,
        True,
        0.0,  # eps has gone into invstd
        (for_x, True, True),
    )
    return Derivative(unfold(grad_x, groups, x) if for_x else None, g_gamma, g_beta)


def fast_moments(x: Tensor, scratch: Tensor) -> tuple[Tensor, Tensor]:
    """`moments`, by sums that are faster where there are many activations.

    Args:
        x: activations.
        scratch: of their shape and layout, overwritten where it helps.
    """
    if not outruns_batch_norm(x):
        return moments(x)
    dims, size = [0, *range(2, x.dim())], x.numel() // x.shape[1]
    mean = x.sum(dims).div_(size)
    torch.sub(x, mean.view(-1, *[1] * (x.dim() - 2)), out=scratch)
    return mean, scratch.square_().sum(dims).div_(size)


def outruns_batch_norm(x: Tensor) -> bool:
    """Whether `normalize` is faster than PyTorch's own, which sums such activations one by one."""
    return (
        x.device.type == "cpu" and x.dtype == torch.float32 and x.dim() > 2 and x.numel() >= MANY and x.is_contiguous()
    )


def _normalize_rows(
    x: Tensor, gamma: Tensor, omega: Tensor | None, beta: Tensor, eps: float, groups: int
) -> Normalized:
    """`normalize` for groups of channels_last activations: arithmetic on a view, with y as scratch."""
    y = torch.empty_like(x)
    rows, out = (rearrange(part, ROWS, g=groups) for part in (x, y))
    size, shape = rows.shape[0] * rows.shape[2], (groups, x.shape[1])
    mean = _sum_rows(rows).div_(size)
    torch.sub(rows, mean.unsqueeze(1), out=out)
    var = _sum_rows(out.square_()).div_(size)
    invstd = torch.rsqrt(var + eps)
    slope = gamma.view(shape) * invstd
    intercept = torch.addcmul(beta.view(shape), mean, slope, value=-1)
    if omega is not None:
        intercept.addcmul_(omega.view(shape), invstd.mul_(mean), value=-1)
    torch.addcmul(intercept.unsqueeze(1), rows, slope.unsqueeze(1), out=out)
    return Normalized(y, mean.view(-1), var.view(-1))


def _differentiate_rows(
    grad: Tensor, x: Tensor, gamma: Tensor, mean: Tensor, invstd: Tensor, groups: int
) -> Derivative:
    """`differentiate`, likewise: γ/s (grad − Σ grad / n − x̂ Σ grad·x̂ / n), as one affine map of x and grad."""
    grad_x = torch.empty_like(x)
    rows, grads, out = (rearrange(part, ROWS, g=groups) for part in (x, grad, grad_x))
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
