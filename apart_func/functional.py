"""A model as a function of its tensors: `functionalize`, and the way in and out of a module's state.

`functionalize` keeps private copies of the model that own no tensor: they hold the caller's parameters and buffers for
the time of a call. The caller's model is never run.
"""

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy

from apart_func.errors import ModelError, StateError, UsageError
from apart_func.intercept import Handler, Route, training_layers
from apart_func.pytrees import Tensors


def split_state(model: nn.Module) -> tuple[Tensors, Tensors]:
    """Take a model's state as `params`, which are trained, and `buffers`, which are not.

    Parameters with `requires_grad=False` count as buffers, tied ones appear once under their first name. The tensors
    are detached and share memory with the model's, so an optimizer that updates the model in place is seen in them.

    Returns:
        `params` and `buffers`, keyed as in `named_parameters()` and `named_buffers()`.
    """
    params = {name: tensor.detach() for name, tensor in model.named_parameters() if tensor.requires_grad}
    frozen = {name: tensor.detach() for name, tensor in model.named_parameters() if not tensor.requires_grad}
    return params, frozen | {name: tensor.detach() for name, tensor in model.named_buffers()}


@torch.no_grad()
def load_state_(model: nn.Module, params: Mapping[str, Tensor], buffers: Mapping[str, Tensor]) -> None:
    """Copy `params` and `buffers` into a model, in place; the inverse of `split_state`.

    Raises:
        StateError: keys are missing or unexpected, or a shape differs; the model is then unchanged.
    """
    targets = dict(model.named_parameters()) | dict(model.named_buffers())
    tensors = _united(params, buffers)
    _check_tensors({name: tuple(target.shape) for name, target in targets.items()}, tensors)
    for name, target in targets.items():
        target.copy_(tensors[name])


def assign_grads_(model: nn.Module, grads: Mapping[str, Tensor]) -> None:
    """Set the `.grad` of a model's parameters, in place, for a `torch.optim` optimizer to use.

    Args:
        model: the module whose parameters get gradients.
        grads: gradients keyed by parameter name, such as `out.grads`. Parameters without a key lose their gradient.

    Raises:
        StateError: a key names no parameter, or a shape differs; the model is then unchanged.
    """
    targets = dict(model.named_parameters())
    _check_tensors({name: tuple(targets[name].shape) for name in grads if name in targets}, grads)
    for name, target in targets.items():
        target.grad = grads[name].to(target.dtype) if name in grads else None


LossFunction = Callable[[Any, Any], Tensor]


def call_module(module: Callable[..., Any], inputs: Any) -> Any:
    """Run a model on the input of a batch: a tuple is splatted, a dict passed as keywords."""
    if isinstance(inputs, tuple):
        return module(*inputs)
    if isinstance(inputs, Mapping):
        return module(**inputs)
    return module(inputs)


def scalar_loss(loss: Any) -> Tensor:
    """What a loss function returned, if it can be differentiated.

    Raises:
        UsageError: it is no scalar.
    """
    if not isinstance(loss, Tensor) or loss.dim() != 0 or not loss.is_floating_point():
        given = f"a {loss.dtype} tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else repr(type(loss))
        raise UsageError(
            f"loss_fn returned {given}; expected a 0-d floating-point tensor. Reduce it, e.g. loss.mean()."
        )
    return loss


class LayerSpec(NamedTuple):
    """What the passes need to know of a BN layer.

    Attributes:
        channels: number of channels C.
        momentum: weight of a new batch in the running statistics; None is the cumulative average.
        tracked: whether the layer keeps running statistics.
    """

    channels: int
    momentum: float | None
    tracked: bool


def layer_specs(layers: Mapping[str, _BatchNorm]) -> dict[str, LayerSpec]:
    """What the passes need to know of every layer."""
    return {
        name: LayerSpec(
            layer.num_features, layer.momentum, layer.track_running_stats and layer.running_mean is not None
        )
        for name, layer in layers.items()
    }


def functionalize(model: nn.Module) -> "FunctionalModel":
    """Make a function of `params` and `buffers` from a model. Its layers keep the modes they have now.

    Raises:
        ModelError: the model cannot be copied, or has no BN layer in training mode.
    """
    return FunctionalModel(model)


class FunctionalModel:
    """A model without state.

    `fmodel(params, buffers, *inputs)` evaluates it; the passes of `apart_func.step` train it.

    Attributes:
        layers: the BN layers that the method perturbs, by name.
    """

    def __init__(self, model: nn.Module) -> None:
        self.layers = layer_specs(training_layers(model))
        self._evaluation = _PrivateCopy(model, ())
        self._evaluation.module.eval()
        self._training = _PrivateCopy(model, self.layers)
        layers = training_layers(self._training.module)
        for layer in layers.values():
            layer.momentum = layer.momentum or 0.0  # None would read a counter, which no tracing allows
        self._route = Route(layers)
        self._route.attach()

    def __call__(self, params: Tensors, buffers: Tensors, *inputs: Any, training: bool = False, **keywords: Any) -> Any:
        """Run the model on `inputs`; buffers that the forward changes are dropped.

        Args:
            params: trained tensors by name.
            buffers: all others by name.
            *inputs: what the model's forward takes.
            training: False evaluates, with running statistics and without dropout. True keeps the modes that the
                layers had, and normalises by the statistics of the batch.
            **keywords: likewise.

        Raises:
            StateError: keys are missing or unexpected, or a shape differs.
        """
        tensors = self.check_state(params, buffers)
        if training:
            with self.opened(tensors, _plain_batch_norm) as (module, _):
                return module(*inputs, **keywords)
        with self._evaluation.holding(tensors) as module:
            return module(*inputs, **keywords)

    def check_state(self, params: Tensors, buffers: Tensors) -> Tensors:
        """Unite `params` and `buffers` after a look at their keys and shapes.

        Raises:
            StateError: keys are missing or unexpected, or a shape differs.
        """
        tensors = _united(params, buffers)
        _check_tensors(self._training.shapes, tensors)
        for name, tensor in params.items():
            if not (tensor.is_floating_point() or tensor.is_complex()):
                raise StateError(
                    f"params[{name!r}] has dtype {tensor.dtype}, which has no gradient. Put it in buffers."
                )
        return tensors

    @contextmanager
    def opened(self, tensors: Tensors, handler: Handler) -> Iterator[tuple[nn.Module, "_PrivateCopy"]]:
        """Hold `tensors` in the training copy, and lead its batch norm to `handler`, while open."""
        with self._training.holding(tensors) as module:
            self._route.handler = handler
            try:
                yield module, self._training
            finally:
                self._route.handler = None


class _PrivateCopy:
    """A copy of a model that owns no tensor, and holds the caller's while it runs.

    It assigns to the modules' own dicts, where `torch.func.functional_call` walks the module tree anew in every call.
    It also reaches tensors that a module keeps in a list (as LSTM does), and keeps the buffers that a forward
    replaces instead of changing.

    Attributes:
        module: the copy.
        shapes: what every tensor must look like, by name.
    """

    def __init__(self, model: nn.Module, perturbed: Iterable[str]) -> None:
        self.module = _copy_without_tensors(model)
        self.shapes = {name: tuple(tensor.shape) for name, tensor in _named_tensors(model)}
        perturbed = list(perturbed)
        counters = {f"{layer}.num_batches_tracked" for layer in perturbed}
        statistics = {f"{layer}.{key}" for layer in perturbed for key in ("running_mean", "running_var")}
        buffers = {name for name, _ in model.named_buffers()}
        slots = _slots(self.module)
        for slot in slots:
            slot.place[slot.key] = slot.at_rest
        self._counters = [slot for slot in slots if slot.name in counters]
        self._cloned = [slot for slot in slots if slot.name in buffers - counters - statistics]
        self._given = [slot for slot in slots if slot.name not in buffers]

    @contextmanager
    def holding(self, tensors: Tensors) -> Iterator[nn.Module]:
        """Hold the caller's parameters, copies of its buffers, and no running statistics of perturbed layers."""
        clones = {name: tensors[name].clone() for name in {slot.name for slot in self._cloned}}
        for slot in self._given:
            slot.place[slot.key] = tensors[slot.name]
        for slot in self._cloned:
            slot.place[slot.key] = clones[slot.name]
        for slot in self._counters:  # layers with a forward of their own count on it
            slot.place[slot.key] = torch.zeros((), dtype=torch.long)
        try:
            yield self.module
        finally:
            for slot in (*self._given, *self._cloned, *self._counters):
                slot.place[slot.key] = slot.at_rest

    def own_buffers(self) -> Tensors:
        """The buffers that the model changes itself, as they are now."""
        return {slot.name: slot.place[slot.key] for slot in self._cloned}


class _Absent:
    """Stands where a copied module has a parameter or buffer, and complains when it is computed with."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __torch_function__(self, *_: Any) -> Any:
        raise ModelError(
            f"the model reached {self.name!r} through something that is neither a module's attribute nor a list or "
            "dict of tensors in one, so the caller's tensor could not be put there. Keep it as a module attribute."
        )


class _Slot(NamedTuple):
    """A place in a module, a dict or list, where a tensor belongs."""

    place: Any
    key: Any
    name: str
    at_rest: _Absent | None  # modules and compilers expect a tensor or None in a module's own registers


def _slots(module: nn.Module) -> list[_Slot]:
    """Every place that refers to a parameter or buffer of the copied module."""
    slots: list[_Slot] = []
    seen: set[int] = set()
    registers = {id(place) for submodule in module.modules() for place in (submodule._parameters, submodule._buffers)}

    def visit(place: Any) -> None:
        if id(place) in seen:
            return
        seen.add(id(place))
        for key, value in place.items() if isinstance(place, dict) else enumerate(place):
            if isinstance(value, _Absent):
                slots.append(_Slot(place, key, value.name, None if id(place) in registers else value))
            elif isinstance(value, dict | list):
                visit(value)

    for submodule in module.modules():
        visit(vars(submodule))
    return slots


def _named_tensors(module: nn.Module) -> list[tuple[str, Tensor]]:
    return [*module.named_parameters(), *module.named_buffers()]


def _copy_without_tensors(model: nn.Module) -> nn.Module:
    """Copy a model, with one `_Absent` for each tensor; what was tied stays tied."""
    return copy_model(model, {id(tensor): _Absent(name) for name, tensor in _named_tensors(model)})


def copy_model(model: nn.Module, copies: dict[int, Any] | None = None) -> nn.Module:
    """Copy a model.

    Args:
        model: any module.
        copies: what stands for an object in the copy, by the object's id.

    Raises:
        ModelError: it cannot be copied.
    """
    lazy = [name for name, tensor in _named_tensors(model) if is_lazy(tensor)]
    if lazy:
        raise ModelError(f"{lazy[0]!r} has no shape yet: the model has lazy layers. Run one forward on a batch first.")
    try:
        return copy.deepcopy(model, copies)
    except Exception as error:
        raise ModelError(
            f"{type(model).__name__} cannot be copied ({error}). Replace old-style weight_norm and spectral_norm by "
            "those in torch.nn.utils.parametrizations, and pass the module that a wrapper such as "
            "DistributedDataParallel holds."
        ) from error


def _plain_batch_norm(name: str, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    return F.batch_norm(x, None, None, weight, bias, True, 0.0, eps)


def _united(params: Mapping[str, Tensor], buffers: Mapping[str, Tensor]) -> Tensors:
    both = sorted(set(params) & set(buffers))
    if both:
        raise StateError(f"{both} are in params and in buffers. Keep each in one.")
    return {**params, **buffers}


def _check_tensors(expected: Mapping[str, tuple[int, ...]], given: Mapping[str, Tensor]) -> None:
    if set(expected) != set(given):
        missing, unexpected = sorted(set(expected) - set(given)), sorted(set(given) - set(expected))
        raise StateError(
            f"the tensors do not fit the model: missing {missing}, unexpected {unexpected}. "
            "Take them from split_state(model) of the same model."
        )
    for name, shape in expected.items():
        if given[name].shape != shape:
            raise StateError(f"{name!r} has shape {tuple(given[name].shape)}, and the model expects {shape}.")
