"""A device that is no CPU, for machines that have nothing else: tensors on it have a shape and a dtype, and no values.

    on_device(function, *arguments)    calls a function of a module in a process that has the device
    with FakeTensorMode():             in it, operators on the device compute shapes, dtypes, layouts and devices,
        move_(model), moved(x)         backward included

There an operator that mixes devices is an error, and so is one that the host would have to wait for, since the value
that it wants does not exist. CUDA itself cannot be pretended: autograd wants its driver.
"""

import traceback
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from multiprocessing import get_context
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import backend_registration

DEVICE = "pretend"


def is_available() -> bool:
    """Whether this PyTorch lets Python make a device: 2.10 and later."""
    return hasattr(backend_registration, "_setup_privateuseone_for_python_backend")


def on_device(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function where the device exists; an error comes back as a RuntimeError with its traceback."""
    return _process().submit(_called, function, *arguments).result()


def moved(tensor: Tensor) -> Tensor:
    """A tensor like this one on the device; to be called under a `FakeTensorMode`."""
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=DEVICE)


def move_(model: nn.Module) -> nn.Module:
    """Put a model on the device; `Module.to` cannot, since it swaps tensors that a mode refers to."""
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            module._parameters[name] = nn.Parameter(moved(parameter), parameter.requires_grad)
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = moved(buffer)
    return model


@cache
def _process() -> ProcessPoolExecutor:
    """One process for all tests, since a device cannot be taken away again."""
    return ProcessPoolExecutor(1, get_context("spawn"), initializer=_register)


def _register() -> None:
    torch.set_num_threads(1)
    backend_registration._setup_privateuseone_for_python_backend(DEVICE)

    # Autograd's zeros for an output that is not used are made without asking the mode.
    @torch.library.impl("aten::empty_strided", "privateuseone")
    def empty_strided(size: Any, stride: Any, dtype: Any = None, **_: Any) -> Tensor:
        return torch.empty_strided(size, stride, dtype=dtype, device="meta")


def _called(function: Callable[..., Any], *arguments: Any) -> Any:
    try:
        return function(*arguments)
    except Exception:
        raise RuntimeError(traceback.format_exc()) from None  # not every error can travel
