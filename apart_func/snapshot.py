"""Copies of a model, and what has changed on a model since one was taken.

A copy is a `copy.deepcopy`, with three differences: hooks stay the caller's objects, functions that hold modules of the
model hold those of the copy, and tensors that a hook computes (as pruning does) are left to the hook.
"""

from __future__ import annotations

import copy
import weakref
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from functools import partial
from types import CellType, FunctionType, MethodType, ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from apart_func.errors import ModelError

HOOKS = frozenset(
    name
    for name, value in vars(nn.Module()).items()
    if name.endswith("_hooks") or (name.startswith("_") and "hooks_" in name)
)
# Changed by training itself, and taken from the arguments of a call: of these, only the names count.
REGISTERS = ("_parameters", "_buffers")


def check_model(model: Any) -> None:
    """Raise a ModelError if a model is no module, or has lazy layers."""
    if not isinstance(model, nn.Module):
        what = f"the class {model.__name__}" if isinstance(model, type) else f"a {type(model).__name__}"
        raise ModelError(f"the model is {what}; expected a torch.nn.Module, such as resnet18().")
    lazy = [name for name, tensor in named_tensors(model) if is_lazy(tensor)]
    if lazy:
        raise ModelError(f"{lazy[0]!r} has no shape yet: the model has lazy layers. Run one forward on a batch first.")


def named_tensors(module: nn.Module) -> list[tuple[str, Tensor]]:
    """Return parameters and buffers, each once, by its first name."""
    return [*module.named_parameters(), *module.named_buffers()]


def copy_model(model: nn.Module, memo: dict[int, Any] | None = None) -> nn.Module:
    """Copy a model, or raise a ModelError if it cannot be copied, or would run modules that are not its own.

    `memo` says what stands for an object in the copy, as `copy.deepcopy` takes it, and gets all that is copied.
    """
    check_model(model)
    memo = {} if memo is None else memo
    own = {id(module) for module in model.modules()}
    rebound: list[FunctionType] = []
    for name, module in model.named_modules():
        for place, function in _functions_of(module):
            inner = _closed_over(function)
            held = [value for value in inner if isinstance(value, nn.Module)]
            if place in HOOKS or vars(module)[place] is function:  # as factories in a qconfig are not
                _check_foreign(name, module, place, [m for m in held if id(m) not in own])
            if isinstance(function, weakref.ref) and held:
                raise ModelError(
                    f"{place!r} of layer {name!r} ({type(module).__name__}) holds a weak reference to a "
                    f"{type(held[0]).__name__}, which in a copy would still be the original. Pass what is "
                    "needed of that module to the forward."
                )
            if any(id(m) in own for m in held):
                functions = [f for f in (function, *inner) if isinstance(f, FunctionType) and id(f) not in memo]
                memo.update((id(f), _with_empty_cells(f)) for f in functions)
                rebound += functions
            elif place in HOOKS and not (isinstance(function, MethodType) and isinstance(function.__self__, nn.Module)):
                memo.setdefault(id(function), function)
        for value in vars(module).values():
            if isinstance(value, Tensor) and not value.is_leaf:
                memo.setdefault(id(value), value.detach().clone())
        group = vars(module).get("process_group")  # a SyncBatchNorm says over which ranks
        if group is not None:
            memo[id(group)] = group
    try:
        made: nn.Module = copy.deepcopy(model, memo)
        for function in rebound:
            _fill_cells(function, memo)
    except Exception as error:
        raise ModelError(
            f"{type(model).__name__} cannot be copied ({error}). Make what copy.deepcopy cannot copy no attribute of a "
            "module, or give it a __deepcopy__; pass the module that a wrapper such as DistributedDataParallel holds."
        ) from error
    return made


def _functions_of(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield the functions and weak references that a module holds, and the attribute that each is in."""
    for place, value in vars(module).items():
        kinds = object if place in HOOKS else (FunctionType, MethodType, partial, weakref.ref)
        inside = value.values() if place in HOOKS else _reached([value])
        yield from ((place, found) for found in inside if isinstance(found, kinds))


def _closed_over(function: Any) -> list[Any]:
    """Return what a function closes over or is partially applied to, and so on for the functions among that."""
    found: list[Any] = []
    waiting = [function]
    while waiting:
        value = waiting.pop()
        if isinstance(value, partial):
            inner: list[Any] = [*value.args, *value.keywords.values(), value.func]
        elif isinstance(value, weakref.ref):
            inner = [value()]
        elif isinstance(value, FunctionType):
            inner = [*(value.__defaults__ or ()), *_cell_contents(value)]
        else:
            continue
        inner = [getattr(part, "__self__", part) if isinstance(part, MethodType) else part for part in inner]
        new = [part for part in inner if not any(part is known for known in found)]
        found += new
        waiting += new
    return found


def _cell_contents(function: FunctionType) -> Iterator[Any]:
    for cell in function.__closure__ or ():
        try:
            yield cell.cell_contents
        except ValueError:  # not yet filled
            continue


def _check_foreign(name: str, module: nn.Module, place: str, foreign: list[nn.Module]) -> None:
    """Make sure that a function on a module does not train modules that are not the model's."""
    for held in foreign:
        if place == "forward" or (held.training and list(held.buffers())):
            what = "the forward" if place == "forward" else f"{place!r}"
            raise ModelError(
                f"{what} of layer {name!r} ({type(module).__name__}) is a function that holds {type(held).__name__}, "
                "which is no module of the model, so a copy of the layer would still run the original. Make it an "
                "attribute of the module, override forward in a subclass, or put what it holds in evaluation mode."
            )


def _with_empty_cells(function: FunctionType) -> FunctionType:
    cells = tuple(CellType() for _ in function.__closure__ or ())
    made = FunctionType(function.__code__, function.__globals__, function.__name__, None, cells)
    made.__kwdefaults__ = function.__kwdefaults__
    vars(made).update(vars(function))
    return made


def _fill_cells(function: FunctionType, memo: dict[int, Any]) -> None:
    """Give a copied function what the original holds: the copy's modules, and otherwise the same objects."""

    def copied(value: Any) -> Any:
        if isinstance(value, MethodType):
            return MethodType(value.__func__, copied(value.__self__))
        return memo.get(id(value), value) if isinstance(value, (nn.Module, FunctionType)) else value

    made = memo[id(function)]
    made.__defaults__ = None if function.__defaults__ is None else tuple(map(copied, function.__defaults__))
    for cell, original in zip(made.__closure__ or (), function.__closure__ or (), strict=True):
        with suppress(ValueError):  # not yet filled
            cell.cell_contents = copied(original.cell_contents)


class Snapshot:
    """What the modules of a model hold: to see whether that has changed since, or to put it back.

    Modules, modes, hooks, attributes, and what is in lists, dicts and sets. Of parameters and buffers it is only how
    many there are: every call says which.
    """

    def __init__(self, model: nn.Module) -> None:
        self._parts = [module for module in model.modules() if module is not model]  # which is not kept alive
        self._kinds = list(map(type, self._parts))
        places = [vars(module) for module in model.modules()]
        self._registers = [place[name] for place in places for name in REGISTERS]
        self._names = [list(register) for register in self._registers]
        known = set(map(id, self._registers + places))
        held: list[Any] = [*places, *(place[name] for place in places for name in HOOKS if name in place)]
        reached = _reached(places, into_modules=True)
        held += [one for one in reached if isinstance(one, (dict, list, set, deque)) and id(one) not in known]
        self._empty, self._held = [one for one in held if not one], [one for one in held if one]
        self._before = list(map(copy.copy, self._held))

    def is_current(self) -> bool:
        """Return whether everything is as it was: the same objects, or equal ones."""
        if any(self._empty) or list(map(len, self._registers)) != list(map(len, self._names)):
            return False
        if list(map(type, self._parts)) != self._kinds:
            return False
        try:
            return self._held == self._before
        except Exception:  # tensors and arrays that are not the same do not say whether they are equal
            return False

    def restore(self) -> None:
        """Undo what has changed, such as the lists and counters that a forward fills."""
        if self.is_current():
            return
        for register, names in zip(self._registers, self._names, strict=True):
            register.clear()
            register.update(dict.fromkeys(names))
        for held in self._empty:
            held.clear()
        for held, before in zip(self._held, self._before, strict=True):
            held.clear()
            held.extend(before) if isinstance(held, (list, deque)) else held.update(before)


def _reached(values: Iterable[Any], into_modules: bool = False) -> Iterator[Any]:
    """Yield values, and what is in containers and plain objects, as dataclasses, among them; hooks are the caller's."""
    waiting, seen = list(values), set()
    while waiting:
        value = waiting.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        yield value
        if isinstance(value, (dict, list, tuple, set, deque)):
            waiting += [value[key] for key in value if key not in HOOKS] if isinstance(value, dict) else value
        elif _is_plain_object(value) if not isinstance(value, nn.Module) else into_modules:
            waiting.append(vars(value))


def _is_plain_object(value: Any) -> bool:
    """Return whether copying an object copies its attributes."""
    kind = type(value)
    reducers: Any = kind.__reduce_ex__, kind.__reduce__
    is_plain = reducers == (object.__reduce_ex__, object.__reduce__)
    is_shared = isinstance(value, (type, FunctionType, ModuleType)) or hasattr(kind, "__deepcopy__")
    return (is_plain or kind is SimpleNamespace) and not is_shared and hasattr(value, "__dict__")


class HiddenTensors:
    """The tensors and arrays of a model that are in no register: plain attributes, and modules in plain lists.

    A copy has copies of them, which follow the caller's at every call, so that what a forward writes to them is
    dropped.
    """

    def __init__(self, memo: Mapping[int, Any]) -> None:
        originals = memo.get(id(memo), [])  # copy.deepcopy keeps what it has copied alive there
        pairs = [(original, memo[id(original)]) for original in originals if _is_array(original)]
        self._pairs = [(weakref.ref(one), other, copy.deepcopy(other)) for one, other in pairs if other is not one]
        for _, copied, _ in self._pairs:
            if isinstance(copied, Tensor) and copied.layout == torch.strided and 0 in copied.stride():
                copied.data = copied.contiguous()  # an expanded one cannot be written to

    @torch.no_grad()
    def follow(self) -> None:
        """Give the copies the values of the originals, or those they began with if the originals are gone."""
        for reference, copied, kept in self._pairs:
            original = reference()
            source = kept if original is None else original
            if isinstance(copied, Tensor):
                copied.copy_(source)
            else:
                copied[...] = source


def _is_array(value: Any) -> bool:
    return isinstance(value, Tensor) or (type(value).__module__ == "numpy" and hasattr(value, "__setitem__"))
