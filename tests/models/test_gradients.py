"""Gradients are those of the loss: of every kind of graph, in memory of their own, dense or sparse as PyTorch's."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from loops import drop_in_step
from plain import ROUNDING, functional_step, one_pass, plain_step
from small import Parts, convolutional, images
from torch import Tensor, nn
from torch.func import stack_module_state, vmap
from torch.utils._pytree import tree_leaves

from apart_func import (
    StepOutput,
    UsageError,
    assign_grads_,
    make_apart_sam_step,
    make_apart_step,
    make_one_pass_step,
    split_state,
)
from apart_func.autodiff import is_unreached

BATCH = images()


def sam(model: nn.Module, batch: Any, **options: Any) -> StepOutput:
    return make_apart_sam_step(model, F.cross_entropy, **options)(*split_state(model), batch)


def microbatches(model: nn.Module, batch: Any, **options: Any) -> StepOutput:
    return functional_step(model, batch, microbatches=2, **options)


FORMS = [functional_step, one_pass, sam, microbatches]


# A backward inside of the backward.


class Reversed(torch.autograd.Function):
    """Runs a block without a graph, and again in its backward, as reversible networks do."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, block: nn.Module) -> Tensor:
        ctx.block = block
        ctx.save_for_backward(x.detach())
        with torch.no_grad():
            return block(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        x = ctx.saved_tensors[0].detach().requires_grad_()
        with torch.enable_grad():
            y = ctx.block(x)
        torch.autograd.backward(y, grad)
        return x.grad, None


class Reversible(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.head, self.tricky = nn.Conv2d(2, 2, 1), nn.Linear(5, 3), True
        self.block = nn.Sequential(nn.Conv2d(2, 5, 3), nn.BatchNorm2d(5), nn.Tanh())

    def forward(self, x: Tensor) -> Tensor:
        h = self.stem(x)
        h = Reversed.apply(h, self.block) if self.tricky else self.block(h)
        return self.head(h.mean((2, 3)))


def test_parameters_inside_a_block_that_runs_again_in_its_own_backward_have_their_gradients() -> None:
    usual = Reversible().double()
    usual.tricky = False
    expected = plain_step(usual, BATCH)
    for take in (functional_step, drop_in_step):
        out = take(Reversible().double(), BATCH, epsilon=0.0)
        torch.testing.assert_close(out.grads, expected.grads, **ROUNDING)
        torch.testing.assert_close(out.buffers, expected.buffers, **ROUNDING)  # that are of one forward


class Within(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, function: Any) -> Tensor:
        ctx.function = function
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        ctx.function()
        return grad, None


def drop_in(model: nn.Module, batch: Any, **options: Any) -> StepOutput:
    with torch.enable_grad():  # which is the user's in the drop-in, and off inside of a backward
        return drop_in_step(model, batch, **options)


@pytest.mark.parametrize("take", [*FORMS, drop_in])
def test_a_step_inside_somebodys_backward_is_the_step_outside_of_it(take: Any) -> None:
    found: list[Any] = []
    start = torch.ones(1, requires_grad=True)
    Within.apply(start, lambda: found.append(take(convolutional(), BATCH, groups=2))).backward()
    torch.testing.assert_close(found[0]._asdict(), take(convolutional(), BATCH, groups=2)._asdict(), rtol=0, atol=0)
    assert found[0].buffers["1.num_batches_tracked"] == (2 if take is microbatches else 1)


# Memory.


def added() -> nn.Module:
    """Two parameters that enter by their sum alone, and one by the sum of its elements."""
    own = {name: nn.Parameter(torch.ones(3, 3)) for name in ("shared", "own")} | {"gate": nn.Parameter(torch.ones(4))}
    return Parts(lambda m, x: F.linear(m.body(x), m.shared + m.own) * m.gate.sum(), body=convolutional(), **own)


@pytest.mark.parametrize("take", FORMS)
def test_gradients_own_their_memory_so_that_clipping_is_right(take: Any) -> None:
    model = added()
    out = take(model, BATCH)
    pointers = [grad.data_ptr() for grad in out.grads.values()]
    assert len(set(pointers)) == len(pointers)
    assert not any(0 in grad.stride() for grad in out.grads.values())
    expected = {name: grad.clone() for name, grad in out.grads.items()}
    norm = torch.cat([grad.flatten() for grad in expected.values()]).norm()
    assign_grads_(model, out.grads)
    nn.utils.clip_grad_norm_(model.parameters(), norm.item() / 10)
    for name, parameter in model.named_parameters():
        # clip_grad_norm_ adds 1e-6 to the norm
        torch.testing.assert_close(parameter.grad, expected[name] / 10, rtol=1e-4, atol=1e-12)


def test_gradients_of_an_ensemble_keep_no_graph_although_its_parameters_want_one() -> None:
    models = [convolutional() for _ in range(2)]
    params, buffers = stack_module_state(models)
    for make, options in ((make_apart_step, {}), (make_one_pass_step, {"epsilon": 0.1})):
        step = make(models[0], F.cross_entropy, groups=2, **options)
        out = vmap(step, in_dims=(0, 0, None), randomness="different")(params, buffers, BATCH)
        assert not any(leaf.requires_grad for leaf in tree_leaves(out))


# Sparse.


def table(sparse: bool = True) -> nn.Module:
    torch.manual_seed(0)
    layers = nn.EmbeddingBag(20, 4, sparse=sparse, mode="sum"), nn.BatchNorm1d(4), nn.Linear(4, 3)
    return nn.Sequential(*layers).double()


WORDS = torch.arange(24).view(8, 3) % 7, torch.arange(8) % 3


@pytest.mark.parametrize("take", FORMS)
def test_sparse_gradients_stay_sparse_and_are_what_dense_ones_are(take: Any) -> None:
    found, expected = (take(table(sparse), WORDS, epsilon=0.1, groups=2) for sparse in (True, False))
    grad = found.grads["0.weight"]
    assert grad.is_sparse
    assert found.all_finite
    torch.testing.assert_close({**found.grads, "0.weight": grad.to_dense()}, expected.grads, rtol=1e-10, atol=1e-13)
    model = table()
    assign_grads_(model, found.grads)
    assign_grads_(model, found.grads, accumulate=True)
    torch.testing.assert_close(model[0].weight.grad.to_dense(), 2 * expected.grads["0.weight"], **ROUNDING)
    torch.optim.SGD(model.parameters(), 0.1).step()


# Parameters that a loss does not reach.


def tasks() -> nn.Module:
    """One head a task, and a task a batch."""
    heads = nn.ModuleList(nn.Linear(3, 3) for _ in range(3))
    return Parts(lambda m, x, task: m.heads[int(task)](m.body(x)), body=convolutional(), heads=heads)


def of_task(task: int) -> Any:
    return (BATCH[0], torch.tensor(task)), BATCH[1]


@pytest.mark.parametrize("take", FORMS)
def test_heads_of_other_tasks_have_zero_gradients_and_get_none_from_assign_grads(take: Any) -> None:
    model = tasks()
    out = take(model, of_task(1), groups=2)
    unreached = {name for name, grad in out.grads.items() if is_unreached(grad)}
    assert unreached == {f"heads.{task}.{kind}" for task in (0, 2) for kind in ("weight", "bias")}
    assert all((out.grads[name] == 0).all() for name in unreached)
    assign_grads_(model, out.grads)
    assert {name for name, parameter in model.named_parameters() if parameter.grad is None} == unreached


def test_a_gradient_that_is_zero_by_chance_is_reached() -> None:
    model = convolutional()
    out = functional_step(model, BATCH, loss_fn=lambda o, t: 0 * F.cross_entropy(o, t))
    assert not any(map(is_unreached, out.grads.values()))


def test_an_optimizer_with_weight_decay_moves_the_heads_that_plain_training_moves() -> None:
    own, plain = tasks(), tasks()
    plain.load_state_dict(own.state_dict())
    optimizers = [torch.optim.AdamW(model.parameters(), lr=0.05, weight_decay=0.1) for model in (own, plain)]
    params, buffers = split_state(own)
    step = make_apart_step(own, F.cross_entropy, epsilon=0.0)
    for task in (0, 1, 0, 1):
        out = step(params, buffers, of_task(task))
        buffers = out.buffers
        assign_grads_(own, out.grads)
        plain_step(plain, of_task(task))
        for optimizer in optimizers:
            optimizer.step()
    # Adam divides by roots of gradients, which amplifies rounding where these are small.
    torch.testing.assert_close(dict(own.named_parameters()), dict(plain.named_parameters()), rtol=1e-6, atol=1e-8)


def test_gradients_add_up_over_calls_and_none_stays_none() -> None:
    model = tasks()
    outs = [functional_step(model, of_task(task)) for task in (0, 1)]
    for out in outs:
        assign_grads_(model, out.grads, accumulate=True)
    torch.testing.assert_close(model.body[0].weight.grad, sum(out.grads["body.0.weight"] for out in outs), **ROUNDING)
    torch.testing.assert_close(model.heads[0].bias.grad, outs[0].grads["heads.0.bias"], rtol=0, atol=0)
    assert model.heads[2].bias.grad is None
    model.body[0].weight.grad.zero_()
    assert outs[0].grads["body.0.weight"].any()  # the sum has memory of its own
    assign_grads_(model, outs[1].grads)  # in place of what is there
    torch.testing.assert_close(model.body[0].weight.grad, outs[1].grads["body.0.weight"], rtol=0, atol=0)
    assert model.heads[0].bias.grad is None


# Losses that reach past the arguments, where no graph can be walked.


def test_a_mapped_step_refuses_a_loss_that_reaches_a_parameter_past_its_arguments_under_no_grad_too() -> None:
    model = convolutional()
    step = make_apart_step(model, lambda o, t: F.cross_entropy(o, t) + model[8].weight.square().sum())
    state = split_state(model)
    with torch.no_grad(), pytest.raises(UsageError, match="past the arguments"):
        vmap(lambda epsilon: step(*state, BATCH, epsilon=epsilon))(torch.tensor([0.1, 0.2]).double())


def test_the_generator_of_a_pair_trains_once_the_discriminator_is_frozen_as_the_error_says() -> None:
    generator, discriminator = convolutional(), nn.Linear(3, 1).double()

    def loss_fn(fake: Tensor, target: Tensor) -> Tensor:
        return F.softplus(-discriminator(fake)).mean()

    expected = plain_step(copy.deepcopy(generator), BATCH, loss_fn)
    with pytest.raises(UsageError, match=r"as those of a discriminator, say requires_grad_\(False\)"):
        functional_step(generator, BATCH, loss_fn=loss_fn)
    discriminator.requires_grad_(False)
    out = functional_step(generator, BATCH, loss_fn=loss_fn, epsilon=0.0)
    torch.testing.assert_close(out.grads, expected.grads, **ROUNDING)


def test_a_parameter_that_the_loss_does_not_reach_has_no_gradient_whatever_the_scale_of_the_loss() -> None:
    model = Parts(lambda m, x: m.body(x), body=convolutional(), spare=nn.Linear(2, 2))
    out = make_apart_step(model, F.cross_entropy)(*split_state(model), images(), loss_scale=8.0)
    assign_grads_(model, out.grads)
    assert model.spare.weight.grad is None
    assert model.body[0].weight.grad is not None


def test_buffers_and_batch_may_require_gradients_which_nobody_takes() -> None:
    """As the model's own frozen parts of a probe, and images that an attack has made."""
    model, (x, y) = convolutional(), images()
    named = dict(model.named_parameters())
    head = {name: p for name, p in named.items() if name.startswith("8.")}
    others = {name: p for name, p in named.items() if name not in head} | dict(model.named_buffers())
    out = make_apart_step(model, F.cross_entropy)(head, others, (nn.Parameter(x), y))
    expected = make_apart_step(model, F.cross_entropy)(*split_state(model), (x, y)).grads
    torch.testing.assert_close(out.grads, {name: expected[name] for name in head}, rtol=0, atol=0)
    assert all(p.grad is None for p in named.values())
