"""Gradient of a pass with respect to dicts of tensors, eagerly or under a transform.

`torch.func.grad` always records a graph for second derivatives, which costs an eager step memory and time.
So where neither a `torch.func` transform nor a compiler is active, gradients come from `torch.autograd.grad` on
fresh leaves, and from `torch.func.grad_and_value` otherwise. `is_traced` is the one place that decides.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_map


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
    """What `gradient` returns; outside transforms everything is detached.

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


def gradient_eager(run: Pass, inputs: dict[str, Tensor]) -> Gradient:
    """Differentiate a pass with respect to `inputs` and to what it taps, by `torch.autograd.grad`."""
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in inputs.items()}
    with torch.enable_grad(), run(leaves) as (loss, aux, taps):
        wanted = [*leaves.values(), *taps]
        found = torch.autograd.grad(loss, wanted, allow_unused=True) if loss.requires_grad else [None] * len(wanted)
    grads = [torch.zeros_like(tensor) if g is None else g for tensor, g in zip(wanted, found, strict=True)]
    return Gradient((dict(zip(leaves, grads, strict=False)),), tree_map(_detached, aux), grads[len(leaves) :])


def gradient_traced(run: Pass, *inputs: dict[str, Any]) -> Gradient:
    """Differentiate a pass with respect to every tensor in `inputs`, by `torch.func`."""

    def value(*trees: Any) -> tuple[Tensor, Any]:
        with run(*trees) as (loss, aux, _):
            return loss, aux

    grads, (_, aux) = torch.func.grad_and_value(value, argnums=tuple(range(len(inputs))), has_aux=True)(*inputs)
    return Gradient(grads, aux, [])


def _detached(leaf: Any) -> Any:
    return leaf.detach() if isinstance(leaf, Tensor) else leaf
