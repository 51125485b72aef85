"""Bad input is told what was given, what was expected, where, and how to mend it; and it changes nothing."""

from collections.abc import Callable
from functools import partial
from math import inf, nan
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from loops import drop_in_step
from small import convolutional, images
from torch import Tensor, nn

from apart_func import (
    APART,
    ApartError,
    Perturbation,
    adversarial_pass,
    functionalize,
    init_perturbation,
    make_apart_step,
    make_one_pass_step,
    perturbed_stats,
    proxy_pass,
    sign_perturbation,
    split_state,
)


def step(model: nn.Module | None = None, batch: Any = None, loss_fn: Any = F.cross_entropy, **options: Any) -> Any:
    """Make a step and take it, and check that a failure leaves everything as it was."""
    model = convolutional() if model is None else model
    params, buffers = split_state(model)
    batch = images() if batch is None else batch
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    try:
        return make_apart_step(model, loss_fn, **options)(params, buffers, batch)
    finally:
        torch.testing.assert_close(dict(model.state_dict()), before, rtol=0, atol=0)
        assert not torch.overrides._get_current_function_mode_stack()


# Settings, batches and losses of a step.

X, Y = images()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        *(({"ratio": ratio}, r"ratio=.*expected 0 < ratio ≤ 1") for ratio in (0.0, -0.5, 1.5, nan)),
        ({"groups": -2}, r"groups=-2; expected a positive number, 0 for one group, or -1"),
        ({"remainder": "ignore"}, r"remainder='ignore'; expected"),
        ({"microbatches": 0}, r"microbatches=0; expected"),
        ({"microbatches": 2.5}, r"microbatches=2.5; expected"),
        ({"groups": 3}, r"groups=3 does not divide the 8 samples.*drop_last=True.*remainder='drop'"),
        ({"ratio": 0.1}, r"ratio=0.1 and groups=0 leave no sample of a batch of 8"),
        ({"microbatches": 3}, r"microbatches=3 does not divide the batch of 8 samples"),
        ({"batch": (X, Y[:7])}, r"lengths \[8, 7\] on dim 0, and must agree"),
        ({"batch": (torch.tensor(1.0), torch.tensor(1))}, r"no tensor with a dimension, so it has no samples"),
        *(({"batch": batch}, r"the batch is .*expected \(input, target\)") for batch in (X, (X,))),
        *(
            ({"loss_fn": loss_fn}, r"loss_fn is .*expected a function \(output, target\) -> scalar")
            for loss_fn in (nn.CrossEntropyLoss, "mse", None)
        ),
        *(
            ({"loss_fn": loss_fn}, rf"loss_fn returned .*{returned}.*expected a 0-d floating-point tensor")
            for loss_fn, returned in (
                (partial(F.cross_entropy, reduction="none"), r"shape \(8,\)"),
                (lambda output, target: output.argmax(), r"int64"),
                (lambda output, target: 0.5, r"float"),
            )
        ),
    ],
)
def test_a_setting_a_batch_or_a_loss_that_is_wrong(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ApartError, match=message):
        step(**given)


@pytest.mark.parametrize("epsilon", [-0.1, nan, inf, torch.tensor(-1.0), torch.tensor(nan), torch.zeros(3)])
def test_a_radius_that_is_negative_not_finite_or_has_a_dimension(epsilon: float | Tensor) -> None:
    message = r"epsilon=.*expected a finite radius ≥ 0|epsilon has shape \(3,\).*expected.*0-d tensor.*vmap"
    model, apart = convolutional(), APART(convolutional())
    for call in (
        lambda: make_apart_step(model, F.cross_entropy, epsilon=epsilon),
        lambda: make_apart_step(model, F.cross_entropy)(*split_state(model), images(), epsilon=epsilon),
        lambda: APART(model, epsilon),
        lambda: apart.set_epsilon(epsilon),
    ):
        with pytest.raises(ApartError, match=message):
            call()
    assert apart.epsilon == 0.1


def test_numbers_of_numpy_are_numbers() -> None:
    found = step(epsilon=np.float64(0.2), groups=np.int64(2), ratio=np.float32(0.5), microbatches=np.int32(2))
    expected = step(epsilon=0.2, groups=2, ratio=0.5, microbatches=2)
    torch.testing.assert_close(found._asdict(), expected._asdict(), rtol=0, atol=0)


class OfOne(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = convolutional()

    def forward(self, inputs: Any) -> Tensor:
        return self.body(inputs["x"] if isinstance(inputs, dict) else inputs[0] + 0 * inputs[1])


@pytest.mark.parametrize("inputs", [{"x": X, "mask": X}, [X, X]])
def test_one_argument_that_is_a_container_is_refused_with_the_spelling_that_is_taken(inputs: Any) -> None:
    with pytest.raises(ApartError, match=r"wrap it:\s+batch = \(\(input,\), target\)"):
        step(OfOne(), (inputs, Y))
    torch.testing.assert_close(step(OfOne(), ((inputs,), Y)).loss, step().loss)


# The model, in the functional step and in the drop-in.


class ByHand(nn.BatchNorm2d):
    """A layer that normalises by itself, and moves its buffers in place."""

    def forward(self, x: Tensor) -> Tensor:
        mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3))
        self.running_mean.mul_(0.9).add_(mean.detach(), alpha=0.1)
        return (x - mean[:, None, None]) / (var[:, None, None] + self.eps).sqrt()


class ByHandUntracked(ByHand):
    def forward(self, x: Tensor) -> Tensor:
        return x / x.std()


def pooled(*first: nn.Module) -> nn.Module:
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), *first, nn.Flatten(), nn.Linear(2, 3)).double()


@pytest.mark.parametrize("take", [step, drop_in_step])
@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        (lambda: pooled(), {}, r"Sequential has no batch-norm layer"),
        (lambda: convolutional().eval(), {}, r"none of the 2 batch-norm layers.*model.train\(\)"),
        (
            lambda: pooled(nn.BatchNorm2d(2)),
            {"batch": images(1)},
            r"layer '1' sees one value a channel \(1 samples, 1×1 positions\)",
        ),
        (
            lambda: pooled(nn.BatchNorm2d(2)),
            {"groups": -1},
            r"layer '1' sees one value a channel in each of 8 groups \(8 samples, 1×1 positions\).*groups=4 leaves two",
        ),
        (lambda: pooled(nn.BatchNorm1d(2)), {}, r"layer '1' \(BatchNorm1d\) got input of shape \(8, 2, 1, 1\)"),
        (lambda: pooled(nn.BatchNorm2d(5)), {}, r"layer '1' got input of shape \(8, 2, 1, 1\); expected \(N, 5, ...\)"),
        (lambda: pooled(ByHand(2)), {}, r"layer '1' \(ByHand\) ran without calling .*batch_norm"),
        (lambda: pooled(ByHandUntracked(2)), {}, r"layer '1' \(ByHandUntracked\) ran without calling .*batch_norm"),
    ],
)
def test_a_model_or_a_layer_that_cannot_be_perturbed(take: Any, model: Any, options: Any, message: str) -> None:
    with pytest.raises(ApartError, match=message):
        take(model(), **{"batch": images(), **options})


@pytest.mark.parametrize("take", [step, drop_in_step])
def test_inference_mode(take: Any) -> None:
    with torch.inference_mode(), pytest.raises(ApartError, match=r"inference_mode"):
        take(convolutional(), images())


def test_a_lazy_model_before_its_first_forward() -> None:
    model = nn.Sequential(nn.LazyConv2d(4, 3), nn.LazyBatchNorm2d(), nn.Flatten())
    with pytest.raises(ApartError, match=r"'0.weight' has no shape yet.*Run one forward"):
        make_apart_step(model, F.cross_entropy)


class Hidden(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.BatchNorm2d(2)
        self.linear = nn.Linear(32, 3)
        self.tensors = (self.linear.weight,)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.layer(x).flatten(1), self.tensors[0])


def test_a_parameter_that_is_reached_by_no_module() -> None:
    with pytest.raises(ApartError, match=r"the model reached 'linear.weight' through something that is neither"):
        step(Hidden().double())


class Raises(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        raise KeyError("a user's own error")


def test_an_error_of_the_model_itself_is_passed_on_and_the_step_can_be_used_again() -> None:
    model = convolutional()
    apart_step, state = make_apart_step(model, F.cross_entropy), split_state(model)
    with pytest.raises(RuntimeError, match="expected input"):
        apart_step(*state, (X[:, :1], Y))
    assert apart_step(*state, (X, Y)).all_finite
    with pytest.raises(KeyError, match="a user's own error"):
        step(nn.Sequential(model, Raises()))


# The state.


@pytest.mark.parametrize(
    ("params", "buffers", "message"),
    [
        ({"0.weight": None}, {}, r"missing \['0.weight'\], unexpected \[\]"),
        ({"9.weight": torch.zeros(1)}, {}, r"missing \[\], unexpected \['9.weight'\]"),
        ({"0.weight": torch.zeros(4, 2, 3, 4)}, {}, r"'0.weight' has shape \(4, 2, 3, 4\).*expects \(4, 2, 3, 3\)"),
        ({"0.weight": torch.zeros(4, 2, 3, 3).long()}, {}, r"params\['0.weight'\] has dtype torch.int64"),
        ({"1.running_mean": torch.zeros(4)}, {}, r"\['1.running_mean'\] are in params and in buffers"),
        ({}, {"1.running_mean": None}, r"'1.running_mean'"),
        ({}, {"1.running_mean": torch.zeros(3)}, r"'1.running_mean'"),
    ],
)
def test_a_state_that_does_not_fit_the_model(params: dict[str, Any], buffers: dict[str, Any], message: str) -> None:
    """Some tensors are others here, or, where it says None, none."""
    model = convolutional()
    state = [
        {name: value for name, value in {**given, **changed}.items() if value is not None}
        for given, changed in zip(split_state(model), (params, buffers), strict=True)
    ]
    with pytest.raises(ApartError, match=message):
        make_apart_step(model, F.cross_entropy)(*state, images())
    with pytest.raises(ApartError):
        functionalize(model)(*state, images()[0])


# The perturbation.


@pytest.mark.parametrize(
    ("shifts", "message"),
    [
        ({}, r"missing \['1', '4'\]"),
        ({"1": (4,), "4": (5,), "7": (1,)}, r"unexpected \['7'\]"),
        ({"1": (4,), "4": (4,)}, r"layer '4' has shape \(4,\); expected \(5,\), or \(2, 5\)"),
        ({"1": (4, 4), "4": (5,)}, r"layer '1' has shape \(4, 4\); expected \(4,\), or \(2, 4\)"),
    ],
)
def test_a_perturbation_that_does_not_fit_the_layers(shifts: dict[str, tuple[int, ...]], message: str) -> None:
    model = convolutional()
    tree = {name: Perturbation(torch.zeros(shape), torch.zeros(shape)) for name, shape in shifts.items()}
    with pytest.raises(ApartError, match=message):
        adversarial_pass(functionalize(model), F.cross_entropy, *split_state(model), images(), tree, groups=2)


@pytest.mark.parametrize("change", [lambda p: (p.mean,), lambda p: (*p, p.scale), lambda p: p.mean, lambda p: None])
def test_a_layers_perturbation_that_is_no_pair(change: Callable[..., Any]) -> None:
    model = convolutional()
    shifts = {name: change(shift) for name, shift in init_perturbation(model).items()}
    for make in (make_apart_step, partial(make_one_pass_step, epsilon=0.1, groups=4)):
        with pytest.raises(ApartError, match=r"the perturbation of layer '1' is .*expected \(mean, scale\)"):
            make(model, F.cross_entropy)(*split_state(model), images(), perturbation=shifts)


def test_statistics_without_a_perturbation() -> None:
    model = convolutional()
    proxy = proxy_pass(functionalize(model), F.cross_entropy, *split_state(model), images())
    shifts = sign_perturbation(proxy.stats, proxy.stat_grads, torch.tensor(0.1))
    with pytest.raises(ApartError, match=r"layer '4' has statistics and no perturbation"):
        perturbed_stats(proxy.stats, {"1": shifts["1"]})
    with pytest.raises(ApartError, match=r"layer '4' has 5 channels, and its perturbation 4"):
        perturbed_stats(proxy.stats, {"1": shifts["1"], "4": shifts["1"]})


# Not an error.


def test_a_gradient_that_is_not_finite_under_a_finite_loss_is_reported() -> None:
    model = convolutional()
    params, buffers = split_state(model)

    def loss_fn(output: Tensor, target: Tensor) -> Tensor:
        # The square root of an exact zero: a finite loss, and an infinite slope.
        return F.cross_entropy(output, target) + (output[0, 0] * 0).abs().sqrt()

    out = make_apart_step(model, loss_fn)(params, buffers, images())
    assert out.loss.isfinite()
    assert not out.all_finite
    torch.testing.assert_close(out.buffers, buffers, rtol=0, atol=0)
