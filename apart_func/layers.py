"""What batch norm does in a pass, for the functional passes and for the drop-in.

    CleanLayers      δ = 0 in one group, eagerly: plain batch norm, differentiated by γ and β on its way
    ShiftedLayers    any δ, in ghost groups
    MixedLayers      the same, with the statistics of some groups written down

Each is a `Handler`, and `prepare`s the vectors of all layers together before a forward: where layers are small, it
costs more to start operators than to run them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from apart_func._torch import is_recomputing, is_traced
from apart_func.distributed import synchronisation
from apart_func.intercept import Site
from apart_func.layer import clean_batch_norm
from apart_func.layer.affine import (
    Affine,
    Parameters,
    Tapped,
    affine,
    affine_of_layers,
    clean_of_layers,
    clean_vectors,
    together,
)
from apart_func.layer.formula import statistics_dtype
from apart_func.layer.rows import Grouping, Normed, check_input, check_variance, grouped_batch_norm
from apart_func.running import Move, Record, Store, advance, advance_together, as_called, assign
from apart_func.trees import BatchStats, StatGrads, StatGradTree, StatTree

# A perturbation by layer; or, in an eager pass, of all layers together under this name.
ALL = "all layers"
Shifts = Mapping[str, Any]


class ShiftedLayers:
    """Batch norm with perturbed statistics, in ghost groups.

    Args:
        channels: of every layer.
        shifts: the perturbation.
        grouping: how the rows of an input form groups.

    Attributes:
        shifts: the perturbation.
        grouping: as above. Both may be replaced before a forward is prepared.
    """

    def __init__(self, channels: Mapping[str, int], shifts: Shifts, grouping: Grouping) -> None:
        self.channels, self.shifts, self.grouping = channels, shifts, grouping
        self._is_prepared = True
        self._parameters: dict[str, Parameters] = {}
        self._prepared: dict[str, Affine] = {}
        self._by_layer: Mapping[str, Any] = {}

    def expect(self, is_prepared: bool, has_graph: bool) -> None:
        """Say what the next call is.

        Args:
            is_prepared: whether what is prepared is of the forward that it belongs to.
            has_graph: whether a call that is run again had a graph the first time, and has its gradients there.
        """
        self._is_prepared = is_prepared

    def prepare(self, parameters: dict[str, Parameters]) -> None:
        """Compute the vectors of all layers at once, from their γ and β."""
        if ALL in self.shifts:
            self._parameters, self._by_layer = parameters, {}
            self._prepared = affine_of_layers(parameters, self.channels, self.shifts[ALL], self.grouping.groups)

    def taps(self) -> list[Tensor]:
        """What the loss is differentiated by besides the arguments of the pass."""
        return []

    def flush(self, layer: str | None = None) -> None:
        """Move the running statistics by what was put off: nothing, here."""

    def normalized(self, site: Site, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Normed:
        """The layer, and the statistics of its groups."""
        name, used = site.name, Parameters(weight, bias)
        check_input(name, x, self.channels[name])
        vectors = self._prepared.get(name) if self._is_prepared else None
        if vectors is None or not _fits(vectors.gamma, self._parameters[name], used, x):
            vectors = affine(x, used, self._shift(name), self.grouping.groups)
        reduce = synchronisation(site.layer, x, self.grouping.groups)
        normed = grouped_batch_norm(name, x, vectors, eps, self.grouping, reduce)
        return normed if reduce is None else normed._replace(sizes=reduce.sizes)

    def _shift(self, name: str) -> Any:
        if ALL not in self.shifts:
            return self.shifts[name]
        if not self._by_layer:
            self._by_layer = self.shifts[ALL].by_layer(self.channels, self.grouping.groups)
        return self._by_layer[name]

    def __call__(self, site: Site, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
        """See `intercept.Handler`."""
        return self.normalized(site, x, weight, bias, eps).y


def _fits(vector: Tensor, own: Parameters, used: Parameters, x: Tensor) -> bool:
    """Whether a layer computes with its own γ and β, in the dtype of a vector that was prepared of them."""
    same = used.weight is own.weight and used.bias is own.bias
    return same and (vector.dtype == x.dtype or vector.dtype == statistics_dtype(x.dtype))


class MixedLayers(ShiftedLayers):
    """The same, with the statistics of the clean groups written down.

    Args:
        channels: of every layer.
        shifts: the perturbation.
        grouping: how the rows of an input form groups.
        clean: how many groups are clean, the first ones.
        store: how running statistics get their new values.
        dtype: of the statistics that are written down.
    """

    def __init__(
        self,
        channels: Mapping[str, int],
        shifts: Shifts,
        grouping: Grouping,
        clean: int,
        store: Store,
        dtype: torch.dtype,
    ) -> None:
        super().__init__(channels, shifts, grouping)
        self.record = Record(store, dtype, grouping.groups, clean, later=store is assign and not is_traced())

    def __call__(self, site: Site, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
        """See `intercept.Handler`."""
        y, stats, sizes = self.normalized(site, x, weight, bias, eps)
        if not is_recomputing():
            self.record.add(site, stats, sizes)
        return y

    @property
    def is_mixed(self) -> bool:
        """Whether clean and perturbed samples are in one batch."""
        return self.grouping.groups > 1

    def flush(self, layer: str | None = None) -> None:
        """Move the running statistics by what was put off; with a layer, if its own were."""
        self.record.flush(layer)


class _Forward:
    """The calls of layers in one forward, and the vectors of all layers for it."""

    def __init__(self, parameters: dict[str, Parameters], channels: Mapping[str, int]) -> None:
        self.parameters = parameters
        self.all, self.left = clean_of_layers(parameters, channels) if parameters else (None, {})
        self.calls: list[tuple[str, Tapped, bool]] = []  # the flag: whether its vectors are a part of all
        self.again: list[tuple[str, Tapped, bool]] = []  # run again, for their gradients

    def taps(self) -> list[Tensor]:
        """γ and β of all layers, then those of calls that have their own."""
        own = [tap for _, call, prepared in self.calls + self.again if not prepared for tap in call.vectors[:2]]
        return [*(self.all[:2] if self.all else ()), *own]


class CleanLayers:
    """Plain batch norm: the loss is differentiated by γ and β of each call, as BN's backward does anyway. Eager only.

    The vectors of all layers stand together for that; a second call of a layer in a forward has its own.

    Args:
        channels: of every layer.
        store: how running statistics get their new values.
        like: 0-d, of the dtype and device of statistics.
        retain: whether `backward()` is to leave gradients in the taps.
    """

    def __init__(self, channels: Mapping[str, int], store: Store, like: Tensor, retain: bool = False) -> None:
        self.channels, self._store, self._like, self._retain = channels, store, like, retain
        self._is_prepared = self._has_graph = True
        self._forwards = [_Forward({}, channels)]
        self._waiting: dict[str, Move] = {}

    def expect(self, is_prepared: bool, has_graph: bool) -> None:
        """See `ShiftedLayers.expect`."""
        self._is_prepared, self._has_graph = is_prepared, has_graph

    def prepare(self, parameters: dict[str, Parameters]) -> None:
        """Put the vectors of all layers together for a forward."""
        self._forwards.append(_Forward(parameters, self.channels))
        self._keep(self._forwards[-1].taps())

    def __call__(self, site: Site, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
        """See `intercept.Handler`."""
        name, used = site.name, Parameters(weight, bias)
        check_input(name, x, self.channels[name])
        check_variance(name, x, 1)
        forward = self._forwards[-1 if self._is_prepared else 0]
        vectors = forward.left.pop(name, None)
        prepared = vectors is not None and _fits(vectors.weight, forward.parameters[name], used, x)
        if vectors is None or not prepared:
            vectors = clean_vectors(x, used)
            self._keep(vectors[:2])
        y = clean_batch_norm(x, vectors, eps)
        size = x.numel() // x.shape[1]
        if is_recomputing():
            if not self._has_graph:
                forward.again.append((name, Tapped(vectors, (size - 1) / size, eps), prepared))
        else:
            move = Move(site, vectors.mean, vectors.unbiased)
            if self._store is assign:
                self.flush(name)
                self._waiting[name] = move
            else:
                advance(move, self._store)
            forward.calls.append((name, Tapped(vectors, (size - 1) / size, eps), prepared))
        return y

    def _keep(self, taps: Sequence[Tensor]) -> None:
        for tap in taps if self._retain else ():
            tap.retain_grad()

    def taps(self) -> list[Tensor]:
        """What the loss is differentiated by besides the arguments of the pass."""
        return [tap for forward in self._forwards for tap in forward.taps()]

    def flush(self, layer: str | None = None) -> None:
        """Move the running statistics by what was put off; with a layer, if its own were."""
        if self._waiting and (layer is None or layer in self._waiting):
            waiting, self._waiting = self._waiting, {}
            advance_together(list(waiting.values()))

    def statistics(self) -> StatTree:
        """Batch statistics of the layers that were called."""
        if call := self._of_all():
            return self._by_layer(BatchStats, call.stats())
        stats: dict[str, list[BatchStats]] = {}
        for forward in self._forwards:
            for name, call, _ in forward.calls:
                stats.setdefault(name, []).append(BatchStats(*(part.to(self._like.dtype) for part in call.stats())))
        return as_called(stats)

    def stat_grads(self, grads: Sequence[Tensor]) -> StatGradTree:
        """Gradients by the relative shifts of all layers, from the loss's gradients by the taps."""
        if call := self._of_all():
            return self._by_layer(StatGrads, call.statistic_gradients(*grads))
        zero, lengths, rest = self._like, list(self.channels.values()), iter(grads)
        sums = {name: StatGrads(zero.new_zeros(size), zero.new_zeros(size)) for name, size in self.channels.items()}
        for forward in self._forwards:
            split = [next(rest).split(lengths) for _ in forward.all[:2]] if forward.all else []
            of_all = dict(zip(self.channels, zip(*split, strict=True), strict=False))
            for name, call, prepared in forward.calls + forward.again:
                g = call.statistic_gradients(*(of_all[name] if prepared else (next(rest), next(rest))))
                sums[name] = StatGrads(sums[name].mean + g.mean, sums[name].scale + g.scale)
        return sums

    def _of_all(self) -> Tapped | None:
        """The calls of all layers as one on the vectors of all, where there was one forward that called each once."""
        called = [forward for forward in self._forwards if forward.calls]
        if len(called) != 1 or (forward := called[0]).all is None or forward.all.weight.dtype != self._like.dtype:
            return None
        of_name = {name: call for name, call, prepared in forward.calls if prepared}
        if not len(forward.calls) == len(of_name) == len(self.channels) or any(f.again for f in self._forwards):
            return None
        return together(forward.all, [of_name[name] for name in self.channels])

    def _by_layer(self, kind: Callable[..., Any], pair: tuple[Tensor, Tensor]) -> dict[str, Any]:
        lengths = list(self.channels.values())
        return dict(zip(self.channels, map(kind, *(vector.split(lengths) for vector in pair)), strict=True))
