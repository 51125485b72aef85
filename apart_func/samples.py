"""The samples of a batch: how many there are, and how some of them are cut out of trees of any kind."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from apart_func.errors import BatchError
from apart_func.trees import children, tensors_of, with_children


def batch_size(batch: Any) -> int:
    """Return the number of samples M: the length that every tensor with a dimension shares; or raise a BatchError."""
    lengths = [leaf.size(0) for leaf in tensors_of(batch) if leaf.dim()]
    if not lengths:
        raise BatchError(
            "the batch holds no tensor with a dimension, so it has no samples. Pass batch=(input, target)."
        )
    if any(length != lengths[0] for length in lengths):
        raise BatchError(
            f"the tensors of the batch have lengths {lengths} on dim 0, and must agree: one entry a sample. "
            "Pass what belongs to no sample as a 0-d tensor or in the loss function's closure."
        )
    return int(lengths[0])


def cut_batch(batch: Any, start: int, stop: int, samples: int) -> Any:
    """Return samples `start` to `stop` of a batch of `samples`; see `cut_samples`."""
    return batch if (start, stop) == (0, samples) else cut_samples(batch, slice(start, stop), samples)


class GroupRange(NamedTuple):
    """The samples of ghost groups `start` to `stop` of G; sample i is in group i mod G."""

    groups: int
    start: int
    stop: int


WHOLE = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device)


def cut_samples(tree: Any, which: slice | GroupRange, samples: int) -> Any:
    """Cut every per-sample part of a tree: tensors with a dimension, arrays and lists with an entry a sample.

    Tensors without a dimension that are no entry of such a list, numbers, strings, and lists of another length are
    passed whole. A BatchError says what cannot be cut.
    """
    if isinstance(tree, Tensor):
        return _cut_tensor(tree, which) if tree.dim() else tree
    parts = children(tree)
    if parts is not None:
        is_one_a_sample = isinstance(tree, (tuple, list)) and len(tree) == samples and not hasattr(tree, "_fields")
        if is_one_a_sample and not any(leaf.dim() for leaf in tensors_of(tree)):
            return type(tree)(tree[i] for i in _indices(which, samples))
        return with_children(tree, [cut_samples(part, which, samples) for part in parts])
    if isinstance(tree, WHOLE):
        return tree
    if hasattr(tree, "__array__") and hasattr(tree, "shape"):
        return tree[_indices(which, samples)] if len(tree.shape) and tree.shape[0] == samples else tree
    advice = "nobody knows how to cut it. Use tensors, lists with an entry a sample, or dataclasses of them"
    raise _uncuttable(f"a {type(tree).__name__}", advice)


def _uncuttable(what: str, advice: str) -> BatchError:
    return BatchError(
        f"the batch or the output holds {what}, of which only some samples are wanted here, and {advice}; or two "
        "passes with ratio=1.0 and microbatches=1, where the whole batch is used."
    )


def _cut_tensor(tensor: Tensor, which: slice | GroupRange) -> Tensor:
    if tensor.layout != torch.strided or tensor.is_nested:
        raise _uncuttable(f"a tensor of layout {tensor.layout}", "PyTorch cannot slice it. Use a dense tensor")
    if isinstance(which, slice):
        return tensor[which]
    groups: Tensor = tensor.unflatten(0, (-1, which.groups))
    return groups[:, which.start : which.stop].flatten(0, 1)


def _indices(which: slice | GroupRange, samples: int) -> list[int]:
    if isinstance(which, slice):
        return list(range(samples))[which]
    return [i for i in range(samples) if which.start <= i % which.groups < which.stop]
