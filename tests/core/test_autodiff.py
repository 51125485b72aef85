"""Gradients: what is refused since a function cannot do it, and what the tensors that come out are like."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from small import CLASSES, convolutional, images
from torch import Tensor, nn
from torch.func import vmap

from apart_func import (
    BatchError,
    StateError,
    assign_grads_,
    functionalize,
    make_apart_step,
    make_one_pass_step,
    proxy_pass,
    split_state,
)
from apart_func.autodiff import is_unreached

BATCH = images()


def take(form: str, model: nn.Module, batch: Any = BATCH, epsilon: float = 0.1, loss_fn: Any = F.cross_entropy) -> Any:
    """A step of a form, from the model's own state."""
    make: Any = make_apart_step if form == "two passes" else make_one_pass_step
    return make(model, loss_fn, epsilon=epsilon, groups=2)(*split_state(model), batch)


every_form = pytest.mark.parametrize("form", ["two passes", "one pass"])


class Around(nn.Module):
    """A network with something before it, which gets the module and the input."""

    def __init__(self, before: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.body, self.before = convolutional(), before
        self.table = nn.Embedding(1, 1, max_norm=0.5, _weight=torch.ones(1, 1).double())
        self.gain, self.fixed = nn.Parameter(torch.ones(1).double()), nn.Parameter(torch.ones(2).double(), False)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self.before(self, x))


# What a function cannot do.


def in_place(module: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        module.gain.clamp_(0.0, 0.5)
    return x * module.gain


def by_data(module: Any, x: Tensor) -> Tensor:
    module.gain.data.mul_(0.5)
    return x * module.gain


def by_other_data(module: Any, x: Tensor) -> Tensor:
    module.gain.data = module.gain.data / 2
    return x * module.gain


def max_norm(module: Any, x: Tensor) -> Tensor:
    return x * module.table(torch.zeros(1).long())[0]


@every_form
@pytest.mark.parametrize("rewrite", [in_place, by_data, by_other_data, max_norm])
def test_a_forward_that_rewrites_a_trained_parameter_is_refused_by_its_name_and_has_changed_nothing(
    rewrite: Callable[[Any, Tensor], Tensor], form: str
) -> None:
    model = Around(rewrite)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(StateError, match=r"rewrites '(gain|table.weight)', which is trained"):
        take(form, model)
    torch.testing.assert_close(dict(model.state_dict()), dict(before), rtol=0, atol=0)


@every_form
def test_a_forward_that_changes_its_input_in_place_is_refused_and_has_changed_nothing(form: str) -> None:
    model, (x, y) = Around(lambda module, x: x.mul_(2)), images()
    with pytest.raises(BatchError, match=r"changes its input in place.*shape \(8, 2, 4, 4\).*x\.clone\(\)"):
        take(form, model, (x, y))
    assert torch.equal(x, BATCH[0])


def moved(module: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        module.fixed.add_(1)
    return x * module.fixed[:, None, None]


@every_form
def test_a_frozen_parameter_moves_as_one_forward_moves_it_and_comes_back_in_the_buffers(form: str) -> None:
    model = Around(moved)
    out = take(form, model)
    assert torch.equal(out.buffers["fixed"], torch.full((2,), 2.0).double())
    assert torch.equal(model.fixed, torch.ones(2).double())


# What gradients are like.


class Added(nn.Module):
    """Two parameters whose gradient is the same tensor, and one whose gradient is an expanded number."""

    def __init__(self) -> None:
        super().__init__()
        self.body = convolutional()
        self.one, self.other = (nn.Parameter(torch.zeros(CLASSES).double()) for _ in range(2))
        self.summed, self.unused = nn.Parameter(torch.zeros(4).double()), nn.Parameter(torch.ones(2).double())

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) + (self.one + self.other) + self.summed.sum()


@every_form
def test_every_gradient_owns_its_memory(form: str) -> None:
    model = Added()
    grads = take(form, model, loss_fn=lambda output, y: F.cross_entropy(output, y) + output.sum()).grads
    before = {name: grad.clone() for name, grad in grads.items()}
    assert before["summed"].all()
    grads["one"].add_(1)
    grads["summed"][0] = 0
    assert torch.equal(grads["other"], before["other"])
    assert torch.equal(grads["summed"][1:], before["summed"][1:])


def test_a_gradient_is_sparse_if_that_of_plain_training_is() -> None:
    class Looked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.norm, self.head = nn.Embedding(9, 4, sparse=True), nn.BatchNorm1d(4), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.norm(self.table(x)))

    model, batch = Looked().double(), (torch.tensor([0, 3, 3, 5, 6, 7, 1, 1]), BATCH[1])
    out = make_apart_step(model, F.cross_entropy, epsilon=0.0, microbatches=2)(*split_state(model), batch)
    expected = [
        make_apart_step(model, F.cross_entropy, epsilon=0.0)(*split_state(model), half) for half in halves(batch)
    ]
    for grads in (out.grads, expected[0].grads):
        assert grads["table.weight"].is_sparse
    mean = sum(one.grads["table.weight"].to_dense() for one in expected) / 2
    torch.testing.assert_close(out.grads["table.weight"].to_dense(), mean)
    assign_grads_(model, expected[0].grads)
    found = model.table.weight.grad.to_dense()
    model.zero_grad()
    F.cross_entropy(model(halves(batch)[0][0]), halves(batch)[0][1]).backward()
    assert model.table.weight.grad.is_sparse
    torch.testing.assert_close(found, model.table.weight.grad.to_dense())


def halves(batch: tuple[Tensor, Tensor]) -> list[tuple[Tensor, Tensor]]:
    return [(batch[0][part], batch[1][part]) for part in (slice(0, 4), slice(4, 8))]


@every_form
def test_parameters_that_the_loss_does_not_reach_have_a_marked_zero_and_no_gradient_in_the_model(form: str) -> None:
    model = Added()
    out = take(form, model)
    assert [name for name, grad in out.grads.items() if is_unreached(grad)] == ["unused"]
    assert not out.grads["unused"].any()
    assign_grads_(model, out.grads)
    assert model.unused.grad is None
    torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1).step()
    assert torch.equal(model.unused, torch.ones(2).double())  # no decay, as in plain training


def test_assigned_gradients_replace_those_that_are_there_or_add_to_them() -> None:
    model = Added()
    model.unused.grad = torch.ones(2).double()
    grads = take("two passes", model).grads
    for times in (1, 2):
        assign_grads_(model, grads, accumulate=True)
        torch.testing.assert_close(model.one.grad, times * grads["one"])
        assert torch.equal(model.unused.grad, torch.ones(2).double())
    model.one.grad.zero_()
    assert grads["one"].any()  # added to a copy
    assign_grads_(model, grads)
    torch.testing.assert_close(model.one.grad, grads["one"])
    assert model.unused.grad is None


def test_under_a_transform_gradients_are_those_of_an_eager_pass() -> None:
    model, state = Added(), split_state(Added())
    fmodel = functionalize(model)
    eager = proxy_pass(fmodel, F.cross_entropy, *state, BATCH).grads
    mapped = vmap(lambda x: proxy_pass(fmodel, F.cross_entropy, *state, (x, BATCH[1])).grads)(BATCH[0][None])
    torch.testing.assert_close({name: grad[0] for name, grad in mapped.items()}, eager, rtol=1e-9, atol=1e-12)
