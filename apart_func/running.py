"""What a pass records of batch norm, and how running statistics move: at each call, as in a plain forward.

Statistics of ghost groups are taken together for it: running statistics are those of samples, not of groups.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from apart_func.intercept import Site
from apart_func.trees import BatchStats, StatTree, stacked

# How a buffer of a layer gets its new value: (layer, key, value).
Store = Callable[[Any, str, Tensor], None]


def assign(layer: Any, key: str, value: Tensor) -> None:
    """Put a new tensor in a layer that is nobody else's."""
    layer._buffers[key] = value  # setattr would register it anew


@torch.no_grad()
def overwrite(layer: Any, key: str, value: Tensor) -> None:
    """Change the buffer of the user's layer in place, as PyTorch does."""
    getattr(layer, key).copy_(value)


class Record:
    """The statistics of every call of a pass, by layer.

    Args:
        store: how running statistics get their new value.
        dtype: of the recorded statistics.
    """

    def __init__(self, store: Store, dtype: torch.dtype) -> None:
        self._store, self._dtype = store, dtype
        self._calls: dict[str, list[BatchStats]] = {}

    def add(self, site: Site, stats: BatchStats, sizes: Any) -> None:
        """Write down a call, and move the running statistics of its layer.

        Args:
            site: the layer.
            stats: its batch statistics, `(C,)`.
            sizes: values a channel that they are of.
        """
        if self._store is overwrite:  # else a compiled backward would also differentiate the statistics, by nothing
            stats = BatchStats(stats.mean.detach(), stats.var.detach())
        advance(site, stats.mean, stats.var * (sizes / (sizes - 1)), self._store)
        if stats.mean.dtype != self._dtype:
            stats = BatchStats(stats.mean.to(self._dtype), stats.var.to(self._dtype))
        self._calls.setdefault(site.name, []).append(stats)

    def statistics(self) -> StatTree:
        """Batch statistics of the recorded calls; see `as_called`."""
        return as_called(self._calls)


def as_called(calls: Mapping[str, Sequence[BatchStats]]) -> StatTree:
    """Statistics of the calls of every layer as one tree: `(C,)`, or `(K, C)` for a layer called K times."""
    return {layer: stats[0] if len(stats) == 1 else stacked(list(stats)) for layer, stats in calls.items()}


def pooled(stats: BatchStats, sizes: Any, groups: int, clean: int) -> tuple[BatchStats, Any]:
    """Statistics `(C,)` of the samples of the first ghost groups together, and how many values they are of.

    The mean is the mean of their means, and the variance the mean of their variances plus the variance of their means.

    Args:
        stats: those of each group, `(G·C,)`.
        sizes: values a channel in a group, or `(G, 1)` where groups differ.
        groups: number of groups G.
        clean: how many of the groups to take together.
    """
    mean, var = (part.view(groups, -1)[:clean] for part in stats)
    if isinstance(sizes, Tensor) and sizes.dim():
        size = sizes[:clean].sum()
        share = sizes[:clean] / size
        center = (share * mean).sum(0)
        return BatchStats(center, (share * (var + (mean - center).square())).sum(0)), size
    between, center = torch.var_mean(mean, 0, unbiased=False)
    return BatchStats(center, between.add_(var.mean(0))), sizes * clean


def advance(site: Site, mean: Tensor, unbiased: Tensor, store: Store) -> None:
    """Move a layer's running statistics by one batch, as plain batch norm does.

    Args:
        site: the layer. One with a forward of its own counts the batch itself.
        mean: of the batch, `(C,)`.
        unbiased: its unbiased variance, `(C,)`.
        store: how the layer gets the new values.
    """
    layer = site.layer
    if not layer.track_running_stats or layer.running_mean is None:
        return
    count = layer.num_batches_tracked
    if site.stock and count is not None:
        count = count + 1
        store(layer, "num_batches_tracked", count)
    weight: Any = site.momentum
    if weight is None:  # all batches weigh alike; without a counter none does, as in PyTorch
        weight = 0.0 if count is None else torch.reciprocal(count.to(mean.dtype))
    for key, new in (("running_mean", mean), ("running_var", unbiased)):
        old = getattr(layer, key)
        # computed in the dtype of the batch's statistics, and kept in that of the running ones
        moved = torch.lerp(old, new, weight) if old.dtype == new.dtype else torch.lerp(old.to(new), new, weight).to(old)
        store(layer, key, moved)
