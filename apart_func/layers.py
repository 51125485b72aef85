"""What batch norm does in every pass: it is normalised at δ, and the statistics of its groups are recorded.

    proxy pass           δ = 0, one group, which is clean
    adversarial pass     δ in every group, none of them clean
    mixed pass           the first groups clean, the others at δ

Running statistics move by the clean groups, so that a pass without one moves nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from apart_func._torch import backward_task, unseen_by_modes
from apart_func.groups import Grouping, check_input, grouped_batch_norm, not_by_sample
from apart_func.intercept import BatchNormCall
from apart_func.kernels import perturbed_batch_norm
from apart_func.ranks import synchronisation
from apart_func.running import Store, advance, pooled
from apart_func.trees import BatchStats, Perturbation, PerturbationTree, StatTree, stack_calls


class Record:
    """The statistics, in a dtype, that the layers of a pass normalised by, call by call.

    The first ghost groups are `clean`: running statistics move by these, which `store` puts in place.
    """

    def __init__(self, clean: int, store: Store, dtype: torch.dtype) -> None:
        self.clean, self._store, self._dtype = clean, store, dtype
        self._clean_stats: dict[str, list[BatchStats]] = {}
        self._other_stats: dict[str, list[BatchStats]] = {}

    def add(self, call: BatchNormCall, mean: Tensor, var: Tensor, sizes: Any) -> None:
        """Record statistics of groups of some `sizes`, and move the running ones of the layer."""
        clean, is_one = self.clean, mean.dim() == 1
        if clean:
            stats, size = (BatchStats(mean, var), sizes) if is_one else pooled(mean[:clean], var[:clean], sizes)
            advance(call, stats, size, self._store)
            self._note(self._clean_stats, call.name, stats)
        if not is_one:
            others = (mean[clean:], var[clean:]) if clean else (mean, var)
            self._note(self._other_stats, call.name, BatchStats(*others))
        elif not clean:
            self._note(self._other_stats, call.name, BatchStats(mean.unsqueeze(0), var.unsqueeze(0)))

    def _note(self, calls: dict[str, list[BatchStats]], layer: str, stats: BatchStats) -> None:
        calls.setdefault(layer, []).append(BatchStats(stats.mean.to(self._dtype), stats.var.to(self._dtype)))

    def clean_stats(self) -> StatTree:
        """Return the statistics of the clean samples: `(C,)`, or `(K, C)` for a layer called K times."""
        return stack_calls(self._clean_stats)

    def perturbed_stats(self) -> StatTree:
        """Return the statistics of every other ghost group: `(G, C)`, or `(K, G, C)`."""
        return stack_calls(self._other_stats)


class PerturbedLayers:
    """The handler of a forward, in which every layer is at its δ, `(C,)`, or `(G, C)` for one in each ghost group.

    `task` is the number of the backward that the forward is part of. In another one, which is its own, a checkpointed
    layer only runs again.
    """

    def __init__(self, perturbation: Mapping[str, Perturbation], grouping: Grouping, record: Record, task: int) -> None:
        self.perturbation, self.grouping, self.record, self._task = perturbation, grouping, record, task
        self._rows: dict[str, int] = {}
        self.mixes = 0 < record.clean < grouping.groups

    def normalize(self, call: BatchNormCall) -> Tensor:
        """See `Handler`."""
        name, x, shifts = call.name, call.x, self.perturbation[call.name]
        check_input(name, x, shifts.mean.shape[-1])
        groups, samples, rows = self.grouping
        reduce = synchronisation(call.layer, x, groups)
        sizes: Any = x.numel() // (x.size(1) * groups)
        if sizes > 1 and (groups == 1 or (x.size(0) == samples and not callable(rows))):
            y, mean, var = perturbed_batch_norm(x, call.weight, call.bias, *shifts, call.eps, groups, reduce)
        else:  # seldom: an error, or a setting of rows
            (y, mean, var), sizes = grouped_batch_norm(call, shifts, self.grouping, reduce)
        if backward_task() == self._task:
            self._rows[name] = self._rows.get(name, 0) + x.size(0)
            with unseen_by_modes():
                self.record.add(call, mean, var, sizes if reduce is None else reduce.sizes)
        return y

    def check_rows(self) -> None:
        """Raise a BatchError if layers which saw chunks of the batch have not seen all of it at the forward's end."""
        groups, samples, rows = self.grouping
        if groups > 1 and samples is not None and not callable(rows):
            for name, seen in self._rows.items():
                if seen % samples:
                    raise not_by_sample(name, seen, samples)


def in_groups(perturbation: PerturbationTree, clean: int, groups: int) -> PerturbationTree:
    """Return a perturbation of every ghost group, `(G, C)`, which is zero in the clean ones, the first."""
    like = next(iter(perturbation.values())).mean
    is_perturbed = (torch.arange(groups, device=like.device) >= clean).to(like.dtype).unsqueeze(1)
    return {name: Perturbation(*(is_perturbed * shift for shift in shifts)) for name, shifts in perturbation.items()}
