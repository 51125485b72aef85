"""Which rows of a layer's input form a ghost group: sample i is in group i mod G.

Most layers see one row a sample. Where points, frames or tokens of a sample are rows of their own, `rows` says how rows
belong to samples:

    "consecutive"   the rows of a sample follow one another               (n p) c
    "interleaved"   the first rows of all samples, then the second ones   (p n) c
    function        (layer name, input) -> sample of every row, `(R,)`

A layer that gets the batch in chunks, one call after another, sees its rows in the order of the samples.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from einops import rearrange
from torch import Tensor

from apart_func._torch import is_concrete
from apart_func.batch_norm import IndexedGroups, Normalized, Reduce, affine, formula, statistics_dtype
from apart_func.checks import is_count
from apart_func.errors import BatchError, SettingError
from apart_func.intercept import BatchNormCall
from apart_func.kernels import perturbed_batch_norm
from apart_func.trees import Perturbation

Rows = Literal["consecutive", "interleaved"] | Callable[[str, Tensor], Tensor]


class Grouping(NamedTuple):
    """How the samples of a pass form ghost groups."""

    groups: int
    samples: int | None  # None if nobody knows, and then every row counts as one
    rows: Rows | None = None


def grouped_batch_norm(
    call: BatchNormCall, perturbation: Perturbation, grouping: Grouping, reduce: Reduce | None = None
) -> tuple[Normalized, Any]:
    """Return the output of a layer whose groups have perturbed statistics, and the values a channel of a group."""
    (groups, samples, rows), layer, x = grouping, call.name, call.x
    parameters = call.weight, call.bias, *perturbation
    if callable(rows) and groups > 1:
        if reduce is not None:
            problem = f"layer {layer!r} is synchronised over ranks, and a function rows= makes groups of unlike sizes"
            raise BatchError(f"{problem}. Use rows='consecutive' or 'interleaved', groups=1, or a BatchNorm layer.")
        indexed = _indexed_groups(layer, x, grouping)
        return formula(x, affine(x, *parameters), call.eps, indexed), indexed.sizes
    per_sample = 1 if groups == 1 or len(x) == samples else _rows_per_sample(layer, len(x), grouping)
    if reduce is None:  # one value on each of several ranks has a variance
        _check_variance(layer, x, groups)
    consecutive = per_sample > 1 and rows == "consecutive"
    if consecutive:
        x = rearrange(x, "(n p) c ... -> (p n) c ...", p=per_sample)
    normalized = perturbed_batch_norm(x, *parameters, call.eps, groups, reduce)
    if consecutive:
        normalized = normalized._replace(y=rearrange(normalized.y, "(p n) c ... -> (n p) c ...", p=per_sample))
    return normalized, x.numel() // (x.shape[1] * groups)


def _rows_per_sample(layer: str, count: int, grouping: Grouping) -> int:
    """Return how many rows of a layer's input belong to a sample."""
    groups, samples, rows = grouping
    if samples is None or (count < samples and samples % count == 0):  # a chunk of the batch begins at a multiple of G
        if count % groups:
            problem = f"layer {layer!r} sees {count} rows, which groups={groups} does not divide"
            raise BatchError(f"{problem}. Use a divisor, and drop_last=True in the data loader.")
        return 1
    if rows is None:
        raise not_by_sample(layer, count, samples)
    if count % samples:
        problem = f"layer {layer!r} sees {count} rows, which are no multiple of the {samples} samples"
        raise BatchError(f"{problem}; rows={rows!r} cannot be. Say rows=function (layer, input) -> sample of each row.")
    return count // samples


def not_by_sample(layer: str, count: int, samples: int) -> BatchError:
    """Return the error for a layer whose rows cannot be assigned to samples."""
    return BatchError(
        f"layer {layer!r} sees {count} rows of {samples} samples, and ghost groups are groups of samples. Say how they "
        "belong together: rows='consecutive' (those of a sample follow one another), rows='interleaved' (one of every "
        "sample, and again) or a function (layer, input) -> sample of every row; or use groups=1."
    )


def _indexed_groups(layer: str, x: Tensor, grouping: Grouping) -> IndexedGroups:
    """Ask the function `rows` for the groups of a layer's rows, which need not be alike in number."""
    groups, samples, rows = grouping
    found: Any = rows(layer, x) if callable(rows) else None
    if not isinstance(found, Tensor) or found.shape != x.shape[:1] or found.dtype != torch.long:
        given = f"{found.dtype} {tuple(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
        expected = f"expected the sample of every row, int64 of shape ({len(x)},)"
        raise BatchError(f"rows of layer {layer!r} returned {given}; {expected}.")
    index = found.to(x.device) % groups
    positions = torch.full_like(index, x[0, 0].numel(), dtype=statistics_dtype(x.dtype))
    sizes = positions.new_zeros(groups).index_add(0, index, positions)
    if is_concrete(found):
        if bool((found < 0).any()) or (samples is not None and bool((found >= samples).any())):
            raise BatchError(f"rows of layer {layer!r} names samples outside of the batch of {samples}.")
        if sizes.min() < 2:
            few = f"{int(sizes.min())} values a channel in one of {groups} groups"
            raise BatchError(f"layer {layer!r} sees {few}, so it has no variance. Use fewer groups or a larger batch.")
    return IndexedGroups(index, sizes.unsqueeze(1))


def check_input(layer: str, x: Tensor, channels: int) -> None:
    """Raise a BatchError if a layer's input is not this rank's alone, or has other channels."""
    if hasattr(x, "device_mesh"):
        raise BatchError(
            f"layer {layer!r} got a DTensor, which lives on several ranks. Pass each rank its own part, x.to_local(), "
            "and say process_group='world'; SyncBatchNorm layers have the statistics of all ranks."
        )
    if x.dim() < 2 or x.shape[1] != channels:
        raise BatchError(f"layer {layer!r} got input of shape {tuple(x.shape)}; expected (N, {channels}, ...).")


def _check_variance(layer: str, x: Tensor, groups: int) -> None:
    """Raise a BatchError if a group has no variance in a layer."""
    if x.numel() > groups * x.shape[1]:
        return
    where = f" in each of {groups} groups" if groups > 1 else ""
    size = f"{len(x)} samples, {'×'.join(map(str, x.shape[2:])) or '1'} positions"
    problem = f"layer {layer!r} sees one value a channel{where} ({size}), so it has no variance"
    fewer = f"fewer groups (groups={max(len(x) // 2, 1)} leaves two), " if groups > 1 else ""
    raise BatchError(f"{problem}. Use {fewer}a larger batch, or put the layer in evaluation mode.")


def check_rows(rows: Any) -> None:
    """Raise a SettingError if `rows` is not a valid setting; "in_turn" is the old name of "interleaved"."""
    if not (rows is None or callable(rows) or rows in ("consecutive", "interleaved", "in_turn")):
        raise SettingError(f"rows={rows!r}; expected 'consecutive', 'interleaved', or a function (layer, input).")


def number_of_groups(groups: int, samples: int, advice: str = "") -> int:
    """Return the number of ghost groups of some samples, from the setting of `groups`; 0 samples check it alone."""
    if not is_count(groups) or groups < -1:
        raise SettingError(f"groups={groups!r}; expected a positive number, 0 for one group, or -1 for one a sample.")
    if groups == -1:
        return samples
    if groups > 1 and samples % groups:
        problem = f"groups={groups} does not divide the {samples} samples of the pass"
        raise BatchError(f"{problem}. Use a multiple as batch size, and drop_last=True in the data loader{advice}.")
    return max(groups, 1)
