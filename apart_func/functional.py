"""A model as a function of its tensors: `functionalize`, and the way in and out of a module's state.

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
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.weak import WeakIdKeyDictionary

from apart_func._torch import Constants, is_compiling, is_concrete
from apart_func.autodiff import is_unreached
from apart_func.errors import BatchError, ModelError, StateError, UsageError
from apart_func.intercept import (
    BatchNormCall,
    Handler,
    Interception,
    batch_norm_layers,
    check_unmixed,
    is_stock,
    no_training_layer,
    training_layers,
)
from apart_func.kernels import perturbed_batch_norm
from apart_func.ranks import synchronisation
from apart_func.snapshot import HiddenTensors, Snapshot, check_model, copy_model, named_tensors, signature
from apart_func.trees import Tensors, check_named_tensors

LossFunction = Callable[[Any, Any], Any]


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
        _PARAMETER_OF[tensor] = weakref.ref(model.get_parameter(name))
    frozen = {name: tensor.detach() for name, tensor in model.named_parameters() if not tensor.requires_grad}
    return params, frozen | {name: tensor.detach() for name, tensor in model.named_buffers()}


# The parameter whose memory a tensor of `split_state` shares.
_PARAMETER_OF: Any = WeakIdKeyDictionary()


def follow_parameters(params: Mapping[str, Tensor]) -> Tensors:
    """Return the same tensors, but for those of `split_state` whose parameters have other memory now."""
    found = dict(params)
    for name, tensor in params.items():
        if isinstance(tensor, Tensor) and is_concrete(tensor):
            reference = _PARAMETER_OF.get(tensor)
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
    _united(params, buffers)  # which refuses what are no dicts
    tensors = unwrapped_names({**follow_parameters(params), **buffers})
    _check_tensors({name: tuple(target.shape) for name, target in targets.items()}, tensors)
    for name, target in targets.items():
        _check_copy(name, tensors[name], target)
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
    _check_tensors({name: tuple(targets[name].shape) for name in grads if name in targets}, grads)
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
    if tensor.is_meta and not target.is_meta:
        raise StateError(f"{name!r} is on the meta device, where tensors have no values. Pass one that has.")
    if tensor.is_complex() and not target.is_complex():
        raise StateError(f"{name!r} is complex, and the model's is {target.dtype}: its imaginary part would be lost.")


WRAPPERS = ("module", "_orig_mod", "_fsdp_wrapped_module")


def unwrapped_names(named: Mapping[str, Any]) -> dict[str, Any]:
    """Drop the parts of names that wrappers of models add; names stay as they are if two would become one."""
    plain = {".".join(part for part in name.split(".") if part not in WRAPPERS): value for name, value in named.items()}
    return plain if len(plain) == len(named) else dict(named)


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
    """Make sure, after an error, that a model's forward takes the arguments that the input of a batch makes.

    Raises:
        BatchError: it does not.
    """
    if not is_compiling() and not _takes(module, args, kwargs):
        raise BatchError(
            f"the model's forward does not take the input: {error}. A tuple or list is splatted into the model, and a "
            "mapping is passed as keywords. For a forward of one argument that is itself a list, tuple or dict, wrap "
            "it: batch = ((input,), target)."
        ) from error


def _takes(module: Any, args: Any, kwargs: Any) -> bool:
    """Return whether a module's forward can be called with some arguments."""
    try:
        inspect.signature(getattr(module, "forward", module)).bind(*args, **kwargs)
    except TypeError:
        return False
    except ValueError:  # it has no signature
        return True
    return True


def check_loss_function(loss_fn: Any) -> None:
    """Make sure that a loss function is one of output and target.

    Raises:
        UsageError: it cannot be called, or is a class.
    """
    if not callable(loss_fn) or (isinstance(loss_fn, type) and issubclass(loss_fn, nn.Module)):
        given = f"the class {loss_fn.__name__}" if isinstance(loss_fn, type) else f"a {type(loss_fn).__name__}"
        raise UsageError(
            f"loss_fn is {given}; expected a function (output, target) -> scalar, such as "
            "torch.nn.functional.cross_entropy or nn.CrossEntropyLoss()."
        )


def scalar_loss(loss: Any) -> Tensor:
    """Return what a loss function returned, if it can be differentiated.

    Raises:
        UsageError: it is no scalar.
    """
    if not isinstance(loss, Tensor) or loss.dim() != 0 or not loss.is_floating_point():
        given = f"a {loss.dtype} tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else repr(type(loss))
        raise UsageError(
            f"loss_fn returned {given}; expected a 0-d floating-point tensor. Reduce it, e.g. loss.mean()."
        )
    return loss


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
        self._source: weakref.ref[nn.Module] | None = weakref.ref(model)
        self._take(model)
        self._lock = threading.RLock()

    def _take(self, model: nn.Module) -> None:
        """Copy the model as it is now."""
        self._signature = signature(model)
        self._training = StatelessModule(model)
        self._evaluation: StatelessModule | None = None
        self.coupled: dict[Any, tuple[Any, bool]] = {}  # what one pass has seen of losses
        self._of_caller = {id(p): (weakref.ref(p), name) for name, p in model.named_parameters()}

    @property
    def layers(self) -> dict[str, int]:
        """The channels of the BN layers that the method perturbs, by name."""
        return self._training.constants.layers  # type: ignore[return-value]  # attributes of a module have no types

    @property
    def moving(self) -> tuple[str, ...]:
        """Names of the buffers that a forward may move away from those of other ranks: those of floating point."""
        return self._training.constants.moving  # type: ignore[return-value]  # attributes of a module have no types

    def modules(self) -> list[nn.Module]:
        """Return the BN layers that the method perturbs, of a copy that holds no tensor."""
        return list(self._training.layers.values())

    @property
    def training(self) -> StatelessModule:
        """The copy that the passes run."""
        return self._training

    def __getstate__(self) -> dict[str, Any]:
        return {"_training": self._training, "_source": None, "_evaluation": None, "_of_caller": {}, "coupled": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _lock=threading.RLock())

    def __repr__(self) -> str:
        return f"{type(self).__name__}({type(self._training.module).__name__}, {counted_layers(len(self.layers))})"

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
        handler = _PlainBatchNorm() if training else None
        return self.run(params, buffers, handler, lambda stateless: stateless.module(*inputs, **keywords))

    def update(self) -> None:
        """Take over what the caller has changed on the model since it was copied. A compiler sees none of it."""
        if is_compiling() or self._source is None:
            return
        model = self._source()
        if model is not None:
            with self._lock:
                if self._signature != signature(model):
                    check_model(model)
                    self._take(model)

    def run(
        self,
        params: Mapping[str, Tensor],
        buffers: Mapping[str, Tensor],
        handler: Handler | None,
        function: Callable[[StatelessModule], Any],
    ) -> Any:
        """Call a function while a copy of the model holds some tensors, and its batch norm goes to a handler.

        Args:
            params: what is lent as it is, by name.
            buffers: all other tensors by name, of which copies are lent, since a forward may change them.
            handler: of batch norm; None evaluates the model.
            function: of the stateless module, whose `module` can be called.

        Returns:
            What the function returns.
        """
        stateless = self._stateless(handler)
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

    def _stateless(self, handler: Handler | None) -> StatelessModule:
        if handler is not None:
            return self._training
        if self._evaluation is None:
            self._evaluation = self._training.evaluating()
        return self._evaluation

    def check_state(self, params: Mapping[str, Tensor], buffers: Mapping[str, Tensor]) -> None:
        """Make sure that `params` and `buffers` are the model's, by their keys, shapes and dtypes.

        Raises:
            StateError: keys are missing or unexpected, a shape differs, or there is nothing to train.
        """
        shapes: Any = self._training.constants.shapes
        _check_tensors(shapes, _united(params, buffers))
        if not params:
            raise StateError("params is empty, so there is nothing to train. Unfreeze a parameter: requires_grad=True.")
        for name, tensor in params.items():
            if not (tensor.is_floating_point() or tensor.is_complex()):
                raise StateError(
                    f"params[{name!r}] has dtype {tensor.dtype}, which has no gradient. Put it in buffers."
                )

    def check_trains(self) -> None:
        """Make sure that there is a layer to perturb.

        Raises:
            ModelError: all BN layers were put in evaluation mode.
        """
        if not self.layers:
            module = self._training.module
            raise no_training_layer(type(module).__name__, len(batch_norm_layers(module)))

    def check_unmixed(self) -> None:
        """Make sure that no layer normalises samples of all groups together; see `intercept.check_unmixed`."""
        check_unmixed(self._training.module)

    def name_of(self, parameter: nn.Parameter) -> str | None:
        """Return the name that a parameter has in the model this was made from; None if it is not of it."""
        reference, name = self._of_caller.get(id(parameter), (None, None))
        return name if reference is not None and reference() is parameter else None


class StatelessModule:
    """A copy of a model that owns no tensor, and borrows the caller's for the time of a call.

    Attributes:
        module: the copy.
        layers: its BN layers in training mode, by name.
        constants: what a compiler takes as it is.
        is_proven: whether a forward has left its parameters alone, so that later ones get them without a copy.
    """

    def __init__(self, model: nn.Module) -> None:
        layers = {name: layer for name, layer in batch_norm_layers(model).items() if layer.training}
        memo = {id(tensor): _MissingTensor(name) for name, tensor in named_tensors(model)}
        self.first = _first_names(model)
        self._momenta = {name: layer.momentum for name, layer in layers.items()}
        self.constants = Constants(
            layers={name: layer.num_features for name, layer in layers.items()},
            shapes={name: tuple(tensor.shape) for name, tensor in named_tensors(model)},
            moving=tuple(name for name, buffer in model.named_buffers() if buffer.is_floating_point()),
        )
        self.module = copy_model(model, memo)
        self.hidden = HiddenTensors(memo)
        for submodule in self.module.modules():
            for register in (submodule._parameters, submodule._buffers):
                register.update(dict.fromkeys(register))
        self._prepare()

    def __getstate__(self) -> dict[str, Any]:
        return {"module": self.module, "first": self.first, "momenta": self._momenta, "constants": self.constants}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.module, self.constants = state["module"], state["constants"]
        self.first, self._momenta, self.hidden = state["first"], state["momenta"], HiddenTensors({})
        self._prepare()

    def _prepare(self) -> None:
        self.layers: dict[str, Any] = {name: self.module.get_submodule(name) for name in self._momenta}
        self.never_written: set[str] = set()  # statistics that are replaced, of which a compiler needs no copies
        for name, layer in self.layers.items():
            if is_stock(layer):
                places = [f"{name}.{key}" if name else key for key in layer._buffers]
                self.never_written |= {self.first[place] for place in places if place in self.first}
            elif layer.momentum is None:
                layer.momentum = 0.0  # None would make its forward read a counter, which no tracing allows
        self.interception = Interception(self.layers, self._momenta)
        self.interception.install()
        self.runner = _Runner(self.module, self)
        owners = dict(self.module.named_modules())
        # A tensor may stand in several places, and has its new value in all of them.
        self._places: dict[str, list[tuple[dict[str, Any], str]]] = {}
        for place, name in self.first.items():
            owner, _, key = place.rpartition(".")
            register: Any = owners[owner]._buffers if key in owners[owner]._buffers else owners[owner]._parameters
            self._places.setdefault(name, []).append((register, key))
        self.is_proven = False
        self.snapshot = Snapshot(self.module)

    def evaluating(self) -> StatelessModule:
        """Return a copy in evaluation mode."""
        made = object.__new__(StatelessModule)
        made.__setstate__(self.__getstate__() | {"module": copy_model(self.module).eval()})
        made.hidden = self.hidden
        return made

    def replace_buffer(self, layer: str, old: Tensor, new: Tensor) -> None:
        """Give a buffer that a layer uses a new value, in every place that holds it; to be called while the call runs.

        Raises:
            ModelError: it is no buffer of the model.
        """
        own = self.layers[layer]._buffers
        names = [self.first[f"{layer}.{key}" if layer else key] for key in own if own[key] is old]
        names = names or [name for name, [(register, key), *_] in self._places.items() if register[key] is old]
        for register, key in self._places[names[0]] if names else ():
            register[key] = new
        if names:
            return
        raise ModelError(
            f"layer {layer!r} passes running statistics to F.batch_norm that are no buffers of the model, so their new "
            "values could not be returned. Register them as buffers, and pass these."
        )

    def buffers(self, before: Mapping[str, Tensor]) -> Tensors:
        """Return the buffers as the forward has left them, keyed as those before; to be called while the call runs."""
        after = {name: self._places[name][0][0][self._places[name][0][1]] for name in before}
        _check_tensors({name: tuple(buffer.shape) for name, buffer in before.items()}, after)
        return after


class _Runner(nn.Module):
    """A model whose forward is any function of it, so that one `functional_call` spans a forward and its backward."""

    def __init__(self, module: nn.Module, stateless: StatelessModule) -> None:
        super().__init__()
        self.module = module
        vars(self)["stateless"] = stateless

    def forward(self, function: Callable[[StatelessModule], Any]) -> Any:
        return function(vars(self)["stateless"])


class _MissingTensor:
    """Stands where a copied module has a tensor that is no attribute, and complains when it is computed with."""

    def __init__(self, name: str) -> None:
        self.name = name

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Refuse, by the name of the tensor."""
        waiting, name = [*args, *(kwargs or {}).values()], "a tensor"
        while waiting:
            value = waiting.pop()
            if isinstance(value, cls):
                name = repr(value.name)
            elif isinstance(value, (tuple, list)):
                waiting.extend(value)
        raise ModelError(
            f"the model reached {name} through something that is neither a module's attribute nor made of one, so the "
            "caller's tensor could not be put there. Keep it as a module attribute, and read it there."
        )


def _first_names(model: nn.Module) -> dict[str, str]:
    """Return every place of a parameter or buffer, each once, and the first name of the tensor that is there."""
    first = {id(tensor): name for name, tensor in named_tensors(model)}
    return {
        f"{prefix}.{key}" if prefix else key: first[id(tensor)]
        for prefix, module in model.named_modules()
        for register in (module._parameters, module._buffers)
        for key, tensor in register.items()
        if tensor is not None
    }


class _PlainBatchNorm:
    """Batch norm by the statistics of the batch, which moves nothing."""

    mixes = False

    def normalize(self, call: BatchNormCall) -> Tensor:
        """See `intercept.Handler`."""
        x, weight, bias, eps = call.x, call.weight, call.bias, call.eps
        reduce = synchronisation(call.layer, x, 1)
        if reduce is None:
            return F.batch_norm(x, None, None, weight, bias, True, 0.0, eps)
        zero = x.new_zeros(x.shape[1])
        return perturbed_batch_norm(x, weight, bias, zero, zero, eps, 1, reduce).y


def _united(params: Mapping[str, Tensor], buffers: Mapping[str, Tensor]) -> Tensors:
    for kind, tensors in (("params", params), ("buffers", buffers)):
        if not isinstance(tensors, Mapping):
            raise StateError(f"{kind} is a {type(tensors).__name__}; expected a dict of tensors, as of split_state.")
    both = sorted(set(params) & set(buffers))
    if both:
        raise StateError(f"{both} are in params and in buffers. Keep each in one.")
    return {**params, **buffers}


def _check_tensors(expected: Mapping[str, tuple[int, ...]], given: Mapping[str, Tensor]) -> None:
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
