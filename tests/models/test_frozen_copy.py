"""A functional step holds a copy of the model: of any that plain PyTorch trains; later changes to that are seen."""

import copy
import gc
import pickle
import weakref
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from plain import ROUNDING, assert_plain
from small import Parts, convolutional, images
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm
from torch.utils._pytree import tree_map

from apart_func import (
    ModelError,
    StateError,
    assign_grads_,
    functionalize,
    load_state_,
    make_apart_step,
    make_one_pass_step,
    split_state,
)

BATCH = images()

# What can be copied.


class Scaled(nn.Module):
    def __init__(self, prior: Any) -> None:
        super().__init__()
        self.body, self.prior = convolutional(), prior

    def value(self) -> Any:
        prior = self.prior
        return next(iter(prior.values())) if isinstance(prior, dict) else prior[0] if isinstance(prior, list) else prior

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) * torch.as_tensor(self.value())


class ByFunction(nn.Module):
    """Reaches a layer through a function that stands on the module, or in a container there."""

    def __init__(self, is_inside: bool = False) -> None:
        super().__init__()
        self.body = convolutional()
        normalise = lambda x: self.body[1](x)  # noqa: E731  # what users write
        self.normalise: Any = [{"first": (normalise,)}] if is_inside else normalise

    def forward(self, x: Tensor) -> Tensor:
        normalise = self.normalise if callable(self.normalise) else self.normalise[0]["first"][0]
        return self.body[2:](normalise(self.body[0](x)))


def in_list() -> nn.Module:
    """LSTM keeps its weights in a list as well, where they have to be found."""
    parts = {"norm": nn.BatchNorm2d(2), "lstm": nn.LSTM(2, 3, batch_first=True)}
    return Parts(lambda m, x: m.lstm(m.norm(x).flatten(2).transpose(1, 2))[0][:, -1], **parts)


def with_layer(change: Callable[[nn.Module], Any], forwards: int = 0) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        model = convolutional()
        changed = change(model[3])
        model[3] = changed if isinstance(changed, nn.Module) else model[3]
        for _ in range(forwards):
            model(BATCH[0])
        return model

    return build


def compiled_in_place(place: slice, forwards: int) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        model = convolutional()
        (model if place == slice(None) else model[place.start]).compile(backend="eager")
        for _ in range(forwards):
            model(BATCH[0])
        return model

    return build


def twice_registered() -> nn.Module:
    torch.manual_seed(0)
    block = nn.Sequential(nn.Conv2d(2, 2, 3, padding=1), nn.BatchNorm2d(2), nn.ReLU())
    return nn.Sequential(block, block, nn.Flatten(), nn.Linear(32, 3)).double()


def hooked() -> nn.Module:
    model = convolutional()
    model[4].register_forward_hook(lambda layer, inputs, output: output * layer.eps**0.1 + model[1].eps)
    return model


COPIED: dict[str, Callable[[], nn.Module]] = {
    "a tensor": lambda: Scaled(torch.tensor([0.1, 0.2, 0.7]).double()),
    "a 0-d tensor": lambda: Scaled(torch.tensor(0.5).double()),
    "an array": lambda: Scaled(np.array([0.1, 0.2, 0.7])),
    "tensors in a list": lambda: Scaled([torch.tensor([0.1, 0.2, 0.7]).double()]),
    "arrays in a dict": lambda: Scaled({"prior": np.array([0.1, 0.2, 0.7])}),
    "a sparse tensor": lambda: Scaled([0.5, torch.eye(3).to_sparse()]),
    "an expanded tensor": lambda: Scaled(torch.tensor(0.5).double().expand(3)),
    "a function of a layer": ByFunction,
    "a function in a container": lambda: ByFunction(is_inside=True),
    "a hook of a layer": hooked,
    "weights in a list": in_list,
    "parametrized": with_layer(parametrizations.weight_norm),
    "parametrized, used": with_layer(parametrizations.orthogonal, 1),
    "weight_norm": with_layer(weight_norm),
    "weight_norm, used": with_layer(weight_norm, 1),
    # after so many power iterations its vectors stand still, also in the second pass
    "spectral_norm": with_layer(spectral_norm, 200),
    "pruned": with_layer(lambda layer: prune.l1_unstructured(layer, "weight", 0.5)),
    "pruned, used": with_layer(lambda layer: prune.random_structured(layer, "weight", 0.5, dim=0), 1),
    "compiled": compiled_in_place(slice(None), 0),
    "compiled, used": compiled_in_place(slice(None), 1),
    "a part is compiled": compiled_in_place(slice(3, 4), 1),
    "a module under two names": twice_registered,
}
# The second is one of Dynamo itself, whatever it compiles a part of.
quiet = pytest.mark.filterwarnings(
    "ignore:.*(weight_norm|spectral_norm).*deprecated:FutureWarning",
    "ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning",
)


@quiet
@pytest.mark.parametrize("kind", COPIED)
def test_a_model_that_plain_pytorch_trains_is_copied_and_trained_alike(kind: str) -> None:
    assert_plain(lambda: seeded(COPIED[kind]), BATCH)


def seeded(build: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return build()


@quiet
@pytest.mark.parametrize("kind", COPIED)
def test_its_copy_evaluates_with_the_arguments_and_not_with_the_weights_of_the_caller(kind: str) -> None:
    model = seeded(COPIED[kind])
    params, buffers = split_state(model)
    fmodel, half = functionalize(model), {name: tensor / 2 for name, tensor in params.items()}
    found = fmodel(half, buffers, BATCH[0])
    assert not torch.allclose(found, fmodel(params, buffers, BATCH[0]))
    load_state_(model, half, buffers)
    torch.testing.assert_close(found, model.eval()(BATCH[0]).detach(), **ROUNDING)


@pytest.mark.parametrize("place", ["body", "forward"])
def test_a_function_that_holds_somebody_elses_module_is_refused_before_that_one_runs(place: str) -> None:
    model, other = convolutional(), convolutional()
    before = copy.deepcopy(other.state_dict())
    setattr(model[5], place, lambda x: other[4](x))
    with pytest.raises(ModelError, match=r"layer '5' \(ReLU\) is a function that holds .*Make it an attribute"):
        make_apart_step(model, F.cross_entropy)
    torch.testing.assert_close(other.state_dict(), before, rtol=0, atol=0)


def test_a_factory_in_a_container_may_hold_a_module_that_was_replaced() -> None:
    """As in a `qconfig` of quantisation-aware training, whose factories ask the original for its device."""
    model, former = convolutional(), nn.BatchNorm2d(2)
    model.settings = [lambda: next(former.parameters()).device]
    out = make_apart_step(model, F.cross_entropy)(*split_state(model), BATCH)
    assert out.all_finite


def test_a_weak_reference_to_a_module_is_refused_since_a_copy_would_run_the_original() -> None:
    model = convolutional()
    vars(model[5])["previous"] = [weakref.ref(model[4])]
    with pytest.raises(ModelError, match=r"'previous' of layer '5' \(ReLU\) holds a weak reference to a BatchNorm2d"):
        make_apart_step(model, F.cross_entropy)


# What changes afterwards.


@dataclass
class Options:
    power: float = 1.0


class Scheduled(nn.Module):
    """A model with everything that a training script changes as it goes."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.drop = convolutional(), nn.Dropout(0.0)
        self.rate, self.gates, self.options = 0.0, [1.0], {"power": 1.0}
        self.config, self.namespace = (Options(),), SimpleNamespace(power=1.0)
        self.hidden = [torch.ones(3).double()]

    def forward(self, x: Tensor) -> Tensor:
        y = self.drop(self.body(x)) * (1 - self.rate) * self.gates[0] * self.hidden[0]
        return y + self.options["power"] * self.config[0].power * self.namespace.power * y.square()


CHANGES: dict[str, Callable[[Any], Any]] = {
    "a rate": lambda model: setattr(model, "rate", 0.5),
    "a list": lambda model: model.gates.__setitem__(0, 2.0),
    "a dict": lambda model: model.options.update(power=0.1),
    "a tensor in a list": lambda model: model.hidden[0].mul_(2),
    "a dataclass": lambda model: setattr(model.config[0], "power", 0.1),
    "a namespace": lambda model: setattr(model.namespace, "power", 0.1),
    "a class": lambda model: setattr(model.body[5], "__class__", nn.Sigmoid),
    "a momentum": lambda model: setattr(model.body[4], "momentum", 0.5),
    "eps": lambda model: setattr(model.body[4], "eps", 0.1),
    "a mode": lambda model: model.body[4].eval(),
    "dropout": lambda model: setattr(model.drop, "p", 1.0),
    "a hook": lambda model: model.body[5].register_forward_hook(lambda layer, inputs, output: 2 * output),
    "a layer": lambda model: model.body.__setitem__(5, nn.SiLU()),
    "a batch norm": lambda model: model.body.__setitem__(4, nn.BatchNorm2d(5, eps=0.1).double()),
    "a forward": lambda model: setattr(model.body[5], "forward", lambda x: F.silu(x)),
    "requires_grad": lambda model: model.body[8].weight.requires_grad_(False),
}
MAKERS: dict[str, Callable[[nn.Module], Any]] = {
    "two passes": lambda model: make_apart_step(model, F.cross_entropy, groups=2),
    "one pass": lambda model: make_one_pass_step(model, F.cross_entropy, epsilon=0.1, groups=2),
}
every_step = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)


def tensors(step: Any, model: nn.Module) -> dict[str, Any]:
    torch.manual_seed(0)
    return step(*split_state(model), BATCH)._asdict()


@every_step
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_what_a_training_script_changes_is_seen_at_the_next_call_and_not_by_copies(change: Any, make: Any) -> None:
    model = Scheduled()
    step = make(model)
    state, before = split_state(model), tensors(step, model)
    taken = [copy.deepcopy(step), pickle.loads(pickle.dumps(step))]
    change(model)
    after = tensors(step, model)
    torch.testing.assert_close(after, tensors(make(model), model), rtol=0, atol=0)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(after, before)
    for each in taken:
        torch.manual_seed(0)
        torch.testing.assert_close(each(*state, BATCH)._asdict(), before, rtol=0, atol=0)


def test_a_copy_of_a_step_whose_model_has_changed_is_of_the_changed_one() -> None:
    model = Scheduled()
    step = make_apart_step(model, F.cross_entropy)
    model.rate = 0.5
    taken = [copy.deepcopy(step), pickle.loads(pickle.dumps(step))]
    for each in taken:
        torch.testing.assert_close(tensors(each, model), tensors(step, model), rtol=0, atol=0)


def test_a_module_that_is_added_wants_its_parameters() -> None:
    model = convolutional()
    step, state = make_apart_step(model, F.cross_entropy), split_state(model)
    step(*state, BATCH)
    model.append(nn.Linear(3, 3).double())
    with pytest.raises(StateError, match=r"missing \['9.bias', '9.weight'\].*Take them from split_state"):
        step(*state, BATCH)
    assert step(*split_state(model), BATCH).grads.keys() == dict(model.named_parameters()).keys()


@every_step
def test_a_model_in_evaluation_mode_has_no_step_until_it_trains_again(make: Any) -> None:
    model = convolutional()
    step, state = make(model), split_state(model)
    before, twin = tensors(step, model), copy.deepcopy(step)
    model.eval()
    with pytest.raises(ModelError, match=r"none of the 2 batch-norm layers.*Call model.train\(\)"):
        step(*state, BATCH)
    assert twin(*state, BATCH).all_finite  # a copy is of the model as it was
    # evaluation in the middle of training goes on
    torch.testing.assert_close(step.fmodel(*state, BATCH[0]), model(BATCH[0]).detach(), **ROUNDING)
    model.train()
    torch.testing.assert_close(tensors(step, model), before, rtol=0, atol=0)


# What a forward leaves on the copy.


class Keeps(nn.Module):
    """Fills containers and counts, as models do that collect features or losses for somebody to read."""

    def __init__(self) -> None:
        super().__init__()
        self.body = convolutional()
        self.listed: list[Tensor] = []
        self.named: dict[str, Tensor] = {}
        self.unique: set[Tensor] = set()
        self.last: deque[Tensor] = deque()
        self.nested: dict[str, list[Tensor]] = {"deep": []}
        self.fixed: tuple[list[Tensor], ...] = ([],)
        self.calls, self.latest = 0, None

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(x)
        self.listed.append(y)
        self.named[str(self.calls)] = y
        self.unique.add(y)
        self.last.append(y)
        self.nested["deep"].append(y)
        self.fixed[0].append(y)
        self.calls, self.latest = self.calls + 1, y
        ALIVE.append(weakref.ref(y))
        return y * (1 + self.calls)


ALIVE: list[weakref.ref[Tensor]] = []


@every_step
def test_what_a_forward_keeps_is_dropped_with_its_graph_and_every_step_starts_alike(make: Any) -> None:
    model = Keeps()
    step = make(model)
    ALIVE.clear()
    first = tensors(step, model)
    torch.testing.assert_close(tensors(step, model), first, rtol=0, atol=0)
    del first
    gc.collect()
    assert [reference() for reference in ALIVE] == [None] * len(ALIVE) != []
    assert (model.calls, model.listed, model.nested) == (0, [], {"deep": []})  # the caller's own is never run


# Parameters that are not, or no longer, the model's memory.


@every_step
def test_parameters_may_be_copies_of_the_models(make: Any) -> None:
    model = convolutional()
    step, copies = make(model), tree_map(torch.clone, split_state(model))
    torch.manual_seed(0)
    torch.testing.assert_close(step(*copies, BATCH)._asdict(), tensors(step, model), rtol=0, atol=0)


def test_parameters_of_split_state_follow_what_gives_the_model_other_memory() -> None:
    """SAM optimizers put weights back by `p.data = saved`, and load_state_dict(assign=True) replaces parameters."""
    model = convolutional()
    params, buffers = split_state(model)
    step = make_apart_step(model, F.cross_entropy)
    for parameter in model.parameters():
        parameter.data = parameter.data / 2
    out = step(params, buffers, BATCH)
    torch.testing.assert_close(out._asdict(), step(*split_state(model), BATCH)._asdict(), rtol=0, atol=0)
    assign_grads_(model, out.grads)
    torch.optim.SGD(model.parameters(), 0.1).step()
    trained = copy.deepcopy(model.state_dict())
    load_state_(model, params, out.buffers)
    torch.testing.assert_close(model[0].weight.detach(), trained["0.weight"], rtol=0, atol=0)
