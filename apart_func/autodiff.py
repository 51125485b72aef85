"""Gradient of a pass with respect to pytrees of tensors, eagerly or under a transform.

`torch.func.grad` always records a graph for second derivatives, which costs an eager step memory and time.
So where neither a `torch.func` transform nor a compiler is active, gradients come from `torch.autograd.grad` on
fresh leaves, and from `torch.func.grad_and_value` otherwise. `is_traced` is the one place that decides.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

# A pass takes trees of tensors, opens, yields (loss, auxiliary values) and closes. While it is open, all that its
# forward needed is in place, so that layers can be run again during the backward (activation checkpointing).
Pass = Callable[..., AbstractContextManager[tuple[Tensor, Any]]]


def is_compiling() -> bool:
    """Whether Dynamo is tracing this call."""
    if hasattr(torch, "compiler"):
        return bool(torch.compiler.is_compiling())
    return bool(torch._utils.is_compiling())  # torch 2.0


def is_traced() -> bool:
    """Whether a compiler or a `torch.func` transform sees the tensors of this call."""
    return is_compiling() or torch._C._functorch.peek_interpreter_stack() is not None


def gradient(run: Pass, *inputs: Any) -> tuple[tuple[Any, ...], Tensor, Any]:
    """Differentiate a pass with respect to every tensor of `inputs`.

    Args:
        run: the pass, called as `run(*inputs)`.
        *inputs: pytrees of floating-point tensors.

    Returns:
        The gradients, a tree for each of `inputs`, zero where the loss does not depend on the tensor; the loss; and
        the auxiliary values. Outside transforms all of them are detached.
    """
    return _gradient_traced(run, *inputs) if is_traced() else _gradient_eager(run, *inputs)


def _gradient_eager(run: Pass, *inputs: Any) -> tuple[tuple[Any, ...], Tensor, Any]:
    tensors, structure = tree_flatten(inputs)
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    with torch.enable_grad(), run(*tree_unflatten(leaves, structure)) as (loss, aux):
        grads = torch.autograd.grad(loss, leaves, allow_unused=True) if loss.requires_grad else [None] * len(leaves)
    filled = [torch.zeros_like(leaf) if grad is None else grad for leaf, grad in zip(tensors, grads, strict=True)]
    return tree_unflatten(filled, structure), loss.detach(), tree_map(detached, aux)


def _gradient_traced(run: Pass, *inputs: Any) -> tuple[tuple[Any, ...], Tensor, Any]:
    def value(*trees: Any) -> tuple[Tensor, Any]:
        with run(*trees) as result:
            return result

    grads, (loss, aux) = torch.func.grad_and_value(value, argnums=tuple(range(len(inputs))), has_aux=True)(*inputs)
    return grads, loss, aux


def detached(leaf: Any) -> Any:
    """A tensor cut from the graph; anything else as it is."""
    return leaf.detach() if isinstance(leaf, Tensor) else leaf
