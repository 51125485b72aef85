"""The way in and out of a module's state, and the model as a function."""

import copy
import gc
import threading
import warnings
from types import CodeType, FunctionType, ModuleType
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from small import convolutional, images
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

from apart_func import assign_grads_, functionalize, load_state_, make_apart_step, proxy_pass, split_state


def test_what_requires_gradients_is_params_and_everything_else_buffers() -> None:
    model = convolutional()
    model[4].weight.requires_grad_(False)
    params, buffers = split_state(model)
    assert list(params) == [name for name, p in model.named_parameters() if p.requires_grad]
    assert buffers.keys() == {"4.weight", *(name for name, _ in model.named_buffers())}
    assert not any(tensor.requires_grad for tensor in (params | buffers).values())


def test_the_split_state_shares_memory_with_the_model() -> None:
    model = convolutional()
    params, _ = split_state(model)
    with torch.no_grad():
        model[8].bias.add_(1)
    assert torch.equal(params["8.bias"], model[8].bias)


def test_loading_a_split_state_restores_the_model() -> None:
    model, other = convolutional(), convolutional()
    with torch.no_grad():
        for tensor in other.state_dict().values():
            tensor.add_(1)
    identities = {name: id(tensor) for name, tensor in model.named_parameters()}
    load_state_(model, *split_state(other))
    torch.testing.assert_close(dict(model.state_dict()), dict(other.state_dict()), rtol=0, atol=0)
    assert identities == {name: id(tensor) for name, tensor in model.named_parameters()}


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


def test_assigned_gradients_move_the_model_as_the_optimizer_would() -> None:
    model = convolutional()
    params, buffers = split_state(model)
    before = {name: p.clone() for name, p in params.items()}
    out = make_apart_step(model, F.cross_entropy)(params, buffers, images())
    model[0].weight.grad = torch.ones_like(model[0].weight)  # a leftover must not be added to
    assign_grads_(model, out.grads)
    torch.optim.SGD(model.parameters(), lr=0.5).step()
    torch.testing.assert_close(params, {name: before[name] - 0.5 * g for name, g in out.grads.items()})


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


class Sequence(nn.Module):
    """LSTM keeps its weights in a list as well, where they have to be found."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(5)
        self.lstm = nn.LSTM(5, 4, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.lstm(self.norm(x).transpose(1, 2))[0][:, -1]


def parametrized() -> nn.Module:
    layers = [nn.Conv1d(5, 4, 3), nn.Conv1d(4, 4, 2)]
    return nn.Sequential(
        parametrizations.weight_norm(layers[0]),
        nn.BatchNorm1d(4),
        parametrizations.orthogonal(layers[1]),
        nn.AdaptiveAvgPool1d(1),
        nn.Flatten(),
    )


def with_hooks() -> nn.Module:
    """Old-style norms of weights and pruning, which compute a weight in a hook before each forward."""
    layers = [nn.Conv1d(5, 4, 3), nn.Conv1d(4, 4, 2), nn.Linear(4, 4)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch advises parametrizations
        nn.utils.weight_norm(layers[0])
        nn.utils.spectral_norm(layers[1])
    prune.l1_unstructured(layers[2], "weight", 0.5)
    return nn.Sequential(layers[0], nn.BatchNorm1d(4), layers[1], nn.AdaptiveAvgPool1d(1), nn.Flatten(), layers[2])


class Shared(nn.Module):
    """Two layers with the same running statistics, which both move."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.BatchNorm1d(5), nn.BatchNorm1d(5), nn.Linear(5, 4)
        self.second._buffers.update(self.first._buffers)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(self.first(x).tanh()).mean(2))


@pytest.mark.parametrize("make", [Sequence, parametrized, with_hooks, Shared])
def test_models_that_keep_or_compute_their_tensors_elsewhere(make: type[nn.Module]) -> None:
    torch.manual_seed(0)
    model = make().double()
    x, y = torch.randn(6, 5, 7).double(), torch.randint(4, (6,))
    fmodel, (params, buffers) = functionalize(model), split_state(model)
    buffers = {name: buffer.clone() for name, buffer in buffers.items()}
    # The second pass begins with the buffers that the first one left, as spectral_norm's vectors.
    whole = make_apart_step(fmodel, F.cross_entropy, epsilon=0.0)(params, buffers, (x, y))
    first = proxy_pass(fmodel, F.cross_entropy, params, buffers, (x, y))
    second = proxy_pass(fmodel, F.cross_entropy, params, first.buffers, (x, y))
    F.cross_entropy(model(x), y).backward()
    torch.testing.assert_close(first.grads, {name: p.grad for name, p in model.named_parameters()})
    torch.testing.assert_close(first.buffers, split_state(model)[1])
    torch.testing.assert_close(whole.grads, {n: (g + second.grads[n]) / 2 for n, g in first.grads.items()})
    torch.testing.assert_close(whole.buffers, first.buffers)


class Counter(nn.Module):
    """Replaces its buffer where others change it in place."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(4)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls = self.calls + 1
        return self.norm(x)


def test_a_buffer_that_the_model_replaces_comes_back() -> None:
    model = Counter()
    params, buffers = split_state(model)
    out = make_apart_step(model, F.cross_entropy)(params, buffers, (torch.randn(6, 4), torch.zeros(6).long()))
    assert out.buffers["calls"] == 1
    assert buffers["calls"] == 0
    assert model.calls == 0
