"""The layer: batch norm with perturbed statistics, on tensors alone, and the one place that chooses how to compute it.

With batch mean μ, biased variance σ², s = sqrt(σ² + eps), x̂ = (x − μ)/s and sg = stop-gradient,

    y = γ (1 + δσ) (x̂ − δμ · sg(μ/s)) + β

for every channel of every ghost group. A perturbation acts on vectors (`affine.py`), and three forms compute the same:

    arithmetic_layer    under transforms and compilers, on any device      formula.py
    native_layer        eagerly, few activations, or float64 in one layout  native.py
    KernelLayer         eagerly, many activations                          kernels.py

At δ = 0 and in one group, eagerly, `clean_batch_norm` is PyTorch's own.
"""

import torch
from torch import Tensor

from apart_func._torch import is_traced
from apart_func.layer.affine import Affine, Clean
from apart_func.layer.formula import Reduce, arithmetic_layer
from apart_func.layer.kernels import KernelLayer, outruns_batch_norm
from apart_func.layer.native import KERNEL_DEVICES, is_strided, native_layer
from apart_func.trees import BatchStats

# Below this many activations, it costs more to start operators than to run them: benchmarks/layer_cost.py --forms
SMALL = 2**15


def clean_batch_norm(x: Tensor, vectors: Clean, eps: float) -> Tensor:
    """Plain training-mode batch norm, which leaves its statistics in the vectors. Eager only.

    Args:
        x: activations `(N, C, ...)`.
        vectors: γ and β `(C,)`, and zeros in which the batch's mean and *unbiased* variance are left.
        eps: BN's constant, added to the variance.

    Returns:
        The output, of `x`'s shape and dtype.
    """
    weight, bias, mean, unbiased = vectors
    if outruns_batch_norm(x):
        y, center, var = KernelLayer.apply(x, weight, None, bias, eps, 1)
        size = x.numel() // x.shape[1]
        mean.copy_(center)
        unbiased.copy_(var).mul_(size / (size - 1))
        return y  # type: ignore[no-any-return]  # torch types no apply
    # Running statistics that start from nothing and take the batch whole are the batch's.
    return torch.batch_norm(x, weight, bias, mean, unbiased, True, 1.0, eps, torch.backends.cudnn.enabled)


def perturbed_batch_norm(
    x: Tensor, vectors: Affine, eps: float, groups: int, reduce: Reduce | None = None
) -> tuple[Tensor, BatchStats]:
    """Normalise by batch statistics that are shifted by a perturbation.

    Args:
        x: activations `(N, C, ...)`; row i is in ghost group i mod `groups`.
        vectors: γ', ω and β of every group, `(G·C,)`: what a perturbation makes of γ and β.
        eps: BN's constant, added to the variance.
        groups: number of ghost groups G ≥ 1, a divisor of N.
        reduce: makes moments over all ranks of those of this one, differentiably; None keeps these.

    Returns:
        The output, of `x`'s shape and dtype, and the groups' statistics without the perturbation, `(G·C,)`, in at
        least float32.
    """
    if is_traced():
        return _with_stats(arithmetic_layer(x, *vectors, eps, groups, reduce))
    if reduce is not None or x.device.type not in KERNEL_DEVICES:
        y, mean, var = arithmetic_layer(x, *vectors, eps, groups, reduce)
        return y, BatchStats(mean.detach(), var.detach())
    few = x.numel() < SMALL or (x.dtype == torch.float64 and not is_strided(x, groups))
    return _with_stats((native_layer if few else KernelLayer.apply)(x, *vectors, eps, groups))


def _with_stats(normalized: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, BatchStats]:
    y, mean, var = normalized
    return y, BatchStats(mean, var)
