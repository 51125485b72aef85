"""How batch norm is intercepted: the only file that knows how a module reaches `F.batch_norm`.

While a route is open, every BN layer that is in training mode hands its input to a `Handler` instead of `F.batch_norm`:

    forward of a stock layer      →  handler(site, x, weight, bias, eps)
    forward of any other subclass →  runs as it is; its call of F.batch_norm goes to the handler

Catching the function, and not the module, keeps what a subclass does around it (activation, dropout) in place;
catching it inside BN layers alone leaves other users of `F.batch_norm` (weight standardisation) in peace.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import MethodType
from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import SyncBatchNorm, _BatchNorm
from torch.overrides import TorchFunctionMode

from apart_func.errors import ApartError, BatchError, ModelError, UsageError


class Site(NamedTuple):
    """Where batch norm is intercepted.

    Attributes:
        name: of the layer, its first one in the model.
        layer: the module.
        momentum: weight of a batch in its running statistics; None is the cumulative average.
        stock: whether its forward is PyTorch's own, and does not run.
    """

    name: str
    layer: _BatchNorm
    momentum: float | None
    stock: bool


Handler = Callable[[Site, Tensor, Tensor | None, Tensor | None, float], Tensor]


def batch_norm_layers(model: nn.Module) -> dict[str, _BatchNorm]:
    """The BN layers of a model in either mode, each under its first name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, _BatchNorm)}


def training_layers(model: nn.Module) -> dict[str, _BatchNorm]:
    """The BN layers that the method perturbs: in training mode, each under its first name.

    Raises:
        ModelError: there is none.
        UsageError: they are on a route already.
    """
    layers = batch_norm_layers(model)
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
    routed = [name for name, layer in training.items() if isinstance(vars(layer).get("forward"), _Detour)]
    if routed:
        raise UsageError(
            f"layer {routed[0]!r} is inside a context of another APART already. Leave that one before the next begins."
        )
    return training


def is_stock(layer: _BatchNorm) -> bool:
    """Whether a layer's forward is PyTorch's own."""
    own = vars(layer).get("forward")
    function = type(layer).forward if own is None else getattr(own, "__func__", own)
    return function in (_BatchNorm.forward, SyncBatchNorm.forward)


class Route:
    """Leads the batch norm of some layers to a handler, while one is set.

    Args:
        layers: by name.
        momenta: weight of a batch in their running statistics, of layers that are nobody else's; None takes what the
            layers say whenever it is `opened`.

    Attributes:
        layers: by name.
        handler: where the layers' calls go; None leaves every layer as it is.
        reached: whether a layer was called since the route was opened, in either mode.
    """

    def __init__(self, layers: Mapping[str, _BatchNorm], momenta: Mapping[str, float | None] | None = None) -> None:
        self.layers, self._momenta = layers, momenta
        self.handler: Handler | None = None
        self.reached = False
        self._detours = [_Detour(self, site) for site in self._sites()]
        if momenta is not None:
            self._stand_in()

    def _sites(self) -> list[Site]:
        momenta = self._momenta or {name: layer.momentum for name, layer in self.layers.items()}
        return [Site(name, layer, momenta[name], is_stock(layer)) for name, layer in self.layers.items()]

    def _stand_in(self) -> None:
        for detour in self._detours:
            vars(detour.site.layer)["forward"] = detour

    @contextmanager
    def opened(self, handler: Handler) -> Iterator[None]:
        """Lead the calls of somebody's layers to `handler` while open, and leave the layers as they were."""
        for detour, site in zip(self._detours, self._sites(), strict=True):
            detour.take(site)
        self._stand_in()
        self.open(handler)
        try:
            yield
        finally:
            self.close()
            for detour in self._detours:
                detour.leave()

    def open(self, handler: Handler) -> None:
        """Lead the calls of private layers to `handler`, in which the detours always stand.

        Dynamo of torch 2.8 traces neither a context manager that is made of a generator nor the attributes of a layer.
        """
        self.handler, self.reached = handler, False

    def close(self) -> None:
        """Leave every layer as it is."""
        self.handler = None


class _Detour:
    """What stands in for the `forward` of one layer. In a copy of the layer, its own forward stands again."""

    def __init__(self, route: Route, site: Site) -> None:
        self.route = route
        self.take(site)

    def take(self, site: Site) -> None:
        """Stand in for a layer as it is now."""
        self.site = site
        self.own = vars(site.layer).get("forward")  # of the instance, if it has one
        self.original = site.layer.forward

    def leave(self) -> None:
        """Put back what was there."""
        attributes = vars(self.site.layer)
        if self.own is None:
            attributes.pop("forward", None)
        else:
            attributes["forward"] = self.own

    def __reduce__(self) -> tuple[Any, ...]:
        return (_own_forward, (self.site.layer,)) if self.own is None else (_itself, (self.own,))

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        route, site = self.route, self.site
        handler, layer = route.handler, site.layer
        if handler is None:
            return self.original(x, *args, **kwargs)
        route.reached = True
        if not layer.training:
            if layer.running_mean is None and getattr(handler, "is_mixed", False):
                raise _mixing(site.name, layer)
            return self.original(x, *args, **kwargs)
        if site.stock:
            _check_dimensions(site, x)
            return handler(site, x, layer.weight, layer.bias, layer.eps)
        catch = _CatchBatchNorm(site, handler)
        try:
            with catch:
                y = self.original(x, *args, **kwargs)
        except ApartError:
            raise
        except Exception as error:
            if catch.caught:
                raise
            raise _bypassed(site) from error
        if not catch.caught:
            raise _bypassed(site)
        return y


def _own_forward(layer: nn.Module) -> Any:
    return MethodType(type(layer).forward, layer)


def _itself(forward: Any) -> Any:
    return forward


class _CatchBatchNorm(TorchFunctionMode):
    """Hands calls of `F.batch_norm` to the handler while one layer's own forward runs."""

    def __init__(self, site: Site, handler: Handler) -> None:
        super().__init__()
        self.site, self.handler, self.caught = site, handler, False

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is not F.batch_norm:
            return func(*args, **kwargs)
        self.caught = True
        return self.handler(self.site, *_used_arguments(*args, **kwargs))


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


def _check_dimensions(site: Site, x: Tensor) -> None:
    try:
        site.layer._check_input_dim(x)
    except ValueError as error:
        raise BatchError(
            f"layer {site.name!r} ({type(site.layer).__name__}) got input of shape {tuple(x.shape)}: {error}."
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
        f"layer {name!r} ({type(layer).__name__}) is in evaluation mode and keeps no running statistics, so "
        "it normalises clean and perturbed samples together, and one pass cannot tell them apart. Put it in training "
        "mode, or use the step of two passes."
    )


def _bypassed(site: Site) -> ModelError:
    return ModelError(
        f"layer {site.name!r} ({type(site.layer).__name__}) ran without calling torch.nn.functional.batch_norm, so its "
        "statistics cannot be perturbed. Let its forward call F.batch_norm, or put the layer in evaluation mode "
        "to leave it as it is."
    )
