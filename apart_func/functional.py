"""A model as a function of its tensors: `functionalize`, and the way in and out of a module's state.

`functionalize` keeps a private copy of the model that owns no tensor. `torch.func.functional_call` lends it the
caller's parameters and buffers for the time of a call, in which the loss is computed *and* differentiated, so that a
layer that is run once more during the backward finds its tensors. The caller's model is never run.
"""

from __future__ import annotations  # Dynamo of old versions traces those of inner functions

import copy
import threading
import weakref
from collections.abc import Callable, Mapping
from functools import cache
from types import FunctionType, MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.parameter import is_lazy

from apart_func._torch import Constants, copies_together, is_compiling, is_traced, register_einops
from apart_func.distributed import synchronisation
from apart_func.errors import ModelError, StateError, UsageError
from apart_func.intercept import Handler, Route, Site, check_unmixed, is_stock, training_layers
from apart_func.layer import perturbed_batch_norm
from apart_func.layer.affine import Parameters, affine
from apart_func.running import watch
from apart_func.trees import Perturbation, Tensors, check_by_name


def split_state(model: nn.Module) -> tuple[Tensors, Tensors]:
    """Take a model's state as `params`, which are trained, and `buffers`, which are not.

    Parameters with `requires_grad=False` count as buffers, tied ones appear once under their first name. The tensors
    are detached and share memory with the model's, so an optimizer that updates the model in place is seen in them.

    Returns:
        `params` and `buffers`, keyed as in `named_parameters()` and `named_buffers()`.

    Example:
        >>> params, buffers = split_state(nn.BatchNorm2d(3))
        >>> list(params), list(buffers)
        (['weight', 'bias'], ['running_mean', 'running_var', 'num_batches_tracked'])
    """
    check_model(model)
    params = {name: tensor.detach() for name, tensor in model.named_parameters() if tensor.requires_grad}
    frozen = {name: tensor.detach() for name, tensor in model.named_parameters() if not tensor.requires_grad}
    return params, frozen | {name: tensor.detach() for name, tensor in model.named_buffers()}


@torch.no_grad()
def load_state_(model: nn.Module, params: Mapping[str, Tensor], buffers: Mapping[str, Tensor]) -> None:
    """Copy `params` and `buffers` into a model, in place; the inverse of `split_state`.

    Wrappers make no difference: `module.` of DistributedDataParallel and `_orig_mod.` of torch.compile may stand in the
    names of the model, of the tensors, of both or of none.

    Raises:
        StateError: keys are missing or unexpected, or a shape differs; the model is then unchanged.
    """
    check_model(model)
    targets = unwrapped_names(dict(named_tensors(model)))
    tensors = unwrapped_names(_united(params, buffers))
    _check_tensors({name: tuple(target.shape) for name, target in targets.items()}, tensors)
    for name, target in targets.items():
        target.copy_(tensors[name])


def assign_grads_(model: nn.Module, grads: Mapping[str, Tensor]) -> None:
    """Set the `.grad` of a model's parameters, in place, for a `torch.optim` optimizer to use.

    Args:
        model: the module whose parameters get gradients, wrapped or not, as in `load_state_`.
        grads: gradients keyed by parameter name, such as `out.grads`. Parameters without a key lose their gradient.

    Raises:
        StateError: a key names no parameter, or a shape differs; the model is then unchanged.
    """
    check_model(model)
    check_by_name("grads", grads)
    targets = dict(model.named_parameters())
    if not all(name in targets for name in grads):
        targets, grads = unwrapped_names(targets), unwrapped_names(grads)
    _check_tensors({name: tuple(targets[name].shape) for name in grads if name in targets}, grads)
    for name, target in targets.items():
        target.grad = grads[name].to(target.dtype) if name in grads else None


WRAPPERS = ("module", "_orig_mod", "_fsdp_wrapped_module")


def unwrapped_names(named: Mapping[str, Any]) -> dict[str, Any]:
    """The same, without the parts of names that wrappers of models add; as it is where two would become one."""
    plain = {".".join(part for part in name.split(".") if part not in WRAPPERS): value for name, value in named.items()}
    return plain if len(plain) == len(named) else dict(named)


LossFunction = Callable[[Any, Any], Tensor]


def call_module(module: Callable[..., Any], inputs: Any) -> Any:
    """Run a model on the input of a batch: a tuple or list is splatted, a mapping passed as keywords."""
    if isinstance(inputs, (tuple, list)):
        return module(*inputs)
    if isinstance(inputs, Mapping):
        return module(**inputs)
    return module(inputs)


def check_loss_function(loss_fn: Any) -> None:
    """Make sure that a loss function can be called.

    Raises:
        UsageError: it cannot.
    """
    if not callable(loss_fn):
        raise UsageError(
            f"loss_fn is a {type(loss_fn).__name__}; expected a function (output, target) -> scalar, such as "
            "torch.nn.functional.cross_entropy."
        )


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


def functionalize(model: nn.Module) -> FunctionalModel:
    """Make a function of `params` and `buffers` from a model. Its layers keep the modes they have now.

    Raises:
        ModelError: the model cannot be copied, has no BN layer in training mode, or two that share running statistics.
    """
    return FunctionalModel(model)


def as_functional(model: nn.Module | FunctionalModel) -> FunctionalModel:
    """A model as a function, if it is not one already."""
    return model if isinstance(model, FunctionalModel) else functionalize(model)


def counted_layers(count: int) -> str:
    """How a model's BN layers are counted in words."""
    return f"{count} batch-norm layer{'' if count == 1 else 's'}"


class FunctionalModel:
    """A model without state: `fmodel(params, buffers, *inputs)` evaluates it, and the passes train it.

    It is a value: it can be copied, pickled, and called from several threads at once. Every thread has a copy of the
    model of its own, and what is compiled has a fixed one.
    """

    def __init__(self, model: nn.Module) -> None:
        check_model(model)
        _check_own_statistics(training_layers(model))
        self._constants = Constants(
            layers={name: layer.num_features for name, layer in training_layers(model).items()},
            shapes={name: tuple(tensor.shape) for name, tensor in named_tensors(model)},
            moving=tuple(name for name, buffer in model.named_buffers() if buffer.is_floating_point()),
        )
        self._aliases = _all_names(model)
        self._momenta = {name: layer.momentum for name, layer in training_layers(model).items()}
        self._module = _copy_without_tensors(model)
        self._of_caller = {id(p): (weakref.ref(p), name) for name, p in model.named_parameters()}
        self._prepare()

    @property
    def layers(self) -> dict[str, int]:
        """The channels of the BN layers that the method perturbs, by name."""
        return self._constants.layers  # type: ignore[return-value]  # attributes of a module have no types of their own

    @property
    def moving(self) -> tuple[str, ...]:
        """Names of the buffers that a forward may move away from those of other ranks: those of floating point."""
        return self._constants.moving  # type: ignore[return-value]  # attributes of a module have no types of their own

    def modules(self) -> list[nn.Module]:
        """The BN layers that the method perturbs, of a copy that holds no tensor."""
        return self._modules

    def _prepare(self) -> None:
        register_einops()
        self._fixed = _Template(self._module, self._aliases, self._momenta, eager=False)
        self._of_threads = threading.local()
        self._modules = [self._module.get_submodule(name) for name in self.layers]

    def __getstate__(self) -> dict[str, Any]:
        made_anew = ("_fixed", "_of_threads", "_of_caller", "_modules")
        return {key: value for key, value in vars(self).items() if key not in made_anew}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _of_caller={})
        self._prepare()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({type(self._module).__name__}, {counted_layers(len(self.layers))})"

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

        def forward(template: _Template) -> Any:
            return template.module(*inputs, **keywords)

        return self.run(tensors, _plain_batch_norm if training else None, forward)

    def run(self, tensors: Tensors, handler: Handler | None, function: Callable[[_Template], Any]) -> Any:
        """Call a function while a copy of the model holds some tensors, and its batch norm goes to a handler.

        Args:
            tensors: parameters and buffers by name; the buffers are copied, since a forward may change them.
            handler: of batch norm; None evaluates the model.
            function: of the template whose `module` can be called.

        Returns:
            What the function returns.
        """
        return self._template(evaluates=handler is None).run(tensors, handler, function)

    def check_state(self, params: Mapping[str, Tensor], buffers: Mapping[str, Tensor]) -> Tensors:
        """Unite `params` and `buffers` after a look at their keys, shapes and dtypes.

        Raises:
            StateError: keys are missing or unexpected, a shape differs, or there is nothing to train.
        """
        tensors = _united(params, buffers)
        shapes: Any = self._constants.shapes
        _check_tensors(shapes, tensors)
        if not params:
            raise StateError("params is empty, so there is nothing to train. Unfreeze a parameter: requires_grad=True.")
        for name, tensor in params.items():
            if not (tensor.is_floating_point() or tensor.is_complex()):
                raise StateError(
                    f"params[{name!r}] has dtype {tensor.dtype}, which has no gradient. Put it in buffers."
                )
        return tensors

    def check_unmixed(self) -> None:
        """Make sure that no layer normalises samples of all groups together; see `intercept.check_unmixed`."""
        check_unmixed(self._module)

    def name_of(self, parameter: nn.Parameter) -> str | None:
        """The name that a parameter has in the model this was made from; None where it is not of it."""
        reference, name = self._of_caller.get(id(parameter), (None, None))
        return name if reference is not None and reference() is parameter else None

    def _template(self, evaluates: bool) -> _Template:
        if is_compiling() and not evaluates:
            return self._fixed
        kind = "evaluation" if evaluates else "training"
        template: _Template | None = getattr(self._of_threads, kind, None)
        if template is None:
            module = copy_model(self._module)
            template = _Template(module.eval() if evaluates else module, self._aliases, self._momenta, eager=True)
            setattr(self._of_threads, kind, template)
        return template


class _Template:
    """A copy of a model that owns no tensor, and borrows the caller's for the time of a call.

    Attributes:
        module: the copy.
        route: of its batch norm.
        checked: whether a loss was looked through for parameters that its forward reaches past the arguments. What a
            loss function reaches is looked for in every call.
    """

    def __init__(
        self, module: nn.Module, aliases: Mapping[str, str], momenta: Mapping[str, float | None], eager: bool
    ) -> None:
        self.module, self.checked = module, False
        layers: dict[str, Any] = {name: module.get_submodule(name) for name in momenta}
        for layer in layers.values():
            if not is_stock(layer) and layer.momentum is None:
                layer.momentum = 0.0  # None would make its forward read a counter, which no tracing allows
        self.route = Route(layers, momenta)
        if eager:
            watch(layers, self.route)
        self._program = _Program(module)
        self._aliases = [(f"module.{place}", name) for place, name in aliases.items()]
        registers = {name: owner._buffers for name, owner in module.named_modules()}
        self._buffers = {
            name: (registers[place.rpartition(".")[0]], place.rpartition(".")[2])
            for place, name in aliases.items()
            if place == name and place.rpartition(".")[2] in registers[place.rpartition(".")[0]]
        }
        self._layers = layers
        self._lent: dict[str, tuple[Tensor, int]] = {}
        self._modes = [(layer, layer.training) for layer in layers.values()]

    def run(self, tensors: Tensors, handler: Handler | None, function: Callable[[_Template], Any]) -> Any:
        """See `FunctionalModel.run`."""
        held = {**tensors, **self._copies(tensors)}
        lent = {place: held[name] for place, name in self._aliases}
        try:
            result = functional_call(self._program, lent, (function, self, handler), tie_weights=False)
        finally:
            self._lent = {}
            for layer, mode in self._modes:
                if layer.training != mode:  # a forward may freeze its layers; the next call begins as this one
                    layer.training = mode
        if handler is not None and not self.route.reached:
            raise ModelError(
                f"the forward of {type(self.module).__name__} called none of its {len(self._modes)} batch-norm layers "
                "in training mode, so there is nothing to perturb. Do not replace layers after functionalize, or "
                "reach them in another way than through the model's attributes."
            )
        return result

    def _copies(self, tensors: Tensors) -> Tensors:
        """Copies of the buffers for a forward to change."""
        buffers = {name: tensors[name] for name in self._buffers}
        if is_traced():
            return {name: buffer.clone() for name, buffer in buffers.items()}
        self._lent = {name: (copy, copy._version) for name, copy in copies_together(buffers).items()}
        return {name: copy for name, (copy, _) in self._lent.items()}

    def affine_parameters(self) -> dict[str, Parameters]:
        """γ and β of the layers that are perturbed, by name; to be asked while the call runs."""
        return {name: Parameters(layer.weight, layer.bias) for name, layer in self._layers.items()}

    def buffers(self, before: Mapping[str, Tensor]) -> Tensors:
        """The buffers as the forward has left them, keyed as those before; to be asked while the call runs."""
        after = {name: register[key] for name, (register, key) in self._buffers.items()}
        if is_traced():
            return {name: after.get(name, tensor) for name, tensor in before.items()}
        for name, value in after.items():
            copy, version = self._lent[name]
            if value is not copy:
                after[name] = value.detach()
            elif value._version == version:
                after[name] = before[name]
            else:  # a copy may share its memory with others
                after[name] = value.detach().clone()
        return {name: after.get(name, tensor) for name, tensor in before.items()}


class _Program(nn.Module):
    """A model whose forward is any function of it, so that one `functional_call` spans a forward and its backward."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, function: Callable[[_Template], Any], template: _Template, handler: Handler | None) -> Any:
        if handler is None:
            return function(template)
        template.route.open(handler)
        try:
            return function(template)
        finally:
            template.route.close()


class _Absent:
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


def named_tensors(module: nn.Module) -> list[tuple[str, Tensor]]:
    """Parameters and buffers, each once, by its first name."""
    return [*module.named_parameters(), *module.named_buffers()]


def _all_names(model: nn.Module) -> dict[str, str]:
    """Every place of a parameter or buffer, and the first name of the tensor that is there."""
    first = {id(tensor): name for name, tensor in named_tensors(model)}
    places = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return {place: first[id(tensor)] for place, tensor in places}


def _copy_without_tensors(model: nn.Module) -> nn.Module:
    """Copy a model with empty places in its registers, and an `_Absent` wherever else a tensor of it is."""
    module = copy_model(model, {id(tensor): _Absent(name) for name, tensor in named_tensors(model)})
    for submodule in module.modules():
        for register in (submodule._parameters, submodule._buffers):
            for key in register:
                register[key] = None
    return module


def copy_model(model: nn.Module, copies: dict[int, Any] | None = None) -> nn.Module:
    """Copy a model. Its hooks stay the caller's objects, but for methods of modules in it.

    Args:
        model: any module.
        copies: what stands for an object in the copy, by the object's id.

    Raises:
        ModelError: it cannot be copied.
    """
    check_model(model)
    for name, module in model.named_modules():
        _check_forward(name, module)
    memo: dict[int, Any] = {} if copies is None else dict(copies)
    for module in model.modules():  # a SyncBatchNorm says over which ranks
        group = vars(module).get("process_group")
        if group is not None:
            memo[id(group)] = group
    try:
        return _copied(model, memo)
    except Exception as error:
        raise ModelError(
            f"{type(model).__name__} cannot be copied ({error}). Replace old-style weight_norm and spectral_norm by "
            "those in torch.nn.utils.parametrizations, and pass the module that a wrapper such as "
            "DistributedDataParallel holds."
        ) from error


HOOKS = frozenset(
    name
    for name, value in vars(nn.Module()).items()
    if name.endswith("_hooks") or (name.startswith("_") and "hooks_" in name)
)


def _copied(model: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """`copy.deepcopy` of a model, without what takes it long: a dozen empty dicts in every module."""
    modules = list(model.modules())
    kinds: set[Any] = {type(module) for module in modules}
    plain = all(_copies_plainly(kind) for kind in kinds)
    if plain:
        for module in modules:
            memo[id(module)] = module.__class__.__new__(module.__class__)
    for module in modules:
        for hooks in HOOKS:
            for hook in vars(module).get(hooks, {}).values():
                if not (isinstance(hook, MethodType) and isinstance(hook.__self__, nn.Module)):
                    memo.setdefault(id(hook), hook)
    if not plain:
        return copy.deepcopy(model, memo)
    for module in modules:
        state = vars(memo[id(module)])
        for key, value in vars(module).items():
            if value is None or isinstance(value, (bool, int, float, str)) or (not value and key in HOOKS):
                state[key] = copy.copy(value) if key in HOOKS else value
            else:
                state[key] = copy.deepcopy(value, memo)
    made: nn.Module = memo[id(model)]
    return made


@cache
def _copies_plainly(kind: type) -> bool:
    """Whether a copy of a module is a copy of its attributes."""
    special = ("__deepcopy__", "__copy__", "__reduce__", "__reduce_ex__", "__getstate__", "__getnewargs__", "__slots__")
    ours = [base for base in kind.__mro__ if base not in (nn.Module, object)]
    states = [base for base in ours if "__setstate__" in vars(base) and base.__module__.partition(".")[0] != "torch"]
    return not states and not any(name in vars(base) for base in ours for name in special)


def _check_forward(name: str, module: nn.Module) -> None:
    """Make sure that a forward that was put on a module does not reach the caller's own modules."""
    held = _modules_held_by(vars(module).get("forward"))
    if held:
        raise ModelError(
            f"the forward of layer {name!r} ({type(module).__name__}) was replaced by a function that holds "
            f"{type(held[0]).__name__}, a module of its own, so a copy of the layer would still run the original. "
            "Override forward in a subclass, or wrap the layer in a module."
        )


def _modules_held_by(function: Any) -> list[nn.Module]:
    """The modules that a function closes over, or is partially applied to."""
    if not isinstance(function, FunctionType):
        function = getattr(function, "func", None)
        if function is None:
            return []
    values: list[Any] = [*(function.__defaults__ or ())] if isinstance(function, FunctionType) else [function]
    for cell in getattr(function, "__closure__", None) or ():
        try:
            values.append(cell.cell_contents)
        except ValueError:  # not yet filled
            continue
    found = [getattr(value, "__self__", value) for value in values]
    return [value for value in found if isinstance(value, nn.Module)]


def _plain_batch_norm(site: Site, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    reduce = synchronisation(site.layer, x, 1)
    if reduce is None:
        return F.batch_norm(x, None, None, weight, bias, True, 0.0, eps)
    zero = x.new_zeros(x.shape[1])
    return perturbed_batch_norm(x, affine(x, Parameters(weight, bias), Perturbation(zero, zero), 1), eps, 1, reduce)[0]


def check_model(model: Any) -> None:
    """Make sure that a model is one, with tensors that have a shape.

    Raises:
        ModelError: it is no module, or has lazy layers.
    """
    if not isinstance(model, nn.Module):
        what = f"the class {model.__name__}" if isinstance(model, type) else f"a {type(model).__name__}"
        raise ModelError(f"the model is {what}; expected a torch.nn.Module, such as resnet18().")
    lazy = [name for name, tensor in named_tensors(model) if is_lazy(tensor)]
    if lazy:
        raise ModelError(f"{lazy[0]!r} has no shape yet: the model has lazy layers. Run one forward on a batch first.")


def _check_own_statistics(layers: Mapping[str, nn.Module]) -> None:
    owners: dict[int, str] = {}
    for name, layer in layers.items():
        for key, buffer in layer.named_buffers(recurse=False):
            first = owners.setdefault(id(buffer), name)
            if first != name:
                raise ModelError(
                    f"layers {first!r} and {name!r} share their {key}, which as a value can follow only one of them. "
                    "Give each its own, use one layer twice, or take the drop-in APART, which moves it in place."
                )


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
