"""Bad input is told what was given, what was expected, where, and how to mend it; and it changes nothing."""

from collections.abc import Callable
from functools import partial
from math import nan
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
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
    multi_step,
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


def changed(tree: dict[str, Tensor], **changes: Any) -> dict[str, Tensor]:
    """A copy of a dict with some keys set (`__` for `.`), or removed where the value is None."""
    changes = {name.replace("__", "."): value for name, value in changes.items()}
    return {k: v for k, v in {**tree, **changes}.items() if v is not None}


# Settings.


@pytest.mark.parametrize("ratio", [0.0, -0.5, 1.5, float("nan")])
def test_a_ratio_outside_its_range(ratio: float) -> None:
    with pytest.raises(ApartError, match=r"ratio=.*expected 0 < ratio ≤ 1"):
        step(ratio=ratio)


@pytest.mark.parametrize("epsilon", [-0.1, float("nan"), float("inf"), torch.tensor(-1.0), torch.tensor(float("nan"))])
def test_a_radius_that_is_negative_or_not_finite(epsilon: float | Tensor) -> None:
    with pytest.raises(ApartError, match=r"epsilon=.*expected a finite radius ≥ 0"):
        step(epsilon=epsilon)
    model = convolutional()
    apart_step = make_apart_step(model, F.cross_entropy)
    with pytest.raises(ApartError, match=r"epsilon=.*expected a finite radius ≥ 0"):
        apart_step(*split_state(model), images(), epsilon=epsilon)


def test_a_radius_with_a_dimension() -> None:
    with pytest.raises(ApartError, match=r"epsilon has shape \(3,\).*0-d tensor.*vmap"):
        step(epsilon=torch.zeros(3))


def test_fewer_than_minus_one_groups() -> None:
    with pytest.raises(ApartError, match=r"groups=-2; expected a positive number, 0 for one group, or -1"):
        step(groups=-2)


@pytest.mark.parametrize(("option", "value"), [("remainder", "ignore"), ("microbatches", 0), ("microbatches", 2.5)])
def test_other_settings_out_of_range(option: str, value: Any) -> None:
    with pytest.raises(ApartError, match=rf"{option}={value!r}; expected"):
        step(**{option: value})


@pytest.mark.parametrize(("option", "value"), [("steps", 0), ("steps", 1.5), ("step_size", 0.0), ("step_size", nan)])
def test_steps_of_a_rule_out_of_range(option: str, value: Any) -> None:
    with pytest.raises(ApartError, match=rf"{option}={value!r}; expected a positive"):
        multi_step(**{"steps": 2, option: value})


def test_a_rule_of_several_steps_where_there_are_no_further_passes() -> None:
    message = r"rule=multi_step\(3\) needs further passes.*Use it in make_apart_step.*or.*sign_perturbation"
    with pytest.raises(ApartError, match=message):
        APART(convolutional(), rule=multi_step(3))
    with pytest.raises(ApartError, match=message):
        make_one_pass_step(convolutional(), F.cross_entropy, epsilon=0.1, groups=2, rule=multi_step(3))
    with pytest.raises(ApartError, match=message):
        multi_step(3)({}, {}, torch.tensor(0.1))


def test_numbers_of_numpy_are_numbers() -> None:
    found = step(epsilon=np.float64(0.2), groups=np.int64(2), ratio=np.float32(0.5), microbatches=np.int32(2))
    expected = step(epsilon=0.2, groups=2, ratio=0.5, microbatches=2)
    torch.testing.assert_close(found._asdict(), expected._asdict(), rtol=0, atol=0)


def one_pass(batch: Any, **options: Any) -> Any:
    model = convolutional()
    options = {"epsilon": 0.1, "groups": 4} | options
    return make_one_pass_step(model, F.cross_entropy, **options)(*split_state(model), batch)


def test_one_pass_advises_what_it_has() -> None:
    with pytest.raises(
        ApartError, match=r"groups=4 does not divide the 6 samples.*drop_last=True in the data loader\.$"
    ):
        one_pass(images(6))
    with pytest.raises(ApartError, match=r"clean_fraction=1.0 make all of the groups clean"):
        one_pass(images(), clean_fraction=1.0)


# The batch.


class OfOne(nn.Module):
    """Takes one argument that is a dict or a list of tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.body = convolutional()

    def forward(self, inputs: Any) -> Tensor:
        return self.body(inputs["x"] if isinstance(inputs, dict) else inputs[0] + 0 * inputs[1])


@pytest.mark.parametrize("inputs", [{"x": images()[0], "mask": images()[0]}, [images()[0]] * 2])
def test_one_argument_that_is_a_container_is_refused_with_the_spelling_that_is_taken(inputs: Any) -> None:
    model, y = OfOne(), images()[1]
    with pytest.raises(ApartError, match=r"wrap it:\s+batch = \(\(input,\), target\)"):
        step(model, (inputs, y))
    torch.testing.assert_close(step(model, ((inputs,), y)).loss, step().loss)


def test_groups_that_do_not_divide_the_adversarial_samples() -> None:
    with pytest.raises(ApartError, match=r"groups=3 does not divide the 8 samples.*drop_last=True.*remainder='drop'"):
        step(groups=3)


def test_a_ratio_that_leaves_no_sample() -> None:
    with pytest.raises(ApartError, match=r"ratio=0.1 and groups=0 leave no sample of a batch of 8"):
        step(ratio=0.1)


def test_microbatches_that_do_not_divide_the_batch() -> None:
    with pytest.raises(ApartError, match=r"microbatches=3 does not divide the batch of 8 samples"):
        step(microbatches=3)


def test_leaves_of_different_length() -> None:
    x, y = images()
    with pytest.raises(ApartError, match=r"lengths \[8, 7\] on dim 0, and must agree"):
        step(batch=(x, y[:7]))


def test_a_batch_without_samples() -> None:
    with pytest.raises(ApartError, match=r"no tensor with a dimension, so it has no samples"):
        step(batch=(torch.tensor(1.0), torch.tensor(1)))


@pytest.mark.parametrize("batch", [torch.zeros(8, 2), (torch.zeros(8, 2, 4, 4),)])
def test_a_batch_that_is_no_pair(batch: Any) -> None:
    with pytest.raises(ApartError, match=r"the batch is .*expected \(input, target\)"):
        step(batch=batch)


def test_a_layer_that_sees_one_value_a_channel() -> None:
    model = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.BatchNorm2d(2), nn.Flatten()).double()
    with pytest.raises(ApartError, match=r"layer '1' sees one value a channel \(1 samples, 1×1 positions\)"):
        step(model, images(1))


def test_a_layer_that_sees_one_value_a_channel_in_each_group() -> None:
    model = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(2, 3)).double()
    with pytest.raises(
        ApartError,
        match=r"layer '1' sees one value a channel in each of 8 groups \(8 samples, 1×1 positions\).*"
        r"groups=4 leaves two",
    ):
        step(model, images(8), groups=-1)


def test_a_layer_with_input_of_another_rank_or_width() -> None:
    with pytest.raises(ApartError, match=r"layer '0' \(BatchNorm1d\) got input of shape \(8, 2, 4, 4\)"):
        step(nn.Sequential(nn.BatchNorm1d(2), nn.Flatten()).double())
    with pytest.raises(ApartError, match=r"layer '0' got input of shape \(8, 2, 4, 4\); expected \(N, 5, ...\)"):
        step(nn.Sequential(nn.BatchNorm2d(5), nn.Flatten()).double())


# The loss.


@pytest.mark.parametrize("loss_fn", [nn.CrossEntropyLoss, "mse", None])
def test_a_loss_that_is_no_function_of_output_and_target(loss_fn: Any) -> None:
    with pytest.raises(ApartError, match=r"loss_fn is .*expected a function \(output, target\) -> scalar"):
        step(loss_fn=loss_fn)


@pytest.mark.parametrize(
    ("loss_fn", "given"),
    [
        (lambda output, target: F.cross_entropy(output, target, reduction="none"), r"shape \(8,\)"),
        (lambda output, target: output.argmax(), r"int64"),
        (lambda output, target: 0.5, r"float"),
    ],
)
def test_a_loss_that_is_no_scalar(loss_fn: Callable[..., Any], given: str) -> None:
    with pytest.raises(ApartError, match=rf"loss_fn returned .*{given}.*expected a 0-d floating-point tensor"):
        step(loss_fn=loss_fn)


def test_inference_mode() -> None:
    with torch.inference_mode(), pytest.raises(ApartError, match=r"inference_mode is on.*no_grad is fine"):
        step()


# The state.


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"0__weight": None}, r"missing \['0.weight'\], unexpected \[\]"),
        ({"9__weight": torch.zeros(1)}, r"missing \[\], unexpected \['9.weight'\]"),
        ({"0__weight": torch.zeros(4, 2, 3, 4)}, r"'0.weight' has shape \(4, 2, 3, 4\).*expects \(4, 2, 3, 3\)"),
        ({"0__weight": torch.zeros(4, 2, 3, 3, dtype=torch.long)}, r"params\['0.weight'\] has dtype torch.int64"),
        ({"1__running_mean": torch.zeros(4)}, r"\['1.running_mean'\] are in params and in buffers"),
    ],
)
def test_params_that_do_not_fit_the_model(changes: dict[str, Any], message: str) -> None:
    model = convolutional()
    params, buffers = split_state(model)
    with pytest.raises(ApartError, match=message):
        make_apart_step(model, F.cross_entropy)(changed(params, **changes), buffers, images())


@pytest.mark.parametrize("changes", [{"1__running_mean": None}, {"1__running_mean": torch.zeros(3)}])
def test_buffers_that_do_not_fit_the_model(changes: dict[str, Any]) -> None:
    model = convolutional()
    params, buffers = split_state(model)
    with pytest.raises(ApartError, match=r"'1.running_mean'"):
        make_apart_step(model, F.cross_entropy)(params, changed(buffers, **changes), images())
    with pytest.raises(ApartError, match=r"'1.running_mean'"):
        functionalize(model)(params, changed(buffers, **changes), images()[0])


# The model.


def test_a_model_without_batch_norm() -> None:
    with pytest.raises(ApartError, match=r"Sequential has no batch-norm layer"):
        step(nn.Sequential(nn.Flatten(), nn.Linear(32, 3)))


def test_a_model_with_no_batch_norm_in_training_mode() -> None:
    with pytest.raises(ApartError, match=r"none of the 2 batch-norm layers.*model.train\(\)"):
        step(convolutional().eval())


def test_a_lazy_model_before_its_first_forward() -> None:
    model = nn.Sequential(nn.LazyConv2d(4, 3), nn.LazyBatchNorm2d(), nn.Flatten())
    with pytest.raises(ApartError, match=r"'0.weight' has no shape yet.*Run one forward"):
        make_apart_step(model, F.cross_entropy)


class ByHand(nn.BatchNorm2d):
    """A layer that normalises by itself, and moves its buffers in place."""

    def forward(self, x: Tensor) -> Tensor:
        mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3))
        self.running_mean.mul_(0.9).add_(mean.detach(), alpha=0.1)
        return (x - mean[:, None, None]) / (var[:, None, None] + self.eps).sqrt()


class ByHandUntracked(ByHand):
    def forward(self, x: Tensor) -> Tensor:
        return x / x.std()


@pytest.mark.parametrize("layer", [ByHand, ByHandUntracked])
def test_a_layer_that_bypasses_batch_norm(layer: type[nn.Module]) -> None:
    model = convolutional()
    model[4] = layer(5).double()
    with pytest.raises(ApartError, match=rf"layer '4' \({layer.__name__}\) ran without calling .*batch_norm"):
        step(model)


class Hidden(nn.Module):
    """Computes with a parameter that it reaches through a tuple."""

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
    guard = nn.Sequential(model, nn.Identity())
    apart_step = make_apart_step(guard, F.cross_entropy)
    params, buffers = split_state(guard)
    x, y = images()
    with pytest.raises(RuntimeError, match="expected input"):
        apart_step(params, buffers, (x[:, :1], y))
    assert apart_step(params, buffers, (x, y)).all_finite
    with pytest.raises(KeyError, match="a user's own error"):
        step(nn.Sequential(model, Raises()))


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
    from apart_func import perturbed_stats

    with pytest.raises(ApartError, match=r"layer '4' has statistics and no perturbation"):
        perturbed_stats(proxy.stats, {"1": shifts["1"]})
    with pytest.raises(ApartError, match=r"layer '4' has 5 channels, and its perturbation 4"):
        perturbed_stats(proxy.stats, {"1": shifts["1"], "4": shifts["1"]})


# Not an error.


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_is_reported_and_the_buffers_stay(bad: float) -> None:
    model = convolutional()
    params, buffers = split_state(model)
    out = make_apart_step(model, lambda *a: bad * F.cross_entropy(*a))(params, buffers, images())
    assert out.all_finite.shape == ()
    assert out.all_finite.dtype == torch.bool
    assert not out.all_finite
    torch.testing.assert_close(out.buffers, buffers, rtol=0, atol=0)
    assert not out.grads["0.weight"].isfinite().all()


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
