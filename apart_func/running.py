"""How running statistics move: once for every call of a layer in a proxy pass, as in a plain forward.

Statistics of ghost groups are pooled for it: running statistics are those of samples, not of groups.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from apart_func.intercept import BatchNormCall
from apart_func.trees import BatchStats

# Gives a buffer of a layer a new value: (layer name, buffer, value).
Store = Callable[[str, Tensor, Tensor], None]


@torch.no_grad()
def copy_into_buffer(layer: str, buffer: Tensor, value: Tensor) -> None:
    """Change the buffer of the user's layer in place, as PyTorch does."""
    buffer.copy_(value)


def advance(call: BatchNormCall, stats: BatchStats, size: Any, store: Store) -> None:
    """Move a layer's running statistics by those of a batch of `size` values a channel, as plain batch norm does."""
    if call.running_mean is None or call.running_var is None:
        return
    mean, var = stats
    count: Any = call.layer._buffers["num_batches_tracked"]
    if call.counts and count is not None:
        counted = count + 1
        store(call.name, count, counted)
        count = counted
    weight: Any = call.momentum
    if weight is None:  # all batches weigh alike; without a counter none does, as in PyTorch
        weight = 0.0 if count is None else torch.reciprocal(count.to(mean.dtype))
    unbiased = var * (size / (size - 1))
    for old, new in ((call.running_mean, mean), (call.running_var, unbiased)):
        # computed in the dtype of the batch's statistics, and kept in that of the running ones
        moved = torch.lerp(old, new, weight) if old.dtype == new.dtype else torch.lerp(old.to(new), new, weight).to(old)
        store(call.name, old, moved)


def pooled(mean: Tensor, var: Tensor, sizes: Any) -> tuple[BatchStats, Any]:
    """Return statistics `(C,)` of the samples of several ghost groups together, and how many values they are of.

    The mean is the mean of their means, and the variance the mean of their variances plus the variance of their means.
    `sizes` are values a channel in a group, or `(G', 1)` with those of these groups first if groups differ.
    """
    groups = mean.shape[0]
    if groups == 1:
        return BatchStats(mean[0], var[0]), sizes[0, 0] if isinstance(sizes, Tensor) and sizes.dim() else sizes
    if isinstance(sizes, Tensor) and sizes.dim():
        size = sizes[:groups].sum()
        share = sizes[:groups] / size
        center = (share * mean).sum(0)
        return BatchStats(center, (share * (var + (mean - center).square())).sum(0)), size
    center = mean.mean(0)  # torch.var_mean takes twenty times as long
    return BatchStats(center, (var + (mean - center).square()).mean(0)), sizes * groups
