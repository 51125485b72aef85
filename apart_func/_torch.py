"""Every call into torch that torch does not promise to keep. A test for each fails loudly when one changes."""

from collections.abc import Iterable, Sequence
from typing import Any

import einops
import torch
from torch import Tensor, nn


def is_compiling() -> bool:
    """Whether Dynamo is tracing this call."""
    if hasattr(torch, "compiler"):
        return bool(torch.compiler.is_compiling())
    return bool(torch._utils.is_compiling())  # torch 2.0


def is_traced() -> bool:
    """Whether a compiler or a `torch.func` transform sees the tensors of this call."""
    return is_compiling() or torch._C._functorch.peek_interpreter_stack() is not None


def is_mapped(leaves: Iterable[Any]) -> bool:
    """Whether the innermost transform around this call is a vmap over one of some tensors."""
    return any(isinstance(leaf, Tensor) and torch._C._functorch.is_batchedtensor(leaf) for leaf in leaves)


def unwrapped(tensor: Tensor) -> Tensor:
    """The plain tensor under the wrappers of `torch.func` transforms."""
    while torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return tensor


def is_recomputing() -> bool:
    """Whether this call is part of a backward, in which activation checkpointing runs layers once more."""
    return not is_compiling() and torch._C._current_graph_task_id() != -1


def is_checkpointed() -> bool:
    """Whether activation checkpointing will run what is called now once more."""
    if is_compiling() or not hasattr(torch._C._autograd, "_top_saved_tensors_default_hooks"):  # torch 2.0
        return False
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return hooks is not None and hooks[0].__module__ == "torch.utils.checkpoint"


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


def register_einops() -> None:
    """Let Dynamo take `rearrange` and `repeat` as operations: it would trace their parser anew in every layer."""
    if hasattr(torch, "compiler") and hasattr(torch.compiler, "allow_in_graph"):
        for function in (einops.rearrange, einops.repeat):
            torch.compiler.allow_in_graph(function)


def as_shaped(tensor: Tensor, shape: torch.Size) -> Tensor:
    """The same memory in another shape, as a tensor that is no view, where nobody else holds it.

    Autograd must not see a view where an in-place activation follows: it would copy gradients.
    """
    shaped: Tensor = torch.ops.aten._unsafe_view.default(tensor, shape)
    return shaped


def lerp_all(starts: list[Tensor], ends: list[Tensor], weight: float) -> list[Tensor]:
    """(1 − weight) · start + weight · end for every pair, in one call. Not under a transform or compiler."""
    return list(torch._foreach_lerp(starts, ends, weight))


def counted(counters: list[Tensor]) -> Sequence[Tensor]:
    """Counters, one more each, in one call. Not under a transform or compiler."""
    return torch._foreach_add(counters, 1)


def parts(joined: Tensor, sizes: list[int]) -> Sequence[Tensor]:
    """The parts of a vector, of which one may be changed in place without a word to those who have saved another."""
    return torch.unsafe_split_with_sizes(joined, sizes)


@torch.no_grad()
def copies_together(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copies that can be changed in place. Vectors of a kind are copied together: they are many, and small."""
    kinds: dict[Any, list[str]] = {}
    for name, tensor in tensors.items():
        kinds.setdefault((tensor.dim(), tensor.dtype, tensor.device), []).append(name)
    found: dict[str, Tensor] = {}
    for (dim, dtype, _), names in kinds.items():
        copies: Sequence[Tensor]
        if dim == 1:
            joined = torch.cat([tensors[name] for name in names])
            copies = parts(joined, [tensors[name].shape[0] for name in names])
        elif dim == 0 and not dtype.is_floating_point:
            copies = torch.stack([tensors[name] for name in names]).unbind()
        else:
            copies = [tensors[name].clone() for name in names]
        found.update(zip(names, copies, strict=True))
    return {name: found[name] for name in tensors}
