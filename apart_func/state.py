"""The state of a module, as values and back: `split_state`, `load_state_`, `assign_grads_`.

The last two are the only functions of the library that change a model, and their trailing underscore says so.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from apart_func._torch import is_compiling, is_concrete
from apart_func.autodiff import is_unreached
from apart_func.errors import StateError
from apart_func.snapshot import check_model, named_tensors
from apart_func.trees import Tensors, check_named_tensors


def split_state(model: nn.Module) -> tuple[Tensors, Tensors]:
    """Take a model's state as `params`, which are trained, and `buffers`, which are not.

    Parameters with `requires_grad=False` count as buffers, tied ones appear once under their first name. The tensors
    are detached and share memory with the model's, so an optimizer that updates the model in place is seen in them.
    Take them again after something that gives the model's parameters other memory, as `p.data = ...` does.

    Returns:
        `params` and `buffers`, keyed as in `named_parameters()` and `named_buffers()`.

    Example:
        >>> params, buffers = split_state(nn.BatchNorm2d(3))
        >>> list(params), list(buffers)
        (['weight', 'bias'], ['running_mean', 'running_var', 'num_batches_tracked'])
    """
    check_model(model)
    params = {name: tensor.detach() for name, tensor in model.named_parameters() if tensor.requires_grad}
    for name, tensor in params.items():
        if is_concrete(tensor):  # another has no memory of its own
            _PARAMETER_OF[id(tensor)] = weakref.ref(model.get_parameter(name))
            weakref.finalize(tensor, _PARAMETER_OF.pop, id(tensor)).atexit = False
    frozen = {name: tensor.detach() for name, tensor in model.named_parameters() if not tensor.requires_grad}
    return params, frozen | {name: tensor.detach() for name, tensor in model.named_buffers()}


# The parameter whose memory a tensor of `split_state` shares, by the tensor's id.
_PARAMETER_OF: dict[int, weakref.ref[nn.Parameter]] = {}


def follow_parameters(params: Mapping[str, Tensor]) -> Tensors:
    """Return the same tensors, but for those of `split_state` whose parameters have other memory now."""
    found = dict(params)
    for name, tensor in {} if is_compiling() else params.items():
        reference = _PARAMETER_OF.get(id(tensor))
        parameter = None if reference is None else reference()
        if parameter is not None and parameter.data_ptr() != tensor.data_ptr():
            found[name] = parameter.detach()
    return found


@torch.no_grad()
def load_state_(model: nn.Module, params: Mapping[str, Tensor], buffers: Mapping[str, Tensor]) -> None:
    """Copy `params` and `buffers` into a model, in place; the inverse of `split_state`.

    Wrappers make no difference: `module.` of DistributedDataParallel and `_orig_mod.` of torch.compile may stand in the
    names of the model, of the tensors, of both or of none.

    Raises:
        StateError: keys are missing or unexpected, a shape differs, or a tensor cannot be copied; the model is then
            unchanged.
    """
    check_model(model)
    targets = unwrapped_names(dict(named_tensors(model)))
    united(params, buffers)  # which refuses what are no dicts
    tensors = unwrapped_names({**follow_parameters(params), **buffers})
    check_tensors({name: tuple(target.shape) for name, target in targets.items()}, tensors)
    for name, target in targets.items():
        _check_copy(name, tensors[name], target)
        if tensors[name].layout != target.layout:
            raise StateError(f"{name!r} has layout {tensors[name].layout}, and the model's {target.layout}.")
    for name, target in targets.items():
        target.copy_(tensors[name])


def assign_grads_(model: nn.Module, grads: Mapping[str, Tensor], *, accumulate: bool = False) -> None:
    """Set the `.grad` of a model's parameters, in place, for a `torch.optim` optimizer to use.

    Parameters that the loss does not reach, as an eager step has seen, have no gradient afterwards, and optimizers
    leave them alone, as after `backward()`.

    Args:
        model: the module whose parameters get gradients, wrapped or not, as in `load_state_`.
        grads: gradients keyed by parameter name, such as `out.grads`.
        accumulate: whether to add to the gradients that are there, as `backward()` does. Otherwise these are replaced,
            and parameters without a key lose theirs.

    Raises:
        StateError: a key names no parameter, a shape differs, or a gradient is on another device or of another kind;
            the model is then unchanged.
    """
    check_model(model)
    check_named_tensors("grads", grads)
    targets = dict(model.named_parameters())
    if not all(name in targets for name in grads):
        targets, grads = unwrapped_names(targets), unwrapped_names(grads)
    check_tensors({name: tuple(targets[name].shape) for name in grads if name in targets}, grads)
    for name, given in grads.items():
        _check_copy(name, given, targets[name])
        if given.device != targets[name].device:
            raise StateError(f"grads[{name!r}] is on {given.device}, and the parameter on {targets[name].device}.")
    for name, target in targets.items():
        is_reached = name in grads and not is_unreached(grads[name])
        grad = grads[name].detach().to(target.dtype) if is_reached else None
        if not accumulate:
            target.grad = grad
        elif grad is not None:
            target.grad = grad.clone() if target.grad is None else target.grad + grad


def _check_copy(name: str, tensor: Tensor, target: Tensor) -> None:
    if tensor.is_quantized and not target.is_quantized:
        raise StateError(f"{name!r} is quantized, and the model's is {target.dtype}. Pass its .dequantize().")
    if tensor.is_meta and not target.is_meta:
        raise StateError(f"{name!r} is on the meta device, where tensors have no values. Pass one that has.")
    if tensor.is_complex() and not target.is_complex():
        raise StateError(f"{name!r} is complex, and the model's is {target.dtype}: its imaginary part would be lost.")


WRAPPERS = ("module", "_orig_mod", "_fsdp_wrapped_module")


def unwrapped_names(named: Mapping[str, Any]) -> dict[str, Any]:
    """Drop the parts of names that wrappers of models add; names stay as they are if two would become one."""
    plain = {".".join(part for part in name.split(".") if part not in WRAPPERS): value for name, value in named.items()}
    return plain if len(plain) == len(named) else dict(named)


def united(params: Mapping[str, Tensor], buffers: Mapping[str, Tensor]) -> Tensors:
    """Return params and buffers as one dict; raise a StateError if they are no dicts, or share a name."""
    for kind, tensors in (("params", params), ("buffers", buffers)):
        if not isinstance(tensors, Mapping):
            raise StateError(f"{kind} is a {type(tensors).__name__}; expected a dict of tensors, as of split_state.")
    both = sorted(set(params) & set(buffers))
    if both:
        raise StateError(f"{both} are in params and in buffers. Keep each in one.")
    return {**params, **buffers}


def check_tensors(expected: Mapping[str, tuple[int, ...]], given: Mapping[str, Tensor]) -> None:
    """Raise a StateError if tensors do not have the names and shapes that a model expects."""
    if expected.keys() != given.keys():
        missing, unexpected = sorted(set(expected) - set(given)), sorted(set(given) - set(expected))
        raise StateError(
            f"the tensors do not fit the model: missing {missing}, unexpected {unexpected}. "
            "Take them from split_state(model) of the same model."
        )
    for name, shape in expected.items():
        tensor = given[name]
        if not isinstance(tensor, Tensor):
            raise StateError(f"{name!r} is a {type(tensor).__name__}; expected a tensor of shape {shape}.")
        if tensor.shape != shape:
            raise StateError(
                f"{name!r} has shape {tuple(tensor.shape)}, and the model expects {shape}. A buffer that takes its "
                "shape in a first forward, as of observers of quantisation, has it after one: run one first."
            )
