"""The layer as PyTorch's own batch norm, whose γ and β a perturbation moves. Eager only.

    y = γ' x̂ + β'     with β' = β − ω sg(μ/s), for every channel of every ghost group

So autograd knows all its derivatives, and at δ = 0 it is plain batch norm to the last bit. Ghost groups become channels,
which is a view of contiguous memory. The statistics are computed twice: first for μ/s.
"""

import torch
from einops import rearrange
from torch import Tensor

from apart_func._torch import as_shaped
from apart_func.layer.formula import FOLD, UNFOLD, statistics_dtype

# Where batch_norm_update_stats and native_batch_norm exist as kernels.
KERNEL_DEVICES = ("cpu", "cuda")


def native_layer(
    x: Tensor, gamma: Tensor, omega: Tensor | None, beta: Tensor, eps: float, groups: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Normalise by perturbed statistics; arguments and results as in `formula.arithmetic_layer`."""
    folded = fold(x, groups)
    mean, var = moments(folded.detach())
    if omega is not None:
        beta = torch.addcmul(beta, omega, torch.rsqrt(var + eps).mul_(mean), value=-1)
    y = torch.batch_norm(folded, gamma, beta, None, None, True, 0.0, eps, torch.backends.cudnn.enabled)
    if groups > 1:  # the order in memory is that of the samples again: `(b g) c` and `b (g c)` are one
        y = as_shaped(unfold(y, groups, x) if is_strided(x, groups) else y, x.shape)
    return y, mean, var


def fold(x: Tensor, groups: int) -> Tensor:
    """Make channels of the ghost groups: a view of contiguous memory, else a copy of the same kind of layout."""
    if groups == 1:
        return x
    if not is_strided(x, groups):
        return rearrange(x, FOLD, g=groups)
    return rearrange(rearrange(x, "(b g) c ... -> b ... (g c)", g=groups), "b ... c -> b c ...")


def unfold(y: Tensor, groups: int, like: Tensor) -> Tensor:
    """Undo `fold`, in the layout of the activations."""
    if groups == 1:
        return y
    if not is_strided(like, groups):
        return rearrange(y, UNFOLD, g=groups)
    return rearrange(rearrange(y, "b (g c) ... -> (b g) ... c", g=groups), "b ... c -> b c ...")


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of every channel, in at least float32."""
    dtype = statistics_dtype(x.dtype)
    # Running statistics of a wider dtype are what makes the kernel accumulate half precision in float32.
    blank = None if x.dtype == dtype else x.new_zeros(x.shape[1], dtype=dtype)
    mean, var = torch.batch_norm_update_stats(x, blank, blank, 0.0)
    return mean, var


def is_strided(x: Tensor, groups: int) -> bool:
    """Whether a CPU would copy activations to fold their groups.

    A GPU does: it copies faster than it starts many kernels.
    """
    return groups > 1 and x.device.type == "cpu" and not x.is_contiguous() and x.movedim(1, -1).is_contiguous()
