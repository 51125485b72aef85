"""How batch norm is intercepted: the only file that knows how a module reaches `F.batch_norm`.

While a handler is set, every BN layer in training mode hands its call to the handler instead of `F.batch_norm`:

    forward of a stock layer      →  handler.normalize(call)
    forward of any other subclass →  runs as it is; its call of F.batch_norm goes to the handler

What a subclass does around the function (activation, dropout) stays in place, and other users of `F.batch_norm` (weight
standardisation) are left alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import MethodType
from typing import Any, NamedTuple, Protocol

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import SyncBatchNorm, _BatchNorm
from torch.overrides import TorchFunctionMode

from apart_func.errors import ApartError, BatchError, ModelError, UsageError


class BatchNormCall(NamedTuple):
    """One call of batch norm inside a layer, with the layer's first name in the model."""

    name: str
    layer: _BatchNorm
    x: Tensor  # activations, `(N, C, ...)`
    weight: Tensor | None
    bias: Tensor | None
    eps: float
    running_mean: Tensor | None  # moved by the batch's mean; None if the call keeps none
    running_var: Tensor | None  # moved by its unbiased variance, likewise
    momentum: float | None  # weight of the batch in these; None is the cumulative average
    counts: bool  # whether the batch is still to be counted in `num_batches_tracked`


class Handler(Protocol):
    """What batch norm does while it is intercepted."""

    mixes: bool  # whether clean and perturbed samples are in one batch

    def normalize(self, call: BatchNormCall) -> Tensor:
        """Return what `F.batch_norm` would, of the shape and dtype of `call.x`."""


def batch_norm_layers(model: nn.Module) -> dict[str, _BatchNorm]:
    """Return the BN layers of a model in either mode, each under its first name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, _BatchNorm)}


def perturbable_layers(model: nn.Module) -> dict[str, _BatchNorm]:
    """Return the BN layers of a model; raise an ApartError if there is none, or one is inside a context already."""
    layers = batch_norm_layers(model)
    if not layers:
        kind = type(model).__name__
        raise ModelError(f"{kind} has no batch-norm layer to perturb: no BatchNorm1d, 2d, 3d, and no subclass of them.")
    for name, layer in layers.items():
        if isinstance(vars(layer).get("forward"), _PatchedForward):
            raise UsageError(f"layer {name!r} is inside a context of another APART already. Leave that one first.")
    return layers


def training_layers(model: nn.Module) -> dict[str, _BatchNorm]:
    """Return the layers that the method perturbs, those in training mode; errors are those of `perturbable_layers`."""
    layers = perturbable_layers(model)
    training = {name: layer for name, layer in layers.items() if layer.training}
    if not training:
        raise no_training_layer(type(model).__name__, len(layers))
    return training


def no_training_layer(model: str, layers: int) -> ModelError:
    """Return the error for a model whose BN layers are all in evaluation mode."""
    return ModelError(f"none of the {layers} batch-norm layers of {model} is in training mode. Call model.train().")


def check_unmixed(model: nn.Module) -> None:
    """Raise a ModelError if a layer normalises samples of all groups together."""
    for name, layer in batch_norm_layers(model).items():
        if not layer.training and not layer.track_running_stats:
            raise _mixing(name, layer)


def is_stock(layer: _BatchNorm) -> bool:
    """Return whether a layer's forward is PyTorch's own."""
    own = vars(layer).get("forward")
    function = type(layer).forward if own is None else getattr(own, "__func__", own)
    return function in (_BatchNorm.forward, SyncBatchNorm.forward)


class Interception:
    """Leads the batch norm of some layers to a handler, while one is set."""

    def __init__(self, layers: Mapping[str, _BatchNorm], momenta: Mapping[str, float | None] | None = None) -> None:
        self.layers, self.momenta = layers, momenta  # no momenta: those that the layers have at each call
        self.handler: Handler | None = None  # without one, every layer is as it is
        self._patches = [_PatchedForward(self, name, layer) for name, layer in layers.items()]

    def install(self) -> None:
        """Put the patched forwards in place."""
        for patch in self._patches:
            patch.own = vars(patch.layer).get("forward")  # of the instance, if it has one
            patch.original, patch.is_stock = patch.layer.forward, is_stock(patch.layer)
            vars(patch.layer)["forward"] = patch

    @contextmanager
    def installed(self, handler: Handler) -> Iterator[None]:
        """Lead the calls to a handler while open, and leave the layers as they were."""
        self.install()
        self.handler = handler
        try:
            yield
        finally:
            self.handler = None
            for patch in self._patches:
                vars(patch.layer).pop("forward", None)
                if patch.own is not None:
                    vars(patch.layer)["forward"] = patch.own


class _PatchedForward:
    """What stands in for the `forward` of one layer. In a copy of the layer, its own forward stands again."""

    own: Any
    original: Callable[..., Any]
    is_stock: bool

    def __init__(self, interception: Interception, name: str, layer: _BatchNorm) -> None:
        self.interception, self.name, self.layer = interception, name, layer

    def __reduce__(self) -> tuple[Any, ...]:
        return _own_forward, (self.layer, self.own)

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        name, layer, handler, momenta = self.name, self.layer, self.interception.handler, self.interception.momenta
        if handler is None or not layer.training:
            if handler is not None and handler.mixes and layer.running_mean is None:
                raise _mixing(name, layer)
            return self.original(x, *args, **kwargs)
        momentum = layer.momentum if momenta is None else momenta[name]
        if self.is_stock:
            return handler.normalize(_stock_call(name, layer, x, momentum))
        catch, y, problem = _CatchBatchNorm(name, layer, momentum, handler), None, None
        try:
            with catch:
                y = self.original(x, *args, **kwargs)
        except Exception as error:
            if catch.caught or isinstance(error, ApartError):
                raise
            problem = error
        if not catch.caught:
            raise ModelError(
                f"layer {name!r} ({type(layer).__name__}) ran without calling torch.nn.functional.batch_norm, so it "
                "cannot be perturbed. Let its forward call F.batch_norm, or keep the layer plain in evaluation mode."
            ) from problem
        return y


def _own_forward(layer: nn.Module, own: Any) -> Any:
    """Return the forward of an instance, or else of its class."""
    return MethodType(type(layer).forward, layer) if own is None else own


def _stock_call(name: str, layer: Any, x: Tensor, momentum: float | None) -> BatchNormCall:
    """Return the call of `F.batch_norm` that PyTorch's own forward would make."""
    try:
        layer._check_input_dim(x)
    except ValueError as error:
        given = f"layer {name!r} ({type(layer).__name__}) got input of shape {tuple(x.shape)}"
        raise BatchError(f"{given}: {error}.") from error
    mean, var = (layer.running_mean, layer.running_var) if layer.track_running_stats else (None, None)
    return BatchNormCall(name, layer, x, layer.weight, layer.bias, layer.eps, mean, var, momentum, True)


class _CatchBatchNorm(TorchFunctionMode):
    """Hands training-mode calls of `F.batch_norm` to the handler while one layer's own forward runs."""

    def __init__(self, name: str, layer: _BatchNorm, momentum: float | None, handler: Handler) -> None:
        super().__init__()
        self.name, self.layer, self.momentum, self.handler, self.caught = name, layer, momentum, handler, False

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func is not F.batch_norm:
            return func(*args, **(kwargs or {}))
        self.caught = True
        given = {**_ARGUMENTS, **dict(zip(_ARGUMENTS, args, strict=False)), **(kwargs or {})}
        x, mean, var, weight, bias, training, momentum, eps = given.values()
        if not training:  # by running statistics, which the layer chose itself
            return func(*args, **(kwargs or {}))
        momentum = None if self.momentum is None else momentum
        call = BatchNormCall(self.name, self.layer, x, weight, bias, eps, mean, var, momentum, False)
        return self.handler.normalize(call)


# The arguments of `F.batch_norm` in their order, and what they are if they are not passed.
_ARGUMENTS: dict[str, Any] = dict.fromkeys(["input", "running_mean", "running_var", "weight", "bias"])
_ARGUMENTS |= {"training": False, "momentum": 0.1, "eps": 1e-5}


def _mixing(name: str, layer: nn.Module) -> ModelError:
    """Return the error for a layer that normalises clean and perturbed samples together."""
    return ModelError(
        f"layer {name!r} ({type(layer).__name__}) is in evaluation mode and keeps no running statistics, so it "
        "normalises clean and perturbed samples together. Put it in training mode, or use the step of two passes."
    )
