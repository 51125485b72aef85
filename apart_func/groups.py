"""Which rows of a layer's input form a ghost group: sample i is in group i mod G.

Most layers see one row a sample, and rows are grouped as samples are. Where points, frames or tokens of a sample are rows
of their own, `rows` says how they belong to samples:

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
from apart_func.batch_norm import IndexedGroups, Normalized, Reduce, affine, formula
from apart_func.checks import is_count
from apart_func.errors import BatchError, SettingError
from apart_func.kernels import perturbed_batch_norm
from apart_func.trees import Perturbation

Rows = Literal["consecutive", "interleaved"] | Callable[[str, Tensor], Tensor]


class Grouping(NamedTuple):
    """How the samples of a pass form ghost groups.

    Attributes:
        groups: number of groups G.
        samples: of the pass; None if nobody knows, and then every row counts as one.
        rows: how the rows of a layer belong to samples, if there are others than one a sample.
    """

    groups: int
    samples: int | None
    rows: Rows | None = None


def grouped_batch_norm(
    layer: str,
    x: Tensor,
    parameters: tuple[Tensor | None, Tensor | None],
    perturbation: Perturbation,
    eps: float,
    grouping: Grouping,
    reduce: Reduce | None = None,
) -> tuple[Normalized, Any]:
    """Normalise the ghost groups of a layer's input by their perturbed statistics.

    Args:
        layer: name of the layer, for messages.
        x: activations `(R, C, ...)`.
        parameters: γ and β, `(C,)`; None is 1 or 0.
        perturbation: δμ and δσ, `(C,)` for all groups or `(G, C)` for each.
        eps: BN's constant.
        grouping: how rows form groups.
        reduce: makes moments over all ranks from those of this one.

    Returns:
        The output with the statistics of every group, and how many values a channel a group has: a number, or
        `(G, 1)` if groups differ.

    Raises:
        BatchError: the rows cannot be grouped by sample, or a group has no variance; the layer is named.
    """
    groups, samples, rows = grouping
    if callable(rows) and groups > 1:
        if reduce is not None:
            raise BatchError(
                f"layer {layer!r} is synchronised over ranks, and a function rows= gives groups of unlike numbers of "
                "rows. Use rows='consecutive' or 'interleaved', groups=1, or a BatchNorm layer."
            )
        return _by_index(layer, x, parameters, perturbation, eps, grouping)
    per_sample = 1 if groups == 1 or len(x) == samples else rows_per_sample(layer, len(x), grouping)
    if reduce is None:  # one value on each of several ranks has a variance
        check_variance(layer, x, groups)
    consecutive = per_sample > 1 and rows == "consecutive"
    if consecutive:
        x = rearrange(x, "(n p) c ... -> (p n) c ...", p=per_sample)
    normalized = perturbed_batch_norm(x, *parameters, *perturbation, eps, groups, reduce)
    if consecutive:
        normalized = normalized._replace(y=rearrange(normalized.y, "(p n) c ... -> (n p) c ...", p=per_sample))
    return normalized, x.numel() // (x.shape[1] * groups)


def rows_per_sample(layer: str, count: int, grouping: Grouping) -> int:
    """Return how many rows of a layer's input belong to a sample.

    Raises:
        BatchError: that cannot be known, or `rows` does not fit.
    """
    groups, samples, rows = grouping
    if count % groups:
        raise BatchError(
            f"layer {layer!r} sees {count} rows, which groups={groups} does not divide. Use a divisor, and "
            "drop_last=True in the data loader."
        )
    if samples is None or (count < samples and samples % count == 0):  # a chunk of the batch begins at a multiple of G
        return 1
    if rows is None:
        raise not_by_sample(layer, count, samples)
    if count % samples:
        raise BatchError(
            f"layer {layer!r} sees {count} rows, which are no multiple of the {samples} samples, so rows={rows!r} "
            "cannot be. Pass rows=function, with (layer, input) -> sample of every row."
        )
    return count // samples


def not_by_sample(layer: str, count: int, samples: int) -> BatchError:
    """Return the error for a layer whose rows cannot be assigned to samples."""
    return BatchError(
        f"layer {layer!r} sees {count} rows of {samples} samples, and ghost groups are groups of samples. Say how rows "
        "belong to them, by rows='consecutive' (those of a sample follow one another), rows='interleaved' (one of every "
        "sample, and again) or a function (layer, input) -> sample of every row, or use groups=1."
    )


def _by_index(
    layer: str,
    x: Tensor,
    parameters: tuple[Tensor | None, Tensor | None],
    perturbation: Perturbation,
    eps: float,
    grouping: Grouping,
) -> tuple[Normalized, Tensor]:
    """Normalise groups of rows that a function assigns to samples; they need not be alike in number."""
    groups, samples, rows = grouping
    of_rows = rows(layer, x) if callable(rows) else None
    if not isinstance(of_rows, Tensor) or of_rows.shape != x.shape[:1] or of_rows.dtype != torch.long:
        given = f"{of_rows.dtype} {tuple(of_rows.shape)}" if isinstance(of_rows, Tensor) else type(of_rows).__name__
        raise BatchError(
            f"rows of layer {layer!r} returned {given}; expected the sample of every row, int64 of shape "
            f"{tuple(x.shape[:1])}."
        )
    vectors = affine(x, *parameters, *perturbation)
    index = of_rows.to(x.device) % groups
    counts = torch.zeros(groups, dtype=vectors.weight.dtype, device=x.device)
    sizes = counts.index_add(0, index, torch.ones_like(index, dtype=counts.dtype)) * x[0, 0].numel()
    if is_concrete(of_rows):
        if bool((of_rows < 0).any()) or (samples is not None and bool((of_rows >= samples).any())):
            raise BatchError(f"rows of layer {layer!r} names samples outside of the batch of {samples}.")
        if sizes.min() < 2:
            raise BatchError(
                f"layer {layer!r} sees {int(sizes.min())} values a channel in one of {groups} groups, so it has no "
                "variance. Use fewer groups or a larger batch."
            )
    return formula(x, vectors, eps, IndexedGroups(index, sizes.unsqueeze(1))), sizes.unsqueeze(1)


def check_input(layer: str, x: Tensor, channels: int) -> None:
    """Make sure that a layer's input has its channels.

    Raises:
        BatchError: naming the layer.
    """
    if hasattr(x, "device_mesh"):
        raise BatchError(
            f"layer {layer!r} got a DTensor, which lives on several ranks. Give every rank its own part of the batch, "
            "x.to_local(), and say process_group='world'; SyncBatchNorm layers have the statistics of all ranks."
        )
    if x.dim() < 2 or x.shape[1] != channels:
        raise BatchError(f"layer {layer!r} got input of shape {tuple(x.shape)}; expected (N, {channels}, ...).")


def check_variance(layer: str, x: Tensor, groups: int) -> None:
    """Make sure that every group has a variance in a layer.

    Raises:
        BatchError: naming the layer.
    """
    if x.numel() > groups * x.shape[1]:
        return
    rows, positions = x.shape[0], "×".join(map(str, x.shape[2:])) or "1"
    where, fix = "", "Use a larger batch, or put the layer in evaluation mode."
    if groups > 1:
        where = f" in each of {groups} groups"
        fix = f"Use fewer groups (groups={max(rows // 2, 1)} leaves two) or a larger batch."
    raise BatchError(
        f"layer {layer!r} sees one value a channel{where} ({rows} samples, {positions} positions), so it has no "
        f"variance. {fix}"
    )


def check_rows(rows: Any) -> None:
    """Make sure that `rows` is a valid setting.

    Raises:
        SettingError: it is neither a name of an order nor a function.
    """
    if not (
        rows is None or callable(rows) or rows in ("consecutive", "interleaved", "in_turn")
    ):  # "in_turn" is its name of old
        raise SettingError(f"rows={rows!r}; expected 'consecutive', 'interleaved', or a function (layer, input).")


def number_of_groups(groups: int, samples: int, advice: str = "") -> int:
    """Return the number of ghost groups of some samples, from the setting of `groups` (0: one, -1: one a sample).

    Args:
        groups: the setting.
        samples: of the pass; 0 checks the setting alone.
        advice: what else a message may advise.

    Raises:
        SettingError: `groups` is not a valid setting.
        BatchError: G does not divide the samples.
    """
    if not is_count(groups) or groups < -1:
        raise SettingError(f"groups={groups!r}; expected a positive number, 0 for one group, or -1 for one a sample.")
    if groups == -1:
        return samples
    if groups > 1 and samples % groups:
        raise BatchError(
            f"groups={groups} does not divide the {samples} samples of the pass. Use a batch size that is a multiple, "
            f"and drop_last=True in the data loader{advice}."
        )
    return max(groups, 1)
