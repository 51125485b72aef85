"""The loss of a pass: what a loss function may be and return, and whether it can be taken of some samples alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from apart_func._torch import is_concrete
from apart_func.errors import BatchError, UsageError
from apart_func.samples import GroupRange, batch_size, cut_samples
from apart_func.trees import tensors_of, with_tensors

LossFunction = Callable[[Any, Any], Any]


def check_loss_function(loss_fn: Any) -> None:
    """Raise a UsageError if a loss function cannot be called, or is a class."""
    if not callable(loss_fn) or (isinstance(loss_fn, type) and issubclass(loss_fn, nn.Module)):
        given = f"the class {loss_fn.__name__}" if isinstance(loss_fn, type) else f"a {type(loss_fn).__name__}"
        raise UsageError(
            f"loss_fn is {given}; expected a function (output, target) -> scalar, such as "
            "torch.nn.functional.cross_entropy or nn.CrossEntropyLoss()."
        )


def scalar_loss(loss: Any) -> Tensor:
    """Return what a loss function returned; raise a UsageError if it is no scalar that can be differentiated."""
    if not isinstance(loss, Tensor) or loss.dim() != 0 or not loss.is_floating_point():
        given = f"a {loss.dtype} tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else repr(type(loss))
        raise UsageError(
            f"loss_fn returned {given}; expected a 0-d floating-point tensor. Reduce it, e.g. loss.mean()."
        )
    return loss


def loss_and_aux(result: Any) -> tuple[Tensor, Any]:
    """Return what a loss function returned as a scalar and further results."""
    if isinstance(result, tuple) and len(result) == 2:
        return scalar_loss(result[0]), result[1]
    return scalar_loss(result), ()


def check_output(output: Any, samples: int) -> None:
    """Raise a BatchError if a model's output cannot be cut into clean and perturbed samples."""
    parts = tensors_of(output)
    lengths = [leaf.size(0) for leaf in parts if leaf.dim()]
    if not lengths or any(length != samples for length in lengths):
        raise BatchError(
            f"the tensors of the model's output have lengths {lengths} on dim 0; expected {samples}, one entry a "
            "sample, since the losses of clean and perturbed samples are computed apart. Return such tensors alone, or "
            "use make_apart_step."
        )
    if any(leaf.requires_grad for leaf in parts if not leaf.dim()):
        raise BatchError(
            "the model's output holds a 0-d tensor that depends on parameters, such as a loss of all samples, and the "
            "losses of clean and perturbed samples are computed apart. Return outputs with an entry a sample, compute "
            "the loss in loss_fn, or use make_apart_step."
        )


def losses_by_part(
    loss_fn: LossFunction, whole: Tensor, output: Any, target: Any, groups: int, clean: int, known: dict[Any, Any]
) -> tuple[Tensor, Tensor]:
    """Return the losses of the samples of the first, clean, ghost groups and of the others.

    It is twice that of all if the loss couples both kinds: `known` remembers which losses do. A traced call cannot see
    it, and takes the parts.
    """
    first, samples = tensors_of(output)[0], batch_size(output)
    if is_concrete(first):
        key = id(loss_fn), samples, groups, clean
        if key not in known:  # the loss is kept with it, so that no other gets its id
            known[key] = loss_fn, couples(loss_fn, output, target, groups, clean)
        if known[key][1]:
            return whole, whole
    clean_loss, adversarial_loss = (
        loss_and_aux(loss_fn(*(cut_samples(tree, GroupRange(groups, *part), samples) for tree in (output, target))))[0]
        for part in ((0, clean), (clean, groups))
    )
    return clean_loss, adversarial_loss


def couples(loss_fn: LossFunction, output: Any, target: Any, groups: int, clean: int) -> bool:
    """Return whether the gradient of a loss by outputs of clean samples is another if the others have other outputs.

    These get outputs of clean samples, which the loss is defined for.
    """
    index = torch.arange(batch_size(output))
    is_clean = index % groups < clean
    source = torch.where(is_clean, index, (index + groups) // groups * groups % len(index) + index % groups % clean)

    def slopes(change: Callable[[Tensor], Tensor]) -> list[Tensor | None]:
        leaves = [change(leaf.detach()).requires_grad_(leaf.is_floating_point()) for leaf in tensors_of(output)]
        with torch.enable_grad(), torch.random.fork_rng([leaf.device for leaf in leaves[:1] if leaf.is_cuda]):
            loss, _ = loss_and_aux(loss_fn(with_tensors(output, leaves), target))
        wanted = [leaf for leaf in leaves if leaf.requires_grad and leaf.dim()]
        return list(torch.autograd.grad(loss, wanted, allow_unused=True)) if loss.requires_grad else []

    def is_other(one: Tensor | None, other: Tensor | None) -> bool:
        if one is None or other is None:
            return one is not other
        mine = is_clean.to(one.device)
        return not torch.equal(one[mine].nan_to_num(), other[mine].nan_to_num())

    before, after = slopes(lambda leaf: leaf), slopes(lambda leaf: leaf[source.to(leaf.device)] if leaf.dim() else leaf)
    return any(map(is_other, before, after))
