"""What a pass records of batch norm, and how running statistics move.

They move at each call of a layer, as in a plain forward. An eager pass of the functional model puts that off until
somebody looks at those of the layer (`watch`), or the forward ends: then all move together, in a few operations.

Statistics of ghost groups are taken together for it: running statistics are those of samples, not of groups.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from apart_func._torch import counted
from apart_func.intercept import Route, Site
from apart_func.layer.affine import spread
from apart_func.trees import BatchStats, StatTree, stacked

# How a buffer of a layer gets its new value: (layer, key, value).
Store = Callable[[Any, str, Tensor], None]


def assign(layer: Any, key: str, value: Tensor) -> None:
    """Put a new tensor in a layer that is nobody else's."""
    layer._buffers[key] = value  # setattr would register it anew


@torch.no_grad()
def overwrite(layer: Any, key: str, value: Tensor) -> None:
    """Change the buffer of the user's layer in place, as PyTorch does."""
    layer._buffers[key].copy_(value)


class Move(NamedTuple):
    """A batch by which the running statistics of a layer move.

    Attributes:
        site: the layer. One with a forward of its own counts the batch itself.
        mean: of the batch, `(C,)`.
        unbiased: its unbiased variance, `(C,)`.
    """

    site: Site
    mean: Tensor
    unbiased: Tensor


def advance(move: Move, store: Store) -> None:
    """Move a layer's running statistics by one batch, as plain batch norm does.

    Args:
        move: the layer and its batch.
        store: how the layer gets the new values.
    """
    site, mean, unbiased = move
    buffers = site.layer._buffers
    if not is_tracked(site):
        return
    count = buffers["num_batches_tracked"]
    if site.stock and count is not None:
        count = count + 1
        store(site.layer, "num_batches_tracked", count)
    weight: Any = site.momentum
    if weight is None:  # all batches weigh alike; without a counter none does, as in PyTorch
        weight = 0.0 if count is None else torch.reciprocal(count.to(mean.dtype))
    for key, new in (("running_mean", mean), ("running_var", unbiased)):
        old: Any = buffers[key]
        # computed in the dtype of the batch's statistics, and kept in that of the running ones
        moved = torch.lerp(old, new, weight) if old.dtype == new.dtype else torch.lerp(old.to(new), new, weight).to(old)
        store(site.layer, key, moved)


def advance_together(moves: Sequence[Move]) -> None:
    """Move the running statistics of different layers that are nobody else's, alike ones at once. Eager only."""
    tracked = [move for move in moves if is_tracked(move.site)]
    layers = [move.site.layer for move in tracked]
    counting = [move.site.layer for move in tracked if move.site.stock]  # the others count for themselves
    counts: list[Any] = [layer._buffers["num_batches_tracked"] for layer in counting]
    momenta: tuple[Any, ...] = tuple(move.site.momentum for move in tracked)
    columns: list[list[Any]] = [[layer._buffers[key] for layer in layers] for key in ("running_mean", "running_var")]
    columns += [[move.mean for move in tracked], [move.unbiased for move in tracked]]
    alike = len(tracked) > 1 and None not in momenta and None not in counts
    if not alike or len({(vector.dtype, vector.device) for column in columns for vector in column}) > 1:
        for move in tracked:
            advance(move, assign)
        return
    sizes = [move.mean.shape[0] for move in tracked]
    old_mean, old_var, mean, unbiased = (torch.cat(column) for column in columns)
    weight = momenta[0] if len(set(momenta)) == 1 else spread(momenta, tuple(sizes), like=mean)
    new = (torch.lerp(old, now, weight).split(sizes) for old, now in ((old_mean, mean), (old_var, unbiased)))
    for layer, moved_mean, moved_var in zip(layers, *new, strict=True):
        layer._buffers.update(running_mean=moved_mean, running_var=moved_var)
    for layer, count in zip(counting, counted(counts) if counts else (), strict=True):
        layer._buffers.update(num_batches_tracked=count)


def is_tracked(site: Site) -> bool:
    """Whether a layer keeps running statistics."""
    return bool(site.layer.track_running_stats) and site.layer._buffers["running_mean"] is not None


class Record:
    """The statistics of every call of a pass, by layer: those of the clean groups taken together.

    Args:
        store: how running statistics get their new value.
        dtype: of the recorded statistics.
        groups: number of ghost groups G that the statistics are of.
        clean: how many of them are written down, the first ones.
        later: whether to put everything off until `flush`.
    """

    def __init__(self, store: Store, dtype: torch.dtype, groups: int = 1, clean: int = 1, later: bool = False) -> None:
        self._store, self._dtype, self._groups, self._clean, self._later = store, dtype, groups, clean, later
        self._waiting: dict[str, tuple[Site, BatchStats, Any]] = {}
        self._calls: dict[str, list[BatchStats]] = {}

    def add(self, site: Site, stats: BatchStats, sizes: Any) -> None:
        """Write down a call, and move the running statistics of its layer.

        Args:
            site: the layer.
            stats: batch statistics of every channel of every group, `(G·C,)`.
            sizes: values a channel in a group, or `(G, 1)` where groups differ.
        """
        if self._later and not isinstance(sizes, Tensor):
            self.flush(site.name)
            self._waiting[site.name] = (site, stats, sizes)
            return
        if self._store is overwrite:  # else a compiled backward would also differentiate the statistics, by nothing
            stats = BatchStats(stats.mean.detach(), stats.var.detach())
        if self._groups > 1:
            mean, var = (part.view(self._groups, -1)[: self._clean] for part in stats)
            stats, sizes = pooled(mean, var, sizes)
        advance(Move(site, stats.mean, stats.var * (sizes / (sizes - 1))), self._store)
        self._note(site, stats)

    def _note(self, site: Site, stats: BatchStats) -> None:
        if stats.mean.dtype != self._dtype:
            stats = BatchStats(stats.mean.to(self._dtype), stats.var.to(self._dtype))
        self._calls.setdefault(site.name, []).append(stats)

    def flush(self, layer: str | None = None) -> None:
        """Do what was put off; with a layer, if that was."""
        if not self._waiting or (layer is not None and layer not in self._waiting):
            return
        waiting = list(self._waiting.values())
        self._waiting = {}
        if len({(stats.mean.dtype, stats.mean.device) for _, stats, _ in waiting}) > 1:
            self._later = False
            for call in waiting:
                self.add(*call)
            self._later = True
            return
        groups, channels = self._groups, tuple(stats.mean.shape[0] // self._groups for _, stats, _ in waiting)
        mean, var = (
            torch.cat([part.view(groups, -1) for part in column], dim=1)[: self._clean]
            for column in zip(*(stats for _, stats, _ in waiting), strict=True)
        )
        together = pooled(mean, var, 0)[0] if groups > 1 else BatchStats(mean[0], var[0])
        counts = [size * self._clean for _, _, size in waiting]
        unbias = spread(tuple(count / (count - 1) for count in counts), channels, like=mean)
        columns = (vector.split(channels) for vector in (*together, together.var * unbias))
        moves = []
        for (site, _, _), mean, var, unbiased in zip(waiting, *columns, strict=True):
            self._note(site, BatchStats(mean, var))
            moves.append(Move(site, mean, unbiased))
        advance_together(moves)

    def statistics(self) -> StatTree:
        """Batch statistics of the recorded calls; see `as_called`."""
        self.flush()
        return as_called(self._calls)


def as_called(calls: Mapping[str, Sequence[BatchStats]]) -> StatTree:
    """Statistics of the calls of every layer as one tree: `(C,)`, or `(K, C)` for a layer called K times."""
    return {layer: stats[0] if len(stats) == 1 else stacked(list(stats)) for layer, stats in calls.items()}


def pooled(mean: Tensor, var: Tensor, sizes: Any) -> tuple[BatchStats, Any]:
    """Statistics `(C,)` of the samples of several ghost groups together, and how many values they are of.

    The mean is the mean of their means, and the variance the mean of their variances plus the variance of their means.

    Args:
        mean: of each group, `(G, C)`.
        var: biased variance, likewise.
        sizes: values a channel in a group, or a `(G', 1)` tensor with them first where groups differ.
    """
    groups = mean.shape[0]
    if isinstance(sizes, Tensor) and sizes.dim():
        size = sizes[:groups].sum()
        share = sizes[:groups] / size
        center = (share * mean).sum(0)
        return BatchStats(center, (share * (var + (mean - center).square())).sum(0)), size
    center = mean.mean(0)  # torch.var_mean takes twenty times as long
    return BatchStats(center, (var + (mean - center).square()).mean(0)), sizes * groups


def watch(layers: Mapping[str, nn.Module], route: Route) -> None:
    """Let private layers do what was put off before somebody looks at their buffers."""
    for name, layer in layers.items():
        vars(layer)["_buffers"] = _Watched(layer._buffers, route, name)


class _Watched(dict[str, Any]):
    """The buffers of a layer, up to date whenever they are read: as an attribute, by name, or all of them."""

    def __init__(self, buffers: Mapping[str, Any], route: Route, layer: str) -> None:
        super().__init__(buffers)
        self._route, self._layer = route, layer

    def _flush(self) -> None:
        handler: Any = self._route.handler
        if handler is not None and hasattr(handler, "flush"):
            handler.flush(self._layer)

    def __getitem__(self, key: str) -> Any:
        if self._route.handler is not None:
            self._flush()
        return dict.__getitem__(self, key)

    def get(self, key: str, default: Any = None) -> Any:
        """As of a dict."""
        self._flush()
        return super().get(key, default)

    def items(self) -> Any:
        """As of a dict."""
        self._flush()
        return super().items()

    def values(self) -> Any:
        """As of a dict."""
        self._flush()
        return super().values()
