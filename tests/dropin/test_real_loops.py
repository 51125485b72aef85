"""What real loops do, around the drop-in and around the functional step, against the float64 definition.

Every test of numbers runs a `Form` beside a twin of the model that gets its gradients and buffers from the definition.
The definition is given δ, since the sign of a gradient that is zero but for rounding is a coin toss.
"""

import copy
import gc
from collections.abc import Callable
from functools import partial
from types import FunctionType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from agreement import relative_error
from loops import both_passes, gradients, weights
from oracle import Step, oracle_step
from small import convolutional, images
from timm.layers import BatchNormAct2d
from torch import Tensor, nn
from torch.func import vmap
from torch.utils.checkpoint import checkpoint

from apart_func import APART, ApartError, ApartStep, assign_grads_, load_state_, make_apart_step, split_state

EPSILON, GROUPS, RATIO = 0.2, 2, 0.5
OPTIONS: dict[str, Any] = {"epsilon": EPSILON, "groups": GROUPS, "ratio": RATIO}
# Rounding of float64 in another order, and its growth over a few steps.
ROUNDING = {"rtol": 1e-9, "atol": 1e-13}


class DropIn:
    """A model whose `.grad`s and buffers come from `APART`."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.apart = model, APART(model, EPSILON, GROUPS)

    def backward(self, batch: Any) -> None:
        self.model.zero_grad()
        both_passes(self.apart, batch, RATIO)
        self.perturbation = self.apart.perturbation


class Functional:
    """A model whose `.grad`s and buffers come from the functional step."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.step = model, make_apart_step(model, F.cross_entropy, **OPTIONS)
        self.params, self.buffers = split_state(model)

    def backward(self, batch: Any) -> None:
        out = self.step(self.params, self.buffers, batch)
        assign_grads_(self.model, out.grads)
        load_state_(self.model, self.params, out.buffers)
        self.perturbation = out.perturbation


Form = type[DropIn] | type[Functional]
both_forms = pytest.mark.parametrize("form", [DropIn, Functional])


def definition(model: nn.Module, batch: Any, perturbation: Any) -> Step:
    out = oracle_step(model, F.cross_entropy, batch, perturbation=perturbation, **OPTIONS)
    for name, parameter in model.named_parameters():
        parameter.grad = out.grads[name].to(parameter.dtype)
    for name, buffer in model.named_buffers():
        buffer.copy_(out.buffers[name])
    return out


def assert_same_training(
    form: Form,
    optimizer_of: Callable[[nn.Module], torch.optim.Optimizer],
    before_step: Callable[[nn.Module], Any] = lambda model: None,
) -> None:
    """Train a form and the definition side by side, and compare all of their state after each of four steps."""
    own, twin = form(convolutional()), convolutional()
    optimizers = {model: optimizer_of(model) for model in (own.model, twin)}
    for t in range(4):
        batch = images(seed=t)
        own.backward(batch)
        definition(twin, batch, own.perturbation)
        for model, optimizer in optimizers.items():
            before_step(model)
            optimizer.step()
        torch.testing.assert_close(dict(own.model.state_dict()), dict(twin.state_dict()), **ROUNDING)


# Optimizers, schedulers and clipping.


@both_forms
@pytest.mark.parametrize(
    "optimizer",
    [
        partial(torch.optim.SGD, momentum=0.9, nesterov=True, weight_decay=1e-2),
        partial(torch.optim.SGD, momentum=0.9, foreach=True),
        partial(torch.optim.SGD, momentum=0.9, fused=True),
        partial(torch.optim.Adam, amsgrad=True),
        partial(torch.optim.Adam, foreach=True),
        partial(torch.optim.AdamW, fused=True),
        partial(torch.optim.RMSprop, foreach=True),
        *(getattr(torch.optim, name) for name in ("Adagrad", "Adadelta", "Adamax", "NAdam", "RAdam", "ASGD", "Rprop")),
    ],
)
def test_any_optimizer_takes_the_steps_that_the_definition_takes(form: Form, optimizer: Any) -> None:
    assert_same_training(form, lambda model: optimizer(model.parameters(), lr=1e-2))


@both_forms
def test_an_optimizer_that_evaluates_a_closure_repeats_the_whole_step(form: Form) -> None:
    own = form(convolutional())
    optimizer = torch.optim.LBFGS(own.model.parameters(), max_iter=3)
    losses = []

    def closure() -> Tensor:
        own.backward(images())
        with torch.no_grad():
            losses.append(F.cross_entropy(copy.deepcopy(own.model)(images()[0]), images()[1]))
        return losses[-1]

    optimizer.step(closure)
    assert len(losses) >= 3
    assert own.model[1].num_batches_tracked == len(losses)
    assert losses[-1] < losses[0]


@both_forms
def test_clipping_is_of_the_sum_of_both_gradients(form: Form) -> None:
    norms = []

    def clip(model: nn.Module) -> None:
        norms.append(nn.utils.clip_grad_norm_(model.parameters(), 0.05))

    assert_same_training(form, lambda model: torch.optim.SGD(model.parameters(), 0.1), before_step=clip)
    assert min(norms) > 0.05  # it did something


# Gradient accumulation.

MICROBATCHES = 3


def accumulated_definition(model: nn.Module, perturbations: list[Any]) -> dict[str, Tensor]:
    """The mean of the definition's gradients over micro-batches; the model's buffers go on from each to the next."""
    steps = [definition(model, images(seed=t), shift) for t, shift in enumerate(perturbations)]
    return {name: sum(step.grads[name] for step in steps) / len(steps) for name in steps[0].grads}


def test_gradients_accumulate_over_microbatches_that_alternate_between_the_contexts() -> None:
    model, twin = convolutional(), convolutional()
    apart, perturbations = APART(model, EPSILON, GROUPS), []
    for t in range(MICROBATCHES):
        both_passes(apart, images(seed=t), RATIO, scale=1 / MICROBATCHES)
        perturbations.append(apart.perturbation)
    torch.testing.assert_close(gradients(model), accumulated_definition(twin, perturbations), **ROUNDING)
    torch.testing.assert_close(dict(model.named_buffers()), dict(twin.named_buffers()), **ROUNDING)


# Mixed precision.

# What rounding of activations and their gradients to 8 and 11 bits does to the gradient of this network: 3e-2 and 1e-3
# of its norm. Statistics are taken in float32 of activations rounded once: 3e-5 and 4e-6 off.
HALF = [pytest.param(torch.bfloat16, 5e-2, id="bfloat16"), pytest.param(torch.float16, 2e-3, id="float16")]
STATISTICS = 1e-4
OVERFLOW = 2.0**40  # a loss scale at which gradients in float16 are infinite


class Scaled:
    """One drop-in step of a float32 model under autocast and `GradScaler`, up to `optimizer.step()`."""

    def __init__(self, dtype: torch.dtype, scale: float) -> None:
        self.model = convolutional(dtype=torch.float32)
        self.apart = APART(self.model, EPSILON, GROUPS)
        self.optimizer = torch.optim.SGD(self.model.parameters(), 0.1, momentum=0.9)
        self.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        x, y = images(64, torch.float32)
        r, rest = weights(64, 32)
        with self.apart.to_proxy():
            with torch.autocast("cpu", dtype=dtype):
                loss = F.cross_entropy(self.model(x), y)
            self.scaler.scale(r * loss).backward()
        with self.apart.to_adver():
            with torch.autocast("cpu", dtype=dtype):
                loss = F.cross_entropy(self.model(x[:32]), y[:32])
            self.scaler.scale(rest * loss).backward()
        self.scaler.unscale_(self.optimizer)


@pytest.mark.parametrize(("dtype", "tolerance"), HALF)
def test_the_drop_in_under_autocast_and_a_scaler_is_near_the_definition(dtype: torch.dtype, tolerance: float) -> None:
    loop, twin = Scaled(dtype, scale=1024.0), convolutional(dtype=torch.float32)
    out = oracle_step(twin, F.cross_entropy, images(64, torch.float32), perturbation=loop.apart.perturbation, **OPTIONS)
    assert {part.dtype for shift in loop.apart.perturbation.values() for part in shift} == {torch.float32}
    assert relative_error(gradients(loop.model), out.grads) < tolerance
    assert relative_error(dict(loop.model.named_buffers()), out.buffers) < STATISTICS
    before = gradients(loop.model)
    loop.scaler.step(loop.optimizer)
    for name, parameter in loop.model.named_parameters():
        moved = dict(twin.named_parameters())[name] - 0.1 * before[name]
        torch.testing.assert_close(parameter, moved)
    other = Scaled(dtype, scale=4096.0).apart  # on which the perturbation does not depend
    torch.testing.assert_close(loop.apart.perturbation, other.perturbation, rtol=0, atol=0)
    assert loop.apart.stat_grads["4"].scale.abs().sum() < other.stat_grads["4"].scale.abs().sum()


def test_where_a_pass_of_the_drop_in_overflows_the_scaler_skips_and_the_statistics_move_as_in_plain_training() -> None:
    loop, plain = Scaled(torch.float16, scale=OVERFLOW), convolutional(dtype=torch.float32)
    before = {name: parameter.clone() for name, parameter in loop.model.named_parameters()}
    assert not all(parameter.grad.isfinite().all() for parameter in loop.model.parameters())
    loop.scaler.step(loop.optimizer)
    loop.scaler.update()
    assert loop.scaler.get_scale() == OVERFLOW / 2
    assert not loop.optimizer.state
    torch.testing.assert_close(dict(loop.model.named_parameters()), before, rtol=0, atol=0)
    with torch.autocast("cpu", dtype=torch.float16):
        plain(images(64, torch.float32)[0])
    # Moments of half-precision activations, taken by another kernel.
    torch.testing.assert_close(dict(loop.model.named_buffers()), dict(plain.named_buffers()), rtol=1e-3, atol=1e-5)


def functional_under_autocast(dtype: torch.dtype, scale: float | None) -> tuple[Any, nn.Module]:
    model = convolutional(dtype=torch.float32)
    step = make_apart_step(model, F.cross_entropy, autocast_dtype=dtype, **OPTIONS)
    scale_0d = None if scale is None else torch.tensor(scale)
    return step(*split_state(model), images(64, torch.float32), loss_scale=scale_0d), model


@pytest.mark.parametrize(("dtype", "tolerance"), HALF)
def test_the_functional_step_under_autocast_and_a_scale_is_near_the_definition(dtype, tolerance):
    outs = []
    for scale in (None, 256.0, 4096.0):
        out, model = functional_under_autocast(dtype, scale)
        given = {"perturbation": out.perturbation, **OPTIONS}
        expected = oracle_step(model, F.cross_entropy, images(64, torch.float32), **given)
        assert out.all_finite
        assert relative_error(out.grads, expected.grads) < tolerance
        assert relative_error(out.stat_grads, expected.stat_grads) < tolerance
        assert relative_error(out.buffers, expected.buffers) < STATISTICS
        outs.append(out)
    torch.testing.assert_close(outs[1].perturbation, outs[2].perturbation, rtol=0, atol=0)


def test_where_the_functional_step_overflows_it_says_so_and_returns_the_buffers_as_they_were() -> None:
    out, model = functional_under_autocast(torch.float16, OVERFLOW)
    assert not out.all_finite
    torch.testing.assert_close(out.buffers, dict(model.named_buffers()), rtol=0, atol=0)
    assert functional_under_autocast(torch.float16, 1024.0)[0].all_finite


# Activation checkpointing.


class Checkpointed(nn.Sequential):
    """Layers that run again during the backward."""

    reentrant = False

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(super().forward, x, use_reentrant=self.reentrant)


def checkpointed() -> nn.Module:
    """`convolutional` with its second block checkpointed, which gives its layers other names."""
    layers = list(convolutional())
    return nn.Sequential(*layers[:3], Checkpointed(*layers[3:6]), *layers[6:])


def by_position(tree: dict[str, Any]) -> list[Any]:
    """The values of a dict, whatever the names."""
    return list(tree.values())


def test_reentrant_checkpoints_work_in_the_drop_in() -> None:
    own, plain = DropIn(checkpointed()), DropIn(convolutional())
    own.model[3].reentrant = True
    for each in (own, plain):
        each.backward(images())
    torch.testing.assert_close(by_position(gradients(own.model)), by_position(gradients(plain.model)), **ROUNDING)
    torch.testing.assert_close(list(own.model.buffers()), list(plain.model.buffers()), **ROUNDING)


@pytest.mark.filterwarnings("ignore:to_proxy.. was entered again with no to_adver:UserWarning")
@pytest.mark.parametrize("failing", ["to_proxy", "to_adver"])
def test_the_backward_of_checkpointed_layers_outside_the_context_is_an_error(failing: str) -> None:
    model, (x, y) = checkpointed(), images()
    apart = APART(model)
    if failing == "to_adver":
        with apart.to_proxy():
            F.cross_entropy(model(x), y).backward()
    message = rf"{failing}\(\) was left before backward\(\).*\['3.1'\].*Call backward\(\) inside the context"
    with pytest.raises(ApartError, match=message), getattr(apart, failing)():
        F.cross_entropy(model(x), y)
    both_passes(apart, (x, y))


def test_checkpointed_layers_without_a_gradient_need_no_backward() -> None:
    model, (x, y) = checkpointed(), images()
    apart = APART(model)
    with apart.to_proxy():
        with torch.no_grad():
            model(x)
        F.cross_entropy(model(x), y).backward()


def test_checkpointed_layers_under_a_transform_are_an_error() -> None:
    model, batch = checkpointed(), images()
    step: ApartStep = make_apart_step(model, F.cross_entropy)
    with pytest.raises(ApartError, match=r"checkpoints activations.*under a torch.func transform"):
        vmap(lambda epsilon: step(*split_state(model), batch, epsilon=epsilon))(torch.zeros(2))


# Over a long time.


@both_forms
def test_live_tensors_hooks_and_buffers_are_as_many_after_30_steps_as_after_10(form: Form) -> None:
    layers = nn.Conv2d(2, 4, 1), nn.BatchNorm2d(4), BatchNormAct2d(4), nn.Flatten(), nn.Linear(64, 3)
    own = form(nn.Sequential(*layers).double())
    optimizer, batch, counts = torch.optim.SGD(own.model.parameters(), 0.01, momentum=0.9), images(4), []
    older = gc.get_objects()  # held, so that what other tests have left does not die meanwhile
    for t in range(1, 31):
        own.backward(batch)
        optimizer.step()
        if t in (10, 30):
            counts.append(live_objects(own.model))
    del older
    assert counts[0] == counts[1]


def live_objects(model: nn.Module) -> dict[str, int]:
    """How many objects of the kinds that a step makes there are."""
    gc.collect()
    types = [type(thing) for thing in gc.get_objects()]
    return {
        "tensors": sum(issubclass(kind, Tensor) for kind in types),
        "functions": types.count(FunctionType),
        "buffers": len(list(model.buffers())),
        "hooks": sum(
            len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in model.modules()
        )
        + sum(len(p._backward_hooks or ()) for p in model.parameters()),
    }
