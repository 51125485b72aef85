"""How batch norm is intercepted: the only file that knows how a module reaches `F.batch_norm`.

While a handler is set, every BN layer in training mode hands its call to the handler instead of `F.batch_norm`:

    forward of a stock layer      →  handler.normalize(call)
    forward of any other subclass →  runs as it is; its call of F.batch_norm goes to the handler

Catching the function, and not the module, keeps what a subclass does around it (activation, dropout) in place; catching it
inside BN layers alone leaves other users of `F.batch_norm` (weight standardisation) alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import MethodType
from typing import Any, NamedTuple, Protocol

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import SyncBatchNorm, _BatchNorm
from torch.overrides import TorchFunctionMode

from apart_func.errors import ApartError, BatchError, ModelError, UsageError


class BatchNormCall(NamedTuple):
    """One call of batch norm inside a layer.

    Attributes:
        name: of the layer, its first one in the model.
        layer: the module.
        x: activations `(N, C, ...)`.
        weight: γ; None is 1.
        bias: β; None is 0.
        eps: BN's constant.
        running_mean: what the batch's mean moves; None if the call keeps none.
        running_var: what its unbiased variance moves, likewise.
        momentum: weight of the batch in the running statistics; None is the cumulative average.
        counts: whether the batch is still to be counted in `num_batches_tracked`.
    """

    name: str
    layer: _BatchNorm
    x: Tensor
    weight: Tensor | None
    bias: Tensor | None
    eps: float
    running_mean: Tensor | None
    running_var: Tensor | None
    momentum: float | None
    counts: bool


class Handler(Protocol):
    """What batch norm does while it is intercepted.

    Attributes:
        mixes: whether clean and perturbed samples are in one batch.
    """

    @property
    def mixes(self) -> bool:
        """See above."""

    def normalize(self, call: BatchNormCall) -> Tensor:
        """Return what `F.batch_norm` would, of the shape and dtype of `call.x`."""


def batch_norm_layers(model: nn.Module) -> dict[str, _BatchNorm]:
    """Return the BN layers of a model in either mode, each under its first name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, _BatchNorm)}


def perturbable_layers(model: nn.Module) -> dict[str, _BatchNorm]:
    """Return the BN layers of a model in either mode, none of which is intercepted yet.

    Raises:
        ModelError: there is none.
        UsageError: one is inside a context already.
    """
    layers = batch_norm_layers(model)
    if not layers:
        raise ModelError(
            f"{type(model).__name__} has no batch-norm layer, and APART perturbs nothing else. It needs a model with "
            "BatchNorm1d, 2d or 3d, or a subclass of them."
        )
    for name, layer in layers.items():
        if isinstance(vars(layer).get("forward"), _PatchedForward):
            raise UsageError(f"layer {name!r} is inside a context of another APART already. Leave that one first.")
    return layers


def training_layers(model: nn.Module) -> dict[str, _BatchNorm]:
    """Return the BN layers that the method perturbs: those in training mode, each under its first name.

    Raises:
        ModelError: there is none.
        UsageError: one is inside a context already.
    """
    layers = perturbable_layers(model)
    training = {name: layer for name, layer in layers.items() if layer.training}
    if not training:
        raise no_training_layer(type(model).__name__, len(layers))
    return training


def no_training_layer(model: str, layers: int) -> ModelError:
    """Return the error for a model whose BN layers are all in evaluation mode."""
    return ModelError(
        f"none of the {layers} batch-norm layers of {model} is in training mode, and layers in evaluation mode stay as "
        "they are. Call model.train() first."
    )


def is_stock(layer: _BatchNorm) -> bool:
    """Return whether a layer's forward is PyTorch's own."""
    own = vars(layer).get("forward")
    function = type(layer).forward if own is None else getattr(own, "__func__", own)
    return function in (_BatchNorm.forward, SyncBatchNorm.forward)


class Interception:
    """Leads the batch norm of some layers to a handler, while one is set.

    Args:
        layers: by name.
        momenta: weights of a batch in their running statistics; None takes what the layers say at each call.

    Attributes:
        layers: by name.
        handler: where the layers' calls go; None leaves every layer as it is.
    """

    def __init__(self, layers: Mapping[str, _BatchNorm], momenta: Mapping[str, float | None] | None = None) -> None:
        self.layers, self.handler = layers, None
        self.handler: Handler | None
        self._patches = [
            _PatchedForward(self, name, layer, None if momenta is None else {"momentum": momenta[name]})
            for name, layer in layers.items()
        ]

    def install(self) -> None:
        """Put the patched forwards in place."""
        for patch in self._patches:
            patch.install()

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
                patch.remove()


class _PatchedForward:
    """What stands in for the `forward` of one layer. In a copy of the layer, its own forward stands again."""

    def __init__(self, interception: Interception, name: str, layer: _BatchNorm, fixed: dict[str, Any] | None) -> None:
        self.interception, self.name, self.layer = interception, name, layer
        self._fixed = fixed  # the momentum of a layer that must not read its own
        self._find()

    def _find(self) -> None:
        self.own = vars(self.layer).get("forward")  # of the instance, if it has one
        self.original = self.layer.forward
        self._stock = is_stock(self.layer)

    def install(self) -> None:
        """Stand in for the layer's forward as it is now."""
        self._find()
        vars(self.layer)["forward"] = self

    def remove(self) -> None:
        """Put back what was there."""
        if self.own is None:
            vars(self.layer).pop("forward", None)
        else:
            vars(self.layer)["forward"] = self.own

    def __reduce__(self) -> tuple[Any, ...]:
        return (_own_forward, (self.layer,)) if self.own is None else (_itself, (self.own,))

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        handler, layer = self.interception.handler, self.layer
        if handler is None:
            return self.original(x, *args, **kwargs)
        if not layer.training:
            if handler.mixes and layer.running_mean is None:
                raise _mixing(self.name, layer)
            return self.original(x, *args, **kwargs)
        momentum = layer.momentum if self._fixed is None else self._fixed["momentum"]
        if self._stock:
            _check_dimensions(self.name, layer, x)
            tracked = layer.track_running_stats
            return handler.normalize(
                BatchNormCall(
                    self.name,
                    layer,
                    x,
                    layer.weight,
                    layer.bias,
                    layer.eps,
                    layer.running_mean if tracked else None,
                    layer.running_var if tracked else None,
                    momentum,
                    True,
                )
            )
        catch = _CatchBatchNorm(self.name, layer, momentum, handler)
        try:
            with catch:
                y = self.original(x, *args, **kwargs)
        except ApartError:
            raise
        except Exception as error:
            if catch.caught:
                raise
            raise _bypassed(self.name, layer) from error
        if not catch.caught:
            raise _bypassed(self.name, layer)
        return y


def _own_forward(layer: nn.Module) -> Any:
    return MethodType(type(layer).forward, layer)


def _itself(forward: Any) -> Any:
    return forward


class _CatchBatchNorm(TorchFunctionMode):
    """Hands training-mode calls of `F.batch_norm` to the handler while one layer's own forward runs."""

    def __init__(self, name: str, layer: _BatchNorm, momentum: float | None, handler: Handler) -> None:
        super().__init__()
        self.name, self.layer, self.momentum, self.handler, self.caught = name, layer, momentum, handler, False

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is not F.batch_norm:
            return func(*args, **kwargs)
        self.caught = True
        x, mean, var, weight, bias, training, momentum, eps = _arguments(*args, **kwargs)
        if not training:  # by running statistics, which the layer chose itself
            return func(*args, **kwargs)
        weight_of_batch = None if self.momentum is None else momentum
        return self.handler.normalize(
            BatchNormCall(self.name, self.layer, x, weight, bias, eps, mean, var, weight_of_batch, False)
        )


def _arguments(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> tuple[Any, ...]:
    """Return the arguments of a call of `F.batch_norm`, however they were passed."""
    return input, running_mean, running_var, weight, bias, training, momentum, eps


def _check_dimensions(name: str, layer: Any, x: Tensor) -> None:
    try:
        layer._check_input_dim(x)
    except ValueError as error:
        raise BatchError(
            f"layer {name!r} ({type(layer).__name__}) got input of shape {tuple(x.shape)}: {error}."
        ) from error


def check_unmixed(model: nn.Module) -> None:
    """Make sure that no layer normalises samples of all groups together.

    Raises:
        ModelError: one is in evaluation mode and keeps no running statistics.
    """
    for name, layer in batch_norm_layers(model).items():
        if not layer.training and not layer.track_running_stats:
            raise _mixing(name, layer)


def _mixing(name: str, layer: nn.Module) -> ModelError:
    return ModelError(
        f"layer {name!r} ({type(layer).__name__}) is in evaluation mode and keeps no running statistics, so it "
        "normalises clean and perturbed samples together, and one pass cannot tell them apart. Put it in training mode, "
        "or use the step of two passes."
    )


def _bypassed(name: str, layer: nn.Module) -> ModelError:
    return ModelError(
        f"layer {name!r} ({type(layer).__name__}) ran without calling torch.nn.functional.batch_norm, so its statistics "
        "cannot be perturbed. Let its forward call F.batch_norm, or put the layer in evaluation mode to leave it as it is."
    )
