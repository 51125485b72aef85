"""A model as a function of its tensors: `functionalize`.

`functionalize` keeps a private copy of the model that owns no tensor. `torch.func.functional_call` lends it the
caller's parameters and copies of the buffers for the time of a call, in which the loss is computed *and*
differentiated, so that a layer that runs again during the backward finds its tensors. The caller's model is never run.
"""

from __future__ import annotations  # Dynamo of old versions traces those of inner functions

import inspect
import threading
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from apart_func._torch import backward_task, is_compiling, is_concrete
from apart_func.errors import BatchError, ModelError, StateError, UsageError
from apart_func.groups import Grouping
from apart_func.intercept import Handler, batch_norm_layers, no_training_layer, training_layers
from apart_func.layers import PerturbedLayers, Record
from apart_func.losses import LossFunction, check_loss_function
from apart_func.snapshot import Snapshot, check_model, named_tensors
from apart_func.state import check_tensors, follow_parameters, united
from apart_func.stateless import StatelessModule
from apart_func.trees import PerturbationTree, Tensors, statistics_kind, tensors_of, zero_perturbation


def module_arguments(inputs: Any) -> tuple[Any, Mapping[str, Any]]:
    """Return the arguments that an input makes: a tuple or list is splatted, a mapping passed as keywords."""
    if isinstance(inputs, Mapping):
        return (), inputs
    return (inputs if isinstance(inputs, (tuple, list)) else (inputs,)), {}


def call_module(module: Callable[..., Any], inputs: Any) -> Any:
    """Run a model on the input of a batch; see `module_arguments`."""
    args, kwargs = module_arguments(inputs)
    return module(*args, **kwargs)


def check_arguments(module: Any, args: Any, kwargs: Any, error: TypeError) -> None:
    """Raise a BatchError, after an error, if a model's forward does not take the arguments that an input makes."""
    if is_compiling():
        return
    try:
        inspect.signature(getattr(module, "forward", module)).bind(*args, **kwargs)
    except TypeError:
        raise BatchError(
            f"the model's forward does not take the input: {error}. A tuple or list is splatted into the model, and a "
            "mapping is passed as keywords. For a forward of one argument that is itself a list, tuple or dict, wrap "
            "it: batch = ((input,), target)."
        ) from error
    except ValueError:  # it has no signature
        return


def check_unchanged(copies: Any, what: str, advice: str) -> None:
    """Raise a BatchError if copies of a part of the batch have been changed: the second pass would get them changed."""
    for place, tensor in enumerate(tensors_of(copies)):
        if is_concrete(tensor) and tensor._version and tensor.layout == torch.strided:
            raise BatchError(
                f"{what} in place (tensor {place}, of shape {tuple(tensor.shape)}), and a step changes none of its "
                f"arguments. Say {advice}."
            )


def functionalize(model: nn.Module) -> FunctionalModel:
    """Make a function of `params` and `buffers` from a model.

    Raises:
        ModelError: the model cannot be copied, or has no BN layer in training mode.
    """
    return FunctionalModel(model)


def as_functional(model: nn.Module | FunctionalModel) -> FunctionalModel:
    """Return a model as a function, if it is not one already."""
    return model if isinstance(model, FunctionalModel) else functionalize(model)


def counted_layers(count: int) -> str:
    """Say how many BN layers a model has."""
    return f"{count} batch-norm layer{'' if count == 1 else 's'}"


class FunctionalModel:
    """A model without state: `fmodel(params, buffers, *inputs)` evaluates it, and the passes train it.

    It is a value: it can be copied, pickled, and called from several threads, one after another. What the caller
    changes on the model (modes, momenta, drop rates, hooks, layers) is taken over at the next eager call; a compiled
    one, a copy and a pickled one stay as they are.
    """

    def __init__(self, model: nn.Module) -> None:
        check_model(model)
        training_layers(model)
        self._source: weakref.ref[nn.Module] | None = weakref.ref(model, self._forget)
        self._take(model)
        self._lock = threading.RLock()

    def _take(self, model: nn.Module) -> None:
        """Copy the model as it is now."""
        self._seen: Snapshot | None = Snapshot(model)
        self.training = StatelessModule(model)
        self._evaluation = self.training.evaluating()  # now: a compiler could not make it
        self.coupled: dict[Any, tuple[Any, bool]] = {}  # what a mixed pass has seen of losses
        self._of_caller = {id(p): (weakref.ref(p), name) for name, p in model.named_parameters()}

    @property
    def layers(self) -> dict[str, int]:
        """The channels of the BN layers that the method perturbs, by name."""
        layers: dict[str, int] = self.training.constants.layers
        return layers

    def __getstate__(self) -> dict[str, Any]:
        self.update()
        return {"training": self.training, "_source": None, "_of_caller": {}, "coupled": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _lock=threading.RLock(), _evaluation=state["training"].evaluating())

    def __repr__(self) -> str:
        return f"{type(self).__name__}({type(self.training.module).__name__}, {counted_layers(len(self.layers))})"

    def __call__(self, params: Tensors, buffers: Tensors, *inputs: Any, training: bool = False, **keywords: Any) -> Any:
        """Run the model on `inputs`; buffers that the forward changes are dropped.

        Args:
            params: trained tensors by name.
            buffers: all others by name.
            *inputs: what the model's forward takes.
            training: False evaluates, with running statistics and without dropout. True keeps the modes that the
                layers have, and normalises by the statistics of the batch.
            **keywords: likewise.

        Raises:
            StateError: keys are missing or unexpected, or a shape differs.
        """
        self.update()
        self.check_state(params, buffers)
        dtype, device = statistics_kind({**params, **buffers})
        zero, record = zero_perturbation(self.layers, dtype, device), Record(0, self.training.replace_buffer, dtype)
        handler = PerturbedLayers(zero, Grouping(1, None), record, backward_task()) if training else None
        return self.run(params, buffers, handler, lambda stateless: stateless.module(*inputs, **keywords))

    def update(self) -> None:
        """Take over what the caller has changed on the model since it was copied. A compiler sees none of it."""
        if is_compiling() or self._source is None:
            return
        model = self._source()
        if model is not None:
            with self._lock:
                if self._seen is None or not self._seen.is_current():
                    check_model(model)
                    self._take(model)

    def _forget(self, _: Any) -> None:
        """Keep nothing alive of a model that is gone."""
        self._seen = None

    def run(
        self,
        params: Mapping[str, Tensor],
        buffers: Mapping[str, Tensor],
        handler: Handler | None,
        function: Callable[[StatelessModule], Any],
    ) -> Any:
        """Call a function of a copy of the model that holds some tensors, and whose batch norm goes to a handler.

        Parameters are lent as they are; of buffers it is copies, since a forward may change them. No handler evaluates.
        """
        stateless = self.training if handler is not None else self._evaluation
        kept = stateless.never_written if is_compiling() else ()
        held = {**params, **{name: tensor if name in kept else tensor.clone() for name, tensor in buffers.items()}}
        lent = {f"module.{place}": held[name] for place, name in stateless.first.items()}
        if is_compiling():
            stateless.interception.handler = handler
            result = functional_call(stateless.runner, lent, (function,), tie_weights=False)
            stateless.interception.handler = None  # what stays on an object leaves the graph
            return result
        with self._lock:
            outer, stateless.interception.handler = stateless.interception.handler, handler
            stateless.hidden.follow()
            try:
                return functional_call(stateless.runner, lent, (function,), tie_weights=False)
            finally:
                stateless.interception.handler = outer
                if outer is None:
                    stateless.snapshot.restore()

    def check_state(self, params: Mapping[str, Tensor], buffers: Mapping[str, Tensor]) -> None:
        """Raise a StateError if `params` and `buffers` are not the model's, by their keys, shapes and dtypes."""
        check_tensors(self.training.constants.shapes, united(params, buffers))
        if not params:
            raise StateError("params is empty, so there is nothing to train. Unfreeze a parameter: requires_grad=True.")
        for name, tensor in params.items():
            if not (tensor.is_floating_point() or tensor.is_complex()):
                raise StateError(
                    f"params[{name!r}] has dtype {tensor.dtype}, which has no gradient. Put it in buffers."
                )

    def name_of(self, parameter: nn.Parameter) -> str | None:
        """Return the name that a parameter has in the model this was made from; None if it is not of it."""
        reference, name = self._of_caller.get(id(parameter), (None, None))
        return name if reference is not None and reference() is parameter else None


def init_perturbation(model: nn.Module) -> PerturbationTree:
    """Make the perturbation of a first step, for rules of gradients: zero for every BN layer in training mode.

    Args:
        model: a module with BN layers in training mode.

    Returns:
        `(C,)` each, in the dtype of the model's statistics.

    Raises:
        ModelError: there is no such layer.
    """
    check_model(model)
    layers = {name: layer.num_features for name, layer in training_layers(model).items()}
    return zero_perturbation(layers, *statistics_kind(dict(model.named_parameters()) or dict(named_tensors(model))))


def check_call(fmodel: FunctionalModel, loss_fn: LossFunction, params: Tensors, buffers: Tensors) -> Tensors:
    """Raise an ApartError if a pass cannot be run; return the parameters to run it with, see `follow_parameters`."""
    if not isinstance(fmodel, FunctionalModel):
        raise ModelError(f"fmodel is a {type(fmodel).__name__}; expected what functionalize(model) returns.")
    fmodel.update()
    module = fmodel.training.module
    if not fmodel.layers:
        raise no_training_layer(type(module).__name__, len(batch_norm_layers(module)))
    check_loss_function(loss_fn)
    if not is_compiling() and torch.is_inference_mode_enabled():  # Dynamo cannot ask
        raise UsageError("inference_mode is on, and no gradient exists there. Leave it; no_grad is fine.")
    fmodel.check_state(params, buffers)
    return follow_parameters(params)
