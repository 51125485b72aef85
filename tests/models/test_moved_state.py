"""What a forward moves: once, and it comes back as a value; the arguments of a step never change, bit for bit."""

import copy
from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from plain import ROUNDING, assert_plain, functional_step, one_pass, plain_step
from small import convolutional, images
from torch import Tensor, nn

from apart_func import (
    BatchError,
    StateError,
    make_apart_step,
    split_state,
)

BATCH = images()


class Moves(nn.Module):
    """Moves a tensor of its own in the forward, in some way, and computes with what it has then."""

    def __init__(self, move: Callable[[nn.Module, Tensor], Any], is_frozen: bool) -> None:
        super().__init__()
        self.body = convolutional()
        if is_frozen:
            self.state = nn.Parameter(torch.ones(3).double(), requires_grad=False)
        else:
            self.register_buffer("state", torch.ones(3).double())
        self.move = move

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(x)
        with torch.no_grad():
            self.move(self, y.detach().mean(0))
        return y * self.state.detach().clone()


def moved(state: Tensor, value: Tensor) -> Tensor:
    return 0.9 * state + 0.1 * value


MOVES: dict[str, Callable[[Any, Tensor], Any]] = {
    "in place": lambda model, value: model.state.mul_(0.9).add_(value, alpha=0.1),
    "through .data": lambda model, value: model.state.data.mul_(0.9).add_(value, alpha=0.1),
    "copied into": lambda model, value: model.state.data.copy_(moved(model.state, value)),
    "new .data": lambda model, value: setattr(model.state, "data", moved(model.state.data, value)),
    "through a view": lambda model, value: model.state[:2].lerp_(value[:2], 0.1),
}
OF_BUFFERS: dict[str, Callable[[Any, Tensor], Any]] = {
    "assigned": lambda model, value: setattr(model, "state", moved(model.state, value)),
    "registered": lambda model, value: model._buffers.update(state=moved(model.state, value)),
}


@pytest.mark.parametrize(("move", "is_frozen"), [*product(MOVES | OF_BUFFERS, [False]), *product(MOVES, [True])])
def test_a_buffer_or_frozen_parameter_moves_as_one_plain_forward_moves_it(move: str, is_frozen: bool) -> None:
    def build() -> nn.Module:
        return Moves((MOVES | OF_BUFFERS)[move], is_frozen)

    expected = plain_step(build(), BATCH)
    out = functional_step(build(), BATCH, epsilon=0.0)
    torch.testing.assert_close(out.loss, expected.loss, **ROUNDING)
    torch.testing.assert_close(out.buffers, expected.buffers, **ROUNDING)
    # Under no perturbation one pass differs by its groups alone, of which the tensor sees the mean.
    mixed = one_pass(build(), BATCH, epsilon=0.0)
    state = mixed.buffers["state"]
    torch.testing.assert_close(state[:2], (0.9 + 0.1 * (mixed.output / state).mean(0))[:2], **ROUNDING)


class Teacher(nn.Module):
    """A key encoder that follows the query encoder, and a queue of its outputs, as in MoCo."""

    def __init__(self, inplace: bool) -> None:
        super().__init__()
        self.query, self.key = convolutional(), convolutional().requires_grad_(False)
        self.inplace = inplace
        self.register_buffer("queue", torch.eye(3).double())

    def forward(self, x: Tensor) -> Tensor:
        query = self.query(x)
        with torch.no_grad():
            for slow, fast in zip(self.key.parameters(), self.query.parameters(), strict=True):
                if self.inplace:
                    slow.mul_(0.5).add_(fast, alpha=0.5).add_(0.01)
                else:
                    slow.data = slow.data * 0.5 + fast.data * 0.5 + 0.01
            keys = self.key(x)
        scores = query @ self.queue.clone().T + (query * keys).sum(1, keepdim=True)
        self.queue = torch.cat([keys, self.queue])[:3]
        return scores


@pytest.mark.parametrize("inplace", [True, False])
def test_a_momentum_encoder_advances_by_one_forward_in_every_form(inplace: bool) -> None:
    expected = plain_step(Teacher(inplace), BATCH)
    assert not torch.equal(expected.buffers["key.8.bias"], convolutional()[8].bias.detach())
    out = functional_step(Teacher(inplace), BATCH, epsilon=0.0)
    torch.testing.assert_close(out.buffers, expected.buffers, **ROUNDING)
    mixed = one_pass(Teacher(inplace), BATCH, epsilon=0.0)
    torch.testing.assert_close(mixed.buffers["key.8.bias"], expected.buffers["key.8.bias"], **ROUNDING)


def test_a_running_statistic_that_another_module_holds_too_is_one_buffer_that_all_see_at_once() -> None:
    class Twin(nn.Module):
        """Its second layer evaluates by the statistics that its first has just moved."""

        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.monitor = nn.Module()
            self.first, self.second = nn.BatchNorm2d(2, momentum=0.5), nn.BatchNorm2d(2).eval()
            self.second.running_mean, self.second.running_var = self.first.running_mean, self.first.running_var
            self.monitor.register_buffer("seen", self.first.running_mean)
            self.head = nn.Linear(2, 3)

        def forward(self, x: Tensor) -> Tensor:
            y = self.first(x) * self.second(x) + self.monitor.seen.view(-1, 1, 1)
            return self.head(y.mean((2, 3)))

    assert_plain(lambda: Twin().double(), BATCH)


def test_layers_that_share_running_statistics_move_them_in_turn() -> None:
    def build() -> nn.Module:
        torch.manual_seed(0)
        model = nn.Sequential(nn.BatchNorm2d(2), nn.ReLU(), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(32, 3)).double()
        for name in ("running_mean", "running_var", "num_batches_tracked"):
            setattr(model[2], name, getattr(model[0], name))
        return model

    assert_plain(build, BATCH)
    assert functional_step(build(), BATCH).buffers["0.num_batches_tracked"] == 2


# What a forward must not move.


class Rewrites(nn.Module):
    """Rewrites a trained parameter in some way, from the moment on that its input is large."""

    def __init__(self, rewrite: Callable[[nn.Parameter], Any]) -> None:
        super().__init__()
        self.body, self.rewrite = convolutional(), rewrite

    def forward(self, x: Tensor) -> Tensor:
        if x.abs().max() < 100:
            with torch.no_grad():
                self.rewrite(self.body[8].weight)
        return self.body(x)


REWRITES = {
    "in place": lambda weight: weight.div_(weight.norm()),
    "copied into": lambda weight: weight.copy_(weight / weight.norm()),
    "through .data": lambda weight: weight.data.mul_(0.5),
    "new .data": lambda weight: setattr(weight, "data", weight.data / weight.data.norm()),
    "through a view": lambda weight: weight[0].zero_(),
    "clipped": lambda weight: weight.clamp_(-0.1, 0.1),
    "through .data of a view": lambda weight: weight.view(-1).data.mul_(0.5),
    "as an array": lambda weight: weight.detach().numpy().fill(0.5),
}
UNSEEN = ("through .data of a view", "as an array")  # no version counts these: only the first call sees other values


@pytest.mark.parametrize("make", [functional_step, one_pass])
@pytest.mark.parametrize("way", REWRITES)
def test_a_forward_that_rewrites_a_trained_parameter_is_refused_by_its_name_and_has_changed_nothing(way, make):
    model = Rewrites(REWRITES[way])
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(StateError, match=r"rewrites 'body.8.weight'.*after the optimizer's step"):
        make(model, BATCH)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    if way in UNSEEN:
        return
    step, state = make_apart_step(model, F.cross_entropy), split_state(model)
    step(*state, (1000 * BATCH[0], BATCH[1]))  # one that begins to after a while is refused as well
    with pytest.raises(StateError, match=r"rewrites 'body.8.weight'"):
        step(*state, BATCH)


def test_an_embedding_of_a_largest_norm_is_refused_with_a_way_out() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(10, 4, max_norm=0.5), nn.BatchNorm1d(4), nn.Linear(4, 3)).double()
    with pytest.raises(StateError, match=r"rewrites '0.weight', which is trained, in place \(as max_norm"):
        functional_step(model, (torch.arange(9), torch.arange(9) % 3))


class ChangesInput(nn.Module):
    def __init__(self, change: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.change, self.body = change, convolutional()

    def forward(self, x: Tensor) -> Tensor:
        self.change(x)
        return self.body(x)


CHANGES = {
    "in place": lambda x: x.mul_(x),
    "a view": lambda x: x[0].zero_(),
    "an activation": lambda x: F.relu(x, inplace=True),
    "a normalisation": lambda x: x.sub_(x.mean()),
}


@pytest.mark.parametrize("make", [functional_step, one_pass])
@pytest.mark.parametrize("way", CHANGES)
def test_a_forward_that_changes_its_input_is_refused_and_has_not_changed_the_callers(way: str, make: Any) -> None:
    batch = copy.deepcopy(BATCH)
    with pytest.raises(
        BatchError, match=r"changes its input in place \(tensor 0, of shape \(8, 2, 4, 4\)\).*x.clone\(\)"
    ):
        make(ChangesInput(CHANGES[way]), batch)
    torch.testing.assert_close(batch, BATCH, rtol=0, atol=0)


@pytest.mark.parametrize("make", [functional_step, one_pass])
def test_a_loss_that_changes_its_target_is_refused_and_has_not_changed_the_callers(make: Any) -> None:
    batch = copy.deepcopy(BATCH)

    def loss_fn(output: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(output, target.add_(1).remainder_(3).clone())

    with pytest.raises(BatchError, match=r"loss_fn changes its target in place.*target.clone\(\)"):
        make(convolutional(), batch, loss_fn=loss_fn)
    torch.testing.assert_close(batch, BATCH, rtol=0, atol=0)


def test_a_forward_that_changes_its_input_through_data_changes_a_copy_in_either_pass() -> None:
    out = functional_step(ChangesInput(lambda x: x.data.mul_(2)), copy.deepcopy(BATCH), epsilon=0.0)
    expected = plain_step(convolutional(), (2 * BATCH[0], BATCH[1]))
    torch.testing.assert_close((out.loss, out.adversarial_loss), (expected.loss, expected.loss), **ROUNDING)
    torch.testing.assert_close(out.grads, {f"body.{k}": g for k, g in expected.grads.items()}, **ROUNDING)
