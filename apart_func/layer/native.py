"""The layer as PyTorch's own batch norm, whose γ and β a perturbation moves. Eager only.

    y = γ' x̂ + β'     with γ' = γ (1 + δσ) and β' = β − γ' δμ · sg(μ/s), for every channel of every ghost group

So autograd knows all its derivatives, and at δ = 0 it is plain batch norm to the last bit. Ghost groups become channels,
which is a view of contiguous memory. The statistics are computed twice: first for μ/s.
"""

import torch
from einops import rearrange
from torch import Tensor

from apart_func._torch import as_itself
from apart_func.layer.formula import FOLD, UNFOLD, statistics_dtype

# Where batch_norm_update_stats and native_batch_norm exist as kernels.
KERNEL_DEVICES = ("cpu", "cuda")


def native_layer(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    shift: Tensor | None,
    scale: Tensor | None,
    eps: float,
    groups: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Normalise by perturbed statistics; arguments and results as in `kernels.KernelLayer`."""
    folded = fold(x, groups)
    mean, var = moments(folded.detach())
    gamma = weight if scale is None else torch.addcmul(weight, weight, scale)
    beta = bias
    if shift is not None:
        offset = (mean * torch.rsqrt(var + eps)).view(groups, -1) if groups > 1 else mean * torch.rsqrt(var + eps)
        beta = torch.addcmul(bias, gamma * shift, offset, value=-1)
    gamma, beta = for_each_group(gamma, groups), for_each_group(beta, groups)
    y = torch.batch_norm(folded, gamma, beta, None, None, True, 0.0, eps, torch.backends.cudnn.enabled)
    return (y if groups == 1 else as_itself(unfold(y, groups, x))), mean, var


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


def for_each_group(vector: Tensor, groups: int) -> Tensor:
    """`(C,)` or `(G, C)` as `(G·C,)`, contiguous in memory: the kernels do not look at strides."""
    if groups > 1 and vector.dim() == 1:
        vector = vector.expand(groups, -1)
    return vector.contiguous().view(-1)
