"""What plain PyTorch does with a model: at zero radius, in one group, every form of the method has to do the same."""

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from loops import drop_in_step, gradients
from oracle import call
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from apart_func import StepOutput, make_apart_step, make_one_pass_step, split_state

# Rounding of float64 in another order.
ROUNDING = {"rtol": 1e-9, "atol": 1e-12}


class Plain(NamedTuple):
    """One forward and backward.

    Attributes:
        loss: 0-d.
        grads: by name, zero where there is none.
        buffers: after the forward, and parameters that are not trained.
    """

    loss: Tensor
    grads: dict[str, Tensor]
    buffers: dict[str, Tensor]


class Drops(nn.Module):
    """Skips its only layer at random, as stochastic depth does."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.head, self.skips = nn.BatchNorm2d(2), nn.Linear(32, 3), True
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.head((x if self.skips else self.norm(x)).flatten(1))


def plain_step(model: nn.Module, batch: Any, loss_fn: Any = F.cross_entropy) -> Plain:
    """Train a model as PyTorch does; it is changed."""
    model.zero_grad()
    loss = loss_fn(call(model, batch[0]), batch[1])
    loss.backward()
    return Plain(loss.detach(), gradients(model), split_state(model)[1])


def functional_step(model: nn.Module, batch: Any, *, loss_fn: Any = F.cross_entropy, **options: Any) -> StepOutput:
    """A step of two passes from the model's own state, which changes neither that nor the batch."""
    values = [leaf for leaf in tree_leaves((split_state(model), batch)) if isinstance(leaf, Tensor)]
    before = copy.deepcopy(values)
    try:
        return make_apart_step(model, loss_fn, **options)(*split_state(model), batch)
    finally:
        torch.testing.assert_close(values, before, rtol=0, atol=0)


def one_pass(model: nn.Module, batch: Any, *, loss_fn: Any = F.cross_entropy, **options: Any) -> StepOutput:
    options = {"epsilon": 0.3, "groups": 2} | options
    step = make_one_pass_step(model, loss_fn, **options)
    torch.manual_seed(0)
    return step(*split_state(model), batch)


def assert_plain(
    build: Callable[[], nn.Module],
    batch: Any,
    loss_fn: Any = F.cross_entropy,
    forms: Any = (functional_step, drop_in_step),
) -> None:
    """Make sure that at zero radius the forms do with a model what PyTorch does with one built in the same way."""
    expected = plain_step(build(), batch, loss_fn)
    for take in forms:
        out = take(build(), batch, loss_fn=loss_fn, epsilon=0.0)
        torch.testing.assert_close(out.loss, expected.loss, **ROUNDING)
        torch.testing.assert_close(out.adversarial_loss, expected.loss, **ROUNDING)
        torch.testing.assert_close(out.grads, expected.grads, **ROUNDING)
        torch.testing.assert_close(out.buffers, expected.buffers, **ROUNDING)
