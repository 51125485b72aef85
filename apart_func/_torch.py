"""Every call into torch that torch does not promise to keep. A test for each fails loudly when one changes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree
from torch.utils._python_dispatch import _disable_current_modes


def is_compiling() -> bool:
    """Return whether Dynamo is tracing this call."""
    if hasattr(torch, "compiler"):
        return bool(torch.compiler.is_compiling())
    return bool(torch._utils.is_compiling())  # torch 2.0


def is_traced() -> bool:
    """Return whether a compiler or a `torch.func` transform sees the tensors of this call."""
    return is_compiling() or torch._C._functorch.peek_interpreter_stack() is not None


def is_differentiated() -> bool:
    """Return whether a transform around this call may differentiate what it returns: any but a vmap, or a compiler."""
    if is_compiling():
        return True
    if torch._C._functorch.peek_interpreter_stack() is None:
        return False
    if not hasattr(torch._C._functorch, "get_interpreter_stack"):  # torch 2.0
        return True
    stack = torch._C._functorch.get_interpreter_stack()
    return any(interpreter.key() != torch._C._functorch.TransformType.Vmap for interpreter in stack)


def is_concrete(tensor: Tensor) -> bool:
    """Return whether a tensor has values that can be read here: no transform or compiler sees it."""
    return not is_traced() and not tensor.is_meta and type(tensor) in (Tensor, nn.Parameter)


def unwrapped(tensor: Tensor) -> Tensor:
    """Return the plain tensor under the wrappers of `torch.func` transforms."""
    while torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return tensor


def backward_task() -> int:
    """Return a number of the backward that this call is part of, which may run layers again; −1 outside of one."""
    return -1 if is_compiling() else int(torch._C._current_graph_task_id())


def is_checkpointed() -> bool:
    """Return whether activation checkpointing will run what is called now once more."""
    if is_compiling() or not hasattr(torch._C._autograd, "_top_saved_tensors_default_hooks"):  # torch 2.0
        return False
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return hooks is not None and hooks[0].__module__ == "torch.utils.checkpoint"


def has_dispatch_mode() -> bool:
    """Return whether a mode sees every operator, as that of selective checkpointing, which keeps some results."""
    return bool(torch._C._len_torch_dispatch_stack())


def unseen_by_modes() -> AbstractContextManager[Any]:
    """Hide operators from modes: selective checkpointing counts on seeing the same ones when layers run again."""
    return _disable_current_modes() if not is_compiling() and has_dispatch_mode() else nullcontext()


def specialize(leaves: Iterable[Any]) -> None:
    """Make a compiler take the sizes of some tensors as constants: a batch of another size is another graph.

    With symbolic sizes, the moments and groups of a network lead Inductor into minutes of symbolic algebra.
    """
    if is_compiling() and hasattr(torch._dynamo, "mark_static"):
        for leaf in leaves:
            if isinstance(leaf, Tensor):
                torch._dynamo.mark_static(leaf)


class Constants(nn.Module):
    """Values that a compiler takes as they are: what stands on a module; numbers elsewhere may become symbols."""

    def __init__(self, **values: Any) -> None:
        super().__init__()
        vars(self).update(values)


def register_tree(kind: type, flatten: Callable[[Any], tuple[list[Any], Any]], unflatten: Callable[..., Any]) -> None:
    """Let torch's pytrees see through a class."""
    register = getattr(_pytree, "register_pytree_node", None) or _pytree._register_pytree_node
    register(kind, flatten, unflatten)


def unsafe_view(tensor: Tensor, shape: torch.Size) -> Tensor:
    """Return the same memory in another shape, as a tensor that is no view, if nobody else holds it.

    Autograd must not see a view if an in-place activation follows: it would copy gradients.
    """
    shaped: Tensor = torch.ops.aten._unsafe_view.default(tensor, shape)
    return shaped
