"""Which rows of a layer's input form a ghost group: sample i is in group i mod G.

Most layers see a row a sample, and rows are grouped as samples are. Where points, frames or tokens of a sample are rows
of their own, `rows` says how they belong together:

    "consecutive"   the rows of a sample follow one another        (n p) c
    "in_turn"       the first rows of all samples, then the second      (p n) c
    function        (layer name, input) -> sample of every row, `(R,)`
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from einops import rearrange
from torch import Tensor

from apart_func._torch import is_traced
from apart_func.errors import BatchError, SettingError
from apart_func.layer import perturbed_batch_norm
from apart_func.layer.affine import Affine
from apart_func.layer.formula import Reduce, indexed_layer
from apart_func.trees import BatchStats

Rows = Literal["consecutive", "in_turn"] | Callable[[str, Tensor], Tensor]


class Grouping(NamedTuple):
    """How the samples of a pass form ghost groups.

    Attributes:
        groups: number of groups G.
        samples: of the pass; None where nobody knows, and every row counts as one.
        rows: how the rows of a layer belong to samples, where there are others than one a sample.
    """

    groups: int
    samples: int | None
    rows: Rows | None = None


class Normed(NamedTuple):
    """A call of a layer in ghost groups.

    Attributes:
        y: of the activations' shape and dtype.
        stats: of every channel of every group, `(G·C,)`.
        sizes: values a channel in a group, or `(G, 1)` where groups differ.
    """

    y: Tensor
    stats: BatchStats
    sizes: Any


def grouped_batch_norm(
    name: str,
    x: Tensor,
    vectors: Affine,
    eps: float,
    grouping: Grouping,
    reduce: Reduce | None = None,
) -> Normed:
    """Normalise the groups of a layer's input by their perturbed statistics; see `perturbed_batch_norm`.

    Raises:
        BatchError: the rows cannot be grouped by sample, or a group has no variance; the layer is named.
    """
    groups, samples, rows = grouping
    count, size = x.shape[0], x.numel() // x.shape[1]
    rows_alike = groups == 1 or (count == samples and not callable(rows))
    if size <= groups or not rows_alike or count % groups:  # seldom: an error, or a setting of rows
        return _other_rows(name, x, vectors, eps, grouping, reduce)
    y, stats = perturbed_batch_norm(x, vectors, eps, groups, reduce)
    return Normed(y, stats, size // groups)


def _other_rows(name: str, x: Tensor, vectors: Affine, eps: float, grouping: Grouping, reduce: Reduce | None) -> Normed:
    """Groups of rows of which a sample has others than one."""
    groups = grouping.groups
    per_sample = rows_per_sample(name, x, grouping)
    if per_sample is None:
        if reduce is not None:
            raise BatchError(
                f"layer {name!r} is synchronised over ranks, and a function rows= gives groups of unlike numbers of "
                "rows. Use rows='consecutive' or 'in_turn', groups=1, or a BatchNorm layer."
            )
        return _indexed(name, x, vectors, eps, grouping)
    if reduce is None:  # one value on each of several ranks has a variance
        check_variance(name, x, groups)
    consecutive = per_sample > 1 and grouping.rows == "consecutive"
    if consecutive:
        x = rearrange(x, "(n p) c ... -> (p n) c ...", p=per_sample)
    y, stats = perturbed_batch_norm(x, vectors, eps, groups, reduce)
    if consecutive:
        y = rearrange(y, "(p n) c ... -> (n p) c ...", p=per_sample)
    return Normed(y, stats, x.numel() // (x.shape[1] * groups))


def rows_per_sample(name: str, x: Tensor, grouping: Grouping) -> int | None:
    """How many rows of a layer's input belong to a sample; None where a function says which.

    Raises:
        BatchError: other than one does, and `rows` does not say which.
    """
    groups, samples, rows = grouping
    count = x.shape[0]
    if callable(rows) and groups > 1:
        return None
    if groups == 1 or samples is None or count == samples:
        if count % groups:
            raise BatchError(f"layer {name!r} sees {count} rows, which groups={groups} does not divide. Use a divisor.")
        return 1
    if rows is None:
        raise BatchError(
            f"layer {name!r} sees {count} rows of {samples} samples, and ghost groups are groups of samples. Say how "
            "rows belong to them, by rows='consecutive' (those of a sample follow one another), rows='in_turn' (one "
            "of every sample, and again) or a function (layer, input) -> sample of every row, or use groups=1."
        )
    if count % samples:
        raise BatchError(
            f"layer {name!r} sees {count} rows, which are no multiple of the {samples} samples, so rows={rows!r} "
            "cannot be. Pass rows=function, with (layer, input) -> sample of every row."
        )
    return count // samples


def check_input(name: str, x: Tensor, channels: int) -> None:
    """Make sure that a layer's input has its channels.

    Raises:
        BatchError: naming the layer.
    """
    if hasattr(x, "device_mesh"):
        raise BatchError(
            f"layer {name!r} got a DTensor, which lives on several ranks. Give every rank its own part of the batch, "
            "x.to_local(), and say process_group='world'; SyncBatchNorm layers have the statistics of all ranks."
        )
    if x.dim() < 2 or x.shape[1] != channels:
        raise BatchError(f"layer {name!r} got input of shape {tuple(x.shape)}; expected (N, {channels}, ...).")


def check_variance(name: str, x: Tensor, groups: int) -> None:
    """Make sure that every group has a variance in a layer.

    Raises:
        BatchError: naming the layer.
    """
    if x.numel() > groups * x.shape[1]:
        return
    rows, positions = x.shape[0], "×".join(map(str, x.shape[2:])) or "1"
    if groups == 1:
        raise BatchError(
            f"layer {name!r} sees one value a channel ({rows} samples, {positions} positions), so it has no variance. "
            "Use a larger batch, or put the layer in evaluation mode."
        )
    raise BatchError(
        f"layer {name!r} sees one value a channel in each of {groups} groups ({rows} samples, {positions} positions), "
        f"so it has no variance. Use fewer groups (groups={max(rows // 2, 1)} leaves two) or a larger batch."
    )


def check_rows(rows: Any) -> None:
    """Make sure that a setting of `rows` is one.

    Raises:
        SettingError: it is none.
    """
    if not (rows is None or callable(rows) or rows in ("consecutive", "in_turn")):
        raise SettingError(f"rows={rows!r}; expected 'consecutive', 'in_turn', a function (layer, input), or None.")


def number_of_groups(groups: int, samples: int) -> int:
    """G for a setting of `groups` (0: one, -1: one a sample).

    Raises:
        SettingError: `groups` is no such setting.
        BatchError: G does not divide the samples.
    """
    if not isinstance(groups, int) or isinstance(groups, bool) or groups < -1:
        raise SettingError(f"groups={groups!r}; expected a positive number, 0 for one group, or -1 for one a sample.")
    if groups == -1:
        return samples
    if groups > 1 and samples % groups:
        raise BatchError(
            f"groups={groups} does not divide the {samples} samples of the adversarial pass. Use a batch size and "
            "ratio that give a multiple, drop_last=True in the data loader, or remainder='drop'."
        )
    return max(groups, 1)


def _indexed(name: str, x: Tensor, vectors: Affine, eps: float, grouping: Grouping) -> Normed:
    """Groups of rows that a function assigns to samples; they need not be alike in number."""
    groups, samples, rows = grouping
    of_rows = rows(name, x) if callable(rows) else None
    if not isinstance(of_rows, Tensor) or of_rows.shape != x.shape[:1] or of_rows.dtype != torch.long:
        given = f"{of_rows.dtype} {tuple(of_rows.shape)}" if isinstance(of_rows, Tensor) else type(of_rows).__name__
        raise BatchError(
            f"rows of layer {name!r} returned {given}; expected the sample of every row, int64 of shape "
            f"{tuple(x.shape[:1])}."
        )
    group = of_rows.to(x.device) % groups
    counts = torch.zeros(groups, dtype=vectors.gamma.dtype, device=x.device)
    sizes = counts.index_add(0, group, torch.ones_like(group, dtype=counts.dtype)) * (x[0, 0].numel())
    if not is_traced():
        if bool((of_rows < 0).any()) or (samples is not None and bool((of_rows >= samples).any())):
            raise BatchError(f"rows of layer {name!r} names samples outside of the batch of {samples}.")
        if sizes.min() < 2:
            raise BatchError(
                f"layer {name!r} sees {int(sizes.min())} values a channel in one of {groups} groups, so it has no "
                "variance. Use fewer groups or a larger batch."
            )
    gamma, omega, beta = (part.view(groups, -1) for part in vectors)
    y, mean, var = indexed_layer(x, gamma, omega, beta, eps, group, sizes.unsqueeze(1))
    return Normed(y, BatchStats(mean.view(-1), var.view(-1)), sizes.unsqueeze(1))
