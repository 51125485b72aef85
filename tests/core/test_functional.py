"""The way in and out of a module's state, and the model as a function."""

import copy
import gc
import threading
from types import CodeType, FunctionType, ModuleType
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from small import convolutional, images
from torch import Tensor, nn

from apart_func import functionalize, make_apart_step, split_state


def test_what_requires_gradients_is_params_and_everything_else_buffers_in_the_memory_of_the_model() -> None:
    model = convolutional()
    model[4].weight.requires_grad_(False)
    params, buffers = split_state(model)
    assert list(params) == [name for name, p in model.named_parameters() if p.requires_grad]
    assert buffers.keys() == {"4.weight", *(name for name, _ in model.named_buffers())}
    assert not any(tensor.requires_grad for tensor in (params | buffers).values())
    with torch.no_grad():
        model[8].bias.add_(1)
    assert torch.equal(params["8.bias"], model[8].bias)


def test_any_split_of_the_state_is_valid() -> None:
    """A split is a choice of the caller: what is in params is differentiated, nothing else."""
    model = convolutional()
    params, buffers = split_state(model)
    step = make_apart_step(model, F.cross_entropy)
    whole = step(params, buffers, images())
    head = {name: params[name] for name in ("8.weight", "8.bias")}
    rest = {**buffers, **{name: p for name, p in params.items() if name not in head}}
    part = step(head, rest, images())
    assert part.grads.keys() == head.keys()
    torch.testing.assert_close(part.grads, {name: whole.grads[name] for name in head})
    torch.testing.assert_close(part.stat_grads, whole.stat_grads)
    assert torch.equal(part.buffers["0.weight"], params["0.weight"])


@pytest.mark.parametrize("training", [False, True])
def test_a_functional_model_computes_what_the_module_does(training: bool) -> None:
    model = convolutional()
    fmodel = functionalize(model)
    params, buffers = split_state(model)
    x, _ = images()
    state = copy.deepcopy(model.state_dict())
    output = fmodel(params, buffers, x, training=training)
    torch.testing.assert_close(dict(model.state_dict()), dict(state), rtol=0, atol=0)
    torch.testing.assert_close(output, model.train(training)(x))


def test_a_functional_model_can_be_differentiated() -> None:
    model = convolutional().train()
    fmodel = functionalize(model)
    params, buffers = split_state(model)
    x, y = images()
    slopes = torch.func.grad(lambda p: F.cross_entropy(fmodel(p, buffers, x), y))(params)
    model.eval()
    F.cross_entropy(model(x), y).backward()
    torch.testing.assert_close(slopes, {name: p.grad for name, p in model.named_parameters()})


def reachable_tensors(thing: Any) -> list[Tensor]:
    """Every tensor that an object holds on to, through whatever attribute, container, cell or thread-local."""
    waiting, seen, found = [thing], set(), []
    while waiting:
        one = waiting.pop()
        if id(one) in seen or isinstance(one, type | ModuleType | CodeType):
            continue
        seen.add(id(one))
        if isinstance(one, Tensor):
            found.append(one)
            continue
        if isinstance(one, FunctionType):
            waiting += [cell.cell_contents for cell in one.__closure__ or ()] + list(one.__defaults__ or ())
            continue
        if isinstance(one, threading.local):
            waiting.append(vars(one))
        waiting += gc.get_referents(one)
    return found


def test_a_functional_model_owns_no_tensor_before_and_after_it_was_used() -> None:
    model = convolutional()
    state, step = split_state(model), make_apart_step(model, F.cross_entropy, groups=2)
    shared = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    del model  # whose changes it sees as long as it lives
    gc.collect()
    assert not reachable_tensors(step)
    out = step(*state, images())
    step.fmodel(*state, images()[0])
    held = reachable_tensors(step)
    assert not held, f"{len(held)} tensors stay in the step, {[tuple(tensor.shape) for tensor in held]}"
    assert not shared & {tensor.untyped_storage().data_ptr() for tensor in out.buffers.values()}


class Alarm(nn.Module):
    """Raises when the module of a user is run, and not when a copy is."""

    users: ClassVar[set[int]] = set()

    def forward(self, x: Tensor) -> Tensor:
        assert id(self) not in self.users, "the user's own model was run"
        return x


def test_the_users_own_model_is_never_run_and_may_be_gone() -> None:
    model = nn.Sequential(Alarm(), convolutional()).double()
    step, state = make_apart_step(model, F.cross_entropy, groups=2), split_state(convolutional())
    params, buffers = ({f"1.{name}": tensor for name, tensor in part.items()} for part in state)
    expected = step(params, buffers, images())
    Alarm.users.add(id(model[0]))
    torch.testing.assert_close(step(params, buffers, images())._asdict(), expected._asdict(), rtol=0, atol=0)
    step.fmodel(params, buffers, images()[0])
    del model
    gc.collect()
    torch.testing.assert_close(step(params, buffers, images())._asdict(), expected._asdict(), rtol=0, atol=0)


def test_a_lazy_model_works_after_one_forward() -> None:
    model = nn.Sequential(nn.LazyConv2d(4, 3), nn.LazyBatchNorm2d(), nn.Flatten(), nn.LazyLinear(3)).double()
    x, y = images()
    model(x)
    out = make_apart_step(model, F.cross_entropy, epsilon=0.0)(*split_state(model), (x, y))
    F.cross_entropy(model(x), y).backward()
    torch.testing.assert_close(out.grads, {name: p.grad for name, p in model.named_parameters()})
