"""Gradient of a pass with respect to dicts of tensors, eagerly or under a transform.

`torch.func.grad` always records a graph for second derivatives, which costs an eager step memory and time.
So where neither a `torch.func` transform nor a compiler is active, gradients come from `torch.autograd.grad` on
fresh leaves, and from `torch.func.grad_and_value` otherwise. `is_traced` is the one place that decides.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from apart_func.errors import UsageError


class Opened(NamedTuple):
    """A pass between its forward and its end.

    Attributes:
        loss: what is differentiated, 0-d.
        aux: a pytree of further results.
        taps: tensors that were made during the forward and are differentiated by as well. Only an eager pass can have
            them, since a transform differentiates by arguments.
    """

    loss: Tensor
    aux: Any
    taps: Sequence[Tensor] = ()


# A pass takes dicts of tensors, runs its forward, opens, and closes. While it is open, all that its forward needed is
# in place, so that layers can be run again during the backward (activation checkpointing).
Pass = Callable[..., AbstractContextManager[Opened]]


class Gradient(NamedTuple):
    """What differentiating a pass returns. Gradients of an eager pass are detached; its further results are not.

    Attributes:
        grads: a dict for each argument of the pass, zero where the loss does not depend on the tensor.
        aux: the pass's further results.
        tap_grads: a gradient for every tap.
    """

    grads: tuple[dict[Any, Any], ...]
    aux: Any
    tap_grads: list[Tensor]


def is_compiling() -> bool:
    """Whether Dynamo is tracing this call."""
    if hasattr(torch, "compiler"):
        return bool(torch.compiler.is_compiling())
    return bool(torch._utils.is_compiling())  # torch 2.0


def is_traced() -> bool:
    """Whether a compiler or a `torch.func` transform sees the tensors of this call."""
    return is_compiling() or torch._C._functorch.peek_interpreter_stack() is not None


def is_mapped(leaves: Sequence[Any]) -> bool:
    """Whether the innermost transform around this call is a vmap over one of some tensors."""
    return any(isinstance(leaf, Tensor) and torch._C._functorch.is_batchedtensor(leaf) for leaf in leaves)


def is_recomputing() -> bool:
    """Whether this call is part of a backward, in which activation checkpointing runs layers once more."""
    return not is_compiling() and torch._C._current_graph_task_id() != -1


def is_checkpointed() -> bool:
    """Whether activation checkpointing will run what is called now once more."""
    if is_compiling() or not hasattr(torch._C._autograd, "_top_saved_tensors_default_hooks"):  # torch 2.0
        return False
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return hooks is not None and hooks[0].__module__ == "torch.utils.checkpoint"


def gradient_eager(run: Pass, *inputs: dict[str, Any]) -> Gradient:
    """Differentiate a pass with respect to every tensor in `inputs` and to what it taps, by `torch.autograd.grad`."""
    leaves = [tensor.detach().requires_grad_() for tree in inputs for tensor in _tensors(tree)]
    with torch.enable_grad(), run(*_filled(inputs, leaves)) as (loss, aux, taps):
        wanted = [*leaves, *taps]
        found = torch.autograd.grad(loss, wanted, allow_unused=True) if loss.requires_grad else [None] * len(wanted)
    grads = [torch.zeros_like(tensor) if g is None else g for tensor, g in zip(wanted, found, strict=True)]
    return Gradient(_filled(inputs, grads), aux, grads[len(leaves) :])


# torch's pytrees do the same for trees of any kind, and take longer: an eager step is Python where models are small.


def _tensors(tree: dict[str, Any]) -> Iterator[Tensor]:
    """The leaves of a dict of tensors, or of tuples of them."""
    for value in tree.values():
        if isinstance(value, Tensor):
            yield value
        else:
            yield from value


def _filled(trees: Sequence[dict[str, Any]], leaves: Iterable[Tensor]) -> tuple[dict[str, Any], ...]:
    """The same dicts with other leaves, in the order of `_tensors`."""
    left = iter(leaves)
    return tuple(
        {
            name: next(left) if isinstance(value, Tensor) else type(value)(*(next(left) for _ in value))
            for name, value in tree.items()
        }
        for tree in trees
    )


def gradient_traced(run: Pass, *inputs: dict[str, Any]) -> Gradient:
    """Differentiate a pass with respect to every tensor in `inputs`, by `torch.func`."""

    def value(*trees: Any) -> tuple[Tensor, Any]:
        with run(*trees) as (loss, aux, _):
            return loss, aux

    differentiated = torch.func.grad_and_value(value, argnums=tuple(range(len(inputs))), has_aux=True)
    try:
        grads, (_, aux) = differentiated(*inputs)
    except RuntimeError as error:
        if "saved tensor hooks" in str(error):
            raise UsageError(
                "the model checkpoints activations, or hooks saved tensors in another way, and under a torch.func "
                "transform that cannot be. Call the step without one, or switch checkpointing off."
            ) from error
        raise
    return Gradient(grads, aux, [])


def grad_and_value(
    function: Callable[[dict[str, Tensor]], tuple[Tensor, Any]], params: dict[str, Tensor]
) -> tuple[dict[str, Tensor], Tensor, Any]:
    """Differentiate a function with respect to a dict of tensors, eagerly or under a transform or compiler.

    Args:
        function: from the tensors to a 0-d loss and a pytree of further results.
        params: where it is differentiated.

    Returns:
        Gradients, zero where the loss does not depend on the tensor; the loss, detached; the further results.
    """

    @contextmanager
    def run(leaves: dict[str, Tensor]) -> Iterator[Opened]:
        loss, aux = function(leaves)
        yield Opened(loss, (loss.detach(), aux))

    (grads,), (loss, aux), _ = (gradient_traced if is_traced() else gradient_eager)(run, params)
    return grads, loss, aux
