"""Short text for what a pass or step returns: a line for every part, with shapes instead of values.

    StepOutput
      grads             62 tensors, 11,689,512 values, float32
      loss              2.312
      stats             20 layers

An output printed in full would be a million characters of a ResNet's gradients.
"""

from collections.abc import Mapping
from typing import Any, TypeVar

from torch import Tensor

from apart_func._torch import is_concrete

Kind = TypeVar("Kind", bound=type)


def summarised(kind: Kind) -> Kind:
    """Let a class of named tuples, as a decorator, be printed short: on one line if each part is one tensor."""

    def summary(self: Any) -> str:
        parts = {name: described(value) for name, value in self._asdict().items()}
        if all(isinstance(value, Tensor) for value in self):
            return f"{kind.__name__}({', '.join(f'{name}={text}' for name, text in parts.items())})"
        width = max(map(len, parts))
        return "\n".join([kind.__name__, *(f"  {name:<{width}}  {text}" for name, text in parts.items())])

    kind.__repr__ = summary  # type: ignore[assignment]  # in a named tuple's class, mypy takes no assignment at all
    return kind


def described(value: Any) -> str:
    """A tensor or tree on one line."""
    if isinstance(value, Tensor):
        return _of_tensor(value)
    if not isinstance(value, Mapping) or not value:
        return f"{type(value).__name__}, {_counted(len(value), 'part')}" if hasattr(value, "__len__") else str(value)
    parts = list(value.values())
    if not all(isinstance(part, Tensor) for part in parts):
        return _counted(len(parts), "layer" if all(isinstance(part, tuple) for part in parts) else "part")
    kinds = sorted({_dtype(part) for part in parts})
    return f"{_counted(len(parts), 'tensor')}, {sum(part.numel() for part in parts):,} values, {' and '.join(kinds)}"


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"


def _of_tensor(tensor: Tensor) -> str:
    """Its value, if it has but one that can be read here; else its shape."""
    if tensor.dim() == 0 and is_concrete(tensor):
        return f"{tensor.item():.4g}" if tensor.is_floating_point() else str(tensor.item())
    return f"{tuple(tensor.shape)} {_dtype(tensor)}"


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
