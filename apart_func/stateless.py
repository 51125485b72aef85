"""A copy of a model that owns no tensor, and borrows the caller's for the time of a call."""

from __future__ import annotations  # Dynamo of old versions traces those of inner functions

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from apart_func._torch import Constants
from apart_func.autodiff import Proof
from apart_func.errors import ModelError
from apart_func.intercept import Interception, batch_norm_layers, is_stock
from apart_func.snapshot import HiddenTensors, Snapshot, copy_model, named_tensors
from apart_func.state import check_tensors
from apart_func.trees import Tensors


class StatelessModule:
    """A copy, `module`, of a model, whose tensors are the caller's while a call runs, and none otherwise."""

    def __init__(self, model: nn.Module) -> None:
        layers = {name: layer for name, layer in batch_norm_layers(model).items() if layer.training}
        memo = {id(tensor): _MissingTensor(name) for name, tensor in named_tensors(model)}
        self.first = _first_names(model)
        self._momenta = {name: layer.momentum for name, layer in layers.items()}
        self.constants: Any = Constants(
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
        self.proof = Proof()
        self.snapshot = Snapshot(self.module)

    def evaluating(self) -> StatelessModule:
        """Return a copy in evaluation mode."""
        made = object.__new__(StatelessModule)
        made.__setstate__(self.__getstate__() | {"module": copy_model(self.module).eval()})
        made.hidden = self.hidden
        return made

    def replace_buffer(self, layer: str, old: Tensor, new: Tensor) -> None:
        """Give a buffer that a layer uses a new value in every place that holds it; a ModelError says if none does."""
        own = self.layers[layer]._buffers
        names = [self.first[f"{layer}.{key}" if layer else key] for key, buffer in own.items() if buffer is old]
        names = names or [name for name, [(register, key), *_] in self._places.items() if register[key] is old]
        if not names:
            raise ModelError(
                f"layer {layer!r} passes running statistics to F.batch_norm that are no buffers of the model, so their "
                "new values could not be returned. Register them as buffers, and pass these."
            )
        for register, key in self._places[names[0]]:
            register[key] = new

    def buffers(self, before: Mapping[str, Tensor]) -> Tensors:
        """Return the buffers as the forward has left them, keyed as those before; to be called while the call runs."""
        after = {name: self._places[name][0][0][self._places[name][0][1]] for name in before}
        check_tensors({name: tuple(buffer.shape) for name, buffer in before.items()}, after)
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
