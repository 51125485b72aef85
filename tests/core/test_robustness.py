"""Accuracy under shifted running statistics: the shifts, their gradient, the curves, and what must not change."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from small import CLASSES, convolutional, images
from timm.layers import BatchNormAct2d
from torch import Tensor, nn
from torch.func import functional_call

from apart_func import (
    ApartError,
    BatchError,
    BatchStats,
    ModelError,
    Perturbation,
    SettingError,
    StateError,
    UsageError,
    sign_perturbation,
)
from apart_func.robustness import (
    accuracy_under_shift,
    area,
    evaluation_gradients,
    robustness,
    running_stats,
    shifted_running_stats,
)

TIGHT = {"rtol": 1e-9, "atol": 1e-12}
SEEDS = st.integers(0, 2**16)
RADII = (0.1, 0.3, 0.6)


def trained(seed: int = 0, dtype: torch.dtype = torch.float64) -> nn.Sequential:
    """A model with running statistics and affine parameters of its own that tells all classes, in training mode."""
    model = convolutional(dtype=dtype)
    generator = torch.Generator().manual_seed(seed)
    for layer in (model[1], model[4]):
        layer.running_mean.normal_(generator=generator)
        layer.running_var.uniform_(0.3, 2, generator=generator)
        nn.init.normal_(layer.weight, generator=generator)
        nn.init.normal_(layer.bias, generator=generator)
    model[4].eps = 0.1
    with torch.no_grad():
        scores = model.eval()(images(100, dtype)[0])
        scale = scores.std(dim=0).clamp(min=0.1)  # of random layers, some see nothing at all
        model[8].bias.copy_((model[8].bias - scores.mean(dim=0)) / scale)
        model[8].weight /= scale[:, None]
    return model.train()


class Reused(nn.Module):
    """A norm-act layer that is called twice, one without affine parameters, and dropout; a model of keywords."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm = BatchNormAct2d(2, act_layer=nn.SiLU, inplace=True)
        self.bare = nn.BatchNorm2d(2, affine=False)
        self.untracked = nn.BatchNorm2d(2, track_running_stats=False)
        self.head = nn.Sequential(nn.Dropout(), nn.Flatten(), nn.Linear(32, CLASSES))
        for layer in (self.norm, self.bare):
            layer.running_mean.normal_()
            layer.running_var.uniform_(0.3, 2)

    def forward(self, pixels: Tensor, scale: Tensor) -> Tensor:
        return self.head(self.untracked(self.bare(self.norm(scale * self.norm(pixels)))))


def by_keywords(seed: int = 1) -> tuple[dict[str, Tensor], Tensor]:
    x, y = images(seed=seed)
    return {"pixels": x, "scale": torch.tensor(2.0).double()}, y


def mixed_modes() -> nn.Module:
    model = trained()
    model[4].eval()
    return model


CASES = {
    "sequential": (trained, images),
    "one layer in evaluation mode": (mixed_modes, images),
    "norm-act, reused, without affine, by keywords": (lambda: Reused().double(), by_keywords),
}
cases = pytest.mark.parametrize("case", CASES)


def shifted_loss(model: nn.Module, batch, perturbation) -> Tensor:
    """The definition: another mean and variance in the buffers of a model in evaluation mode."""
    was_training = {module: module.training for module in model.modules()}
    stats = shifted_running_stats(running_stats(model), perturbation, eps_of(model))
    buffers = {f"{name}.running_{key}": value for name, s in stats.items() for key, value in s._asdict().items()}
    inputs, target = batch
    args, kwargs = ((), inputs) if isinstance(inputs, dict) else ((inputs,), {})
    loss = F.cross_entropy(functional_call(model.eval(), buffers, args, kwargs), target)
    for module, mode in was_training.items():
        module.training = mode
    return loss.detach()


def eps_of(model: nn.Module) -> dict[str, float]:
    return {name: model.get_submodule(name).eps for name in running_stats(model)}


def zero_shift(stats) -> dict[str, Perturbation]:
    return {name: Perturbation(*map(torch.zeros_like, moments)) for name, moments in stats.items()}


# The shift.


@settings(max_examples=30)
@given(seed=SEEDS, epsilon=st.floats(0, 0.99), eps=st.sampled_from([1e-5, 1e-3, 0.1]))
def test_shifted_statistics_stay_within_the_radius(seed: int, epsilon: float, eps: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    mean, var, du, ds = torch.rand(4, 7, generator=generator, dtype=torch.float64)
    stats = {"norm": BatchStats(4 * mean - 2, var)}
    shift = {"norm": Perturbation(epsilon * (2 * du - 1), epsilon * (2 * ds - 1))}
    after = shifted_running_stats(stats, shift, eps)["norm"]
    assert ((after.mean - stats["norm"].mean).abs() <= epsilon * stats["norm"].mean.abs() + 1e-12).all()
    ratio = torch.sqrt((var + eps) / (after.var + eps))
    assert ((ratio - 1).abs() <= epsilon + 1e-9).all()
    torch.testing.assert_close(ratio, 1 + shift["norm"].scale, **TIGHT)


@given(seed=SEEDS, dtype=st.sampled_from([torch.float32, torch.float64]))
def test_a_zero_shift_returns_the_same_bits(seed: int, dtype: torch.dtype) -> None:
    stats = running_stats(trained(seed, dtype))
    after = shifted_running_stats(stats, zero_shift(stats))
    assert all(torch.equal(a, b) for name in stats for a, b in zip(after[name], stats[name], strict=True))


def test_only_the_layers_of_the_perturbation_are_shifted() -> None:
    stats = running_stats(trained())
    assert list(stats) == ["1", "4"]
    assert list(shifted_running_stats(stats, {"4": zero_shift(stats)["4"]})) == ["4"]


# The gradient.


@cases
def test_gradients_are_those_of_the_loss_under_shifted_buffers(case: str) -> None:
    build, make_batch = CASES[case]
    model, batch, step = build(), make_batch(), 1e-5
    gradients = evaluation_gradients(model, F.cross_entropy, [batch])
    stats = running_stats(model)
    assert list(gradients) == list(stats)
    for name, gradient in gradients.items():
        for part, values in gradient._asdict().items():
            for channel in range(len(values)):
                losses = []
                for sign in (1, -1):
                    shift = zero_shift(stats)
                    getattr(shift[name], part)[channel] = sign * step
                    losses.append(shifted_loss(model, batch, shift))
                torch.testing.assert_close(values[channel], (losses[0] - losses[1]) / (2 * step), rtol=1e-5, atol=1e-9)


@settings(max_examples=10)
@given(seed=SEEDS, cut=st.integers(1, 7))
def test_gradients_do_not_depend_on_how_the_data_is_cut_into_batches(seed: int, cut: int) -> None:
    model, (x, y) = trained(seed), images(8, seed=seed)
    whole = evaluation_gradients(model, F.cross_entropy, [(x, y)])
    parts = evaluation_gradients(model, F.cross_entropy, ((a, b) for a, b in zip(x.split(cut), y.split(cut))))  # noqa: B905
    torch.testing.assert_close(whole, parts, **TIGHT)


@settings(max_examples=15)
@given(seed=SEEDS)
def test_the_adversarial_shift_raises_the_loss_by_the_radius_times_the_size_of_the_gradient(seed: int) -> None:
    model, batch, epsilon = trained(seed), images(seed=seed), 1e-6
    gradients = evaluation_gradients(model, F.cross_entropy, [batch])
    stats = running_stats(model)
    shift = sign_perturbation(stats, gradients, torch.tensor(epsilon, dtype=torch.float64))
    size = sum(part.abs().sum() for gradient in gradients.values() for part in gradient)
    assume(size > 1e-3)  # of random layers, some let nothing through
    raised = shifted_loss(model, batch, shift) - shifted_loss(model, batch, zero_shift(stats))
    assert raised > 0
    torch.testing.assert_close(raised / epsilon, size, rtol=1e-3, atol=1e-6)


def test_a_layer_that_shares_its_parameters_has_gradients_of_its_own() -> None:
    model = nn.Sequential(nn.BatchNorm1d(3), nn.Tanh(), nn.BatchNorm1d(3)).double()
    model[2].weight = model[0].weight
    x, y = torch.randn(6, 3).double(), torch.randint(3, (6,))
    apart = nn.Sequential(nn.BatchNorm1d(3), nn.Tanh(), nn.BatchNorm1d(3)).double()
    torch.testing.assert_close(
        evaluation_gradients(model, F.cross_entropy, [(x, y)]), evaluation_gradients(apart, F.cross_entropy, [(x, y)])
    )


def test_a_layer_that_is_not_called_has_zero_gradients_and_a_flat_curve() -> None:
    model = trained()
    model[0].spare = nn.BatchNorm2d(3).double()
    gradients = evaluation_gradients(model, F.cross_entropy, [images()])
    assert all((part == 0).all() for part in gradients["0.spare"])
    assert all((part != 0).any() for part in gradients["1"])
    result = robustness(model, F.cross_entropy, [images()], [images(400, seed=2)], RADII)
    assert result.layer_adversarial["0.spare"].unique().numel() == 1
    assert result.layer_adversarial["1"].unique().numel() > 1


# Accuracy.


@cases
def test_no_shift_gives_the_ordinary_accuracy(case: str) -> None:
    build, make_batch = CASES[case]
    model, batches = build(), [make_batch(seed=seed) for seed in range(5)]
    result = robustness(model, F.cross_entropy, batches, batches, RADII)
    model.eval()
    right = [(model(**x) if isinstance(x, dict) else model(x)).argmax(1) == y for x, y in batches]
    expected = torch.cat(right).double().mean()
    for curve in (result.random, result.adversarial, *result.layer_random.values()):
        assert curve[0] == expected
    shift = zero_shift(running_stats(model))
    assert accuracy_under_shift(model, [shift, {}], batches).tolist() == [expected, expected]


def test_accuracy_is_that_of_the_model_with_the_shifted_buffers_loaded() -> None:
    model, (x, y) = trained(dtype=torch.float32), images(200, torch.float32)
    stats = running_stats(model)
    shift = {name: Perturbation(*(0.4 * torch.randn_like(part).sign() for part in s)) for name, s in stats.items()}
    found = accuracy_under_shift(model, [shift], [(x[:150], y[:150]), (x[150:], y[150:])])
    for name, moments in shifted_running_stats(stats, shift, eps_of(model)).items():
        model.get_submodule(name).running_mean.copy_(moments.mean)
        model.get_submodule(name).running_var.copy_(moments.var)
    assert found.item() == pytest.approx((model.eval()(x).argmax(1) == y).double().mean().item(), abs=1e-12)


def test_the_curves_are_accuracies_under_the_shifts_that_they_say() -> None:
    model, held_out, test = trained(), [images(seed=3)], [images(100, seed=4)]
    result = robustness(model, F.cross_entropy, held_out, test, RADII, draws=2, layer_draws=1)
    gradients, stats = evaluation_gradients(model, F.cross_entropy, held_out), running_stats(model)
    along = [sign_perturbation(stats, gradients, torch.tensor(e).double()) for e in RADII]
    torch.testing.assert_close(result.radii, torch.tensor([0, *RADII]).double())
    assert torch.equal(result.adversarial[1:], accuracy_under_shift(model, along, test))
    assert list(result.layer_adversarial) == list(result.layer_random) == ["1", "4"]
    for layer, curve in result.layer_adversarial.items():
        alone = [{**zero_shift(stats), layer: shift[layer]} for shift in along]
        assert torch.equal(curve[1:], accuracy_under_shift(model, alone, test))
    assert not torch.equal(result.layer_adversarial["1"], result.layer_adversarial["4"])


def test_a_seed_decides_the_random_shifts_and_no_other_generator_does() -> None:
    model, data = trained(), [images(100)]
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first, second, other = (
        robustness(model, F.cross_entropy, data, data, RADII, seed=seed).random for seed in (0, 0, 1)
    )
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first, second)
    assert not torch.equal(first, other)


def test_a_random_curve_is_the_mean_over_draws() -> None:
    batch = images(1, seed=4)
    result = robustness(trained(), F.cross_entropy, [batch], [batch], (0.6,), draws=10, layer_draws=10)
    for curve in (result.random, *result.layer_random.values()):
        tenths = 10 * curve[1].item()  # right or wrong on the one sample, in ten draws
        assert tenths == pytest.approx(round(tenths))
        assert curve[0] in (0, 1)
    assert 0 < result.random[1] < 1


def test_every_draw_has_new_signs_for_every_channel() -> None:
    """With a readout that says which signs were drawn."""
    model = nn.BatchNorm1d(400, eps=0).double()  # the model itself is the layer, of no name
    model.running_mean.fill_(1.0)
    x, seen = torch.zeros(1, 400).double(), list[Tensor]()
    x[0, 0] = 1e9
    model.register_forward_hook(lambda module, inputs, output: seen.append(output[0, 1:]))
    robustness(model, F.cross_entropy, [(x, torch.tensor([0]))], [(x, torch.tensor([0]))], (0.5,), draws=3)
    # y = −μ'/s' = −(1 ± ½)(1 ± ½): four values, each in about a quarter of the channels, other ones in every draw
    draws = seen[3:6]
    for y in draws:
        values, counts = y.unique(return_counts=True)
        torch.testing.assert_close(values, torch.tensor([-2.25, -0.75, -0.25]).double())
        assert (counts > 60).all()
    assert not torch.equal(draws[0], draws[1])


def test_a_map_of_class_scores_is_measured_by_position() -> None:
    model = nn.BatchNorm2d(3).double()
    x = torch.randn(2, 3, 4, 4).double()
    y = x.argmax(1)
    y[:, 0] = (y[:, 0] + 1) % 3
    assert accuracy_under_shift(model, [{}], [(x, y)]).item() == 0.75


# The area.


@given(level=st.floats(0, 1), radii=st.lists(st.floats(0.01, 0.99), min_size=1, unique=True).map(sorted))
def test_the_area_under_a_constant_is_the_constant(level: float, radii: list[float]) -> None:
    radii_ = torch.tensor([0.0, *radii]).double()
    torch.testing.assert_close(area(radii_, torch.full_like(radii_, level)), torch.tensor(level).double())


def test_the_area_weighs_radii_by_their_distance() -> None:
    radii = torch.tensor([0, 0.1, 0.5]).double()
    curves = torch.tensor([[1, 0.5, 0.5], [1, 1, 0]]).double()
    torch.testing.assert_close(area(radii, curves), torch.tensor([0.55, 0.6]).double())


# What must not change.


@cases
def test_the_model_its_modes_and_its_gradients_are_left_alone(case: str) -> None:
    build, make_batch = CASES[case]
    model, batch = build(), make_batch()
    modes = [module.training for module in model.modules()]
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    versions = [tensor._version for tensor in model.state_dict().values()]
    with torch.no_grad():  # as a loop that evaluates is
        robustness(model, F.cross_entropy, [batch], [batch], RADII)
    assert [module.training for module in model.modules()] == modes
    assert [tensor._version for tensor in model.state_dict().values()] == versions
    torch.testing.assert_close(dict(model.state_dict()), state, rtol=0, atol=0)
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())


# What is refused.

DATA = (images(),)
LAZY = nn.Sequential(nn.LazyLinear(3), nn.BatchNorm1d(3))


def curves(held_out: Any = DATA, test: Any = DATA, radii: Any = RADII, **options: Any) -> Any:
    return robustness(trained(), F.cross_entropy, held_out, test, radii, **options)


def shifted(layer: str, channels: int, scale: float) -> Any:
    shift = {layer: Perturbation(torch.zeros(channels), torch.full((channels,), scale))}
    return accuracy_under_shift(trained(), [shift], [images()])


@pytest.mark.parametrize("radii", [(), (0.0, 0.1), (0.2, 0.1), (0.1, 1.0), (0.1, float("nan")), (-0.1,)])
def test_radii_that_do_not_ascend_between_zero_and_one_are_refused(radii: tuple[float, ...]) -> None:
    with pytest.raises(SettingError, match=r"radii=.*ascending numbers in \(0, 1\)"):
        curves(radii=radii)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: curves(held_out=[]), BatchError, r"no sample.*used up"),
        (lambda: curves(test=iter(())), BatchError, r"no sample.*used up"),
        (lambda: curves(draws=0), SettingError, "draws ≥ 1"),
        (lambda: shifted("4", 5, 1.0), SettingError, r"layer '4'.*radius below 1"),
        (lambda: shifted("0", 4, 0.0), StateError, r"\['0'\].*\['1', '4'\]"),
        (lambda: running_stats(nn.Linear(2, 2)), ModelError, "track_running_stats=True"),
        (lambda: running_stats(nn.BatchNorm1d(2, track_running_stats=False)), ModelError, "track_running_stats=True"),
        (
            lambda: accuracy_under_shift(trained(), [{}], [(images()[0], torch.zeros(8, 1))]),
            UsageError,
            r"output is \(8, 3\) and the target \(8, 1\)",
        ),
        (
            lambda: evaluation_gradients(trained(), nn.CrossEntropyLoss(reduction="none"), [images()]),
            UsageError,
            r"shape \(8,\).*loss.mean",
        ),
        (lambda: evaluation_gradients(LAZY, F.cross_entropy, DATA), ModelError, "Run one forward"),
    ],
)
def test_what_cannot_be_measured_is_refused_by_name(call: Any, error: type[ApartError], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
