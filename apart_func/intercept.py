"""How batch norm is intercepted: the only file that knows how a module reaches `F.batch_norm`.

While a route is open, every BN layer in training mode hands its input to a `Handler` instead of `F.batch_norm`:

    forward of a stock layer      →  handler(name, layer, x, weight, bias, eps)
    forward of any other subclass →  runs as it is; its call of F.batch_norm goes to the handler

Catching the function, and not the module, keeps what a subclass does around it (activation, dropout) in place;
catching it inside BN layers alone leaves other users of `F.batch_norm` (weight standardisation) in peace.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode

from apart_func.errors import ApartError, BatchError, ModelError, UsageError

Handler = Callable[[str, Tensor, Tensor | None, Tensor | None, float], Tensor]


def training_layers(model: nn.Module) -> dict[str, _BatchNorm]:
    """The BN layers that the method perturbs: in training mode, each under its first name.

    Raises:
        ModelError: there is none.
        UsageError: they are on a route already.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, _BatchNorm)}
    if not layers:
        raise ModelError(
            f"{type(model).__name__} has no batch-norm layer, and APART perturbs nothing else. It needs a model with "
            "BatchNorm1d, 2d or 3d, or a subclass of them."
        )
    training = {name: layer for name, layer in layers.items() if layer.training}
    if not training:
        raise ModelError(
            f"none of the {len(layers)} batch-norm layers of {type(model).__name__} is in training mode, and layers in "
            "evaluation mode stay as they are. Call model.train() first."
        )
    routed = [name for name, layer in training.items() if _is_routed(layer)]
    if routed:
        raise UsageError(
            f"layer {routed[0]!r} is inside a context of another APART already. Leave that one before the next begins."
        )
    return training


def is_stock(layer: _BatchNorm) -> bool:
    """Whether a layer's forward is PyTorch's own."""
    return type(layer).forward is _BatchNorm.forward and "forward" not in vars(layer)


class Route:
    """Leads the batch norm of some layers to a handler, while one is set.

    Attributes:
        handler: where the layers' calls go; None leaves every layer as it is.
    """

    def __init__(self, layers: dict[str, _BatchNorm]) -> None:
        self.handler: Handler | None = None
        self._forwards = [(layer, _forward(self, name, layer)) for name, layer in layers.items()]

    def attach(self) -> None:
        """Let the layers' calls pass through here."""
        for layer, forward in self._forwards:
            vars(layer)["forward"] = forward

    @contextmanager
    def opened(self, handler: Handler) -> Iterator[None]:
        """Lead the layers' calls to `handler` while open, and leave the layers as they were."""
        own = [(vars(layer), vars(layer).get("forward")) for layer, _ in self._forwards]
        self.attach()
        self.handler = handler
        try:
            yield
        finally:
            self.handler = None
            for attributes, forward in own:
                if forward is None:
                    del attributes["forward"]
                else:
                    attributes["forward"] = forward


def _is_routed(layer: _BatchNorm) -> bool:
    return getattr(vars(layer).get("forward"), "__module__", None) == __name__


def _forward(route: Route, name: str, layer: _BatchNorm) -> Callable[..., Any]:
    """What replaces the `forward` of one layer."""
    original, stock = layer.forward, is_stock(layer)

    def forward(x: Tensor, *args: Any, **kwargs: Any) -> Any:
        handler = route.handler
        if handler is None:
            return original(x, *args, **kwargs)
        if stock:
            _check_dimensions(name, layer, x)
            return handler(name, x, layer.weight, layer.bias, layer.eps)
        catch = _CatchBatchNorm(name, handler)
        try:
            with catch:
                y = original(x, *args, **kwargs)
        except ApartError:
            raise
        except Exception as error:
            if catch.caught:
                raise
            raise _bypassed(name, layer) from error
        if not catch.caught:
            raise _bypassed(name, layer)
        return y

    return forward


class _CatchBatchNorm(TorchFunctionMode):
    """Hands calls of `F.batch_norm` to the handler while one layer's own forward runs."""

    def __init__(self, name: str, handler: Handler) -> None:
        super().__init__()
        self.name, self.handler, self.caught = name, handler, False

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is not F.batch_norm:
            return func(*args, **kwargs)
        self.caught = True
        return self.handler(self.name, *_used_arguments(*args, **kwargs))


def _used_arguments(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor | None, Tensor | None, float]:
    """What a handler needs of a call of `F.batch_norm`, however the arguments were passed."""
    return input, weight, bias, eps


def _check_dimensions(name: str, layer: _BatchNorm, x: Tensor) -> None:
    try:
        layer._check_input_dim(x)
    except ValueError as error:
        raise BatchError(
            f"layer {name!r} ({type(layer).__name__}) got input of shape {tuple(x.shape)}: {error}."
        ) from error


def _bypassed(name: str, layer: nn.Module) -> ModelError:
    return ModelError(
        f"layer {name!r} ({type(layer).__name__}) ran without calling torch.nn.functional.batch_norm, so its "
        "statistics cannot be perturbed. Let its forward call F.batch_norm, or put the layer in evaluation mode "
        "to leave it as it is. (SyncBatchNorm bypasses it while it synchronises.)"
    )
