"""Laws of the method, for any numbers: the radius first, then what must not matter."""

from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from small import convolutional, images
from torch import Tensor
from torch.func import vmap
from torch.utils._pytree import tree_leaves, tree_map

from apart_func import (
    BatchStats,
    Perturbation,
    Rule,
    RuleKind,
    SettingError,
    StatGrads,
    adversarial_pass,
    functionalize,
    init_perturbation,
    l2_perturbation,
    make_apart_step,
    make_one_pass_step,
    perturbed_stats,
    random_sign_perturbation,
    random_signs,
    rule_kind,
    sign_perturbation,
    split_state,
)
from apart_func.rules import kind_of

settings.register_profile("laws", settings.get_profile("deterministic"), max_examples=50)
settings.load_profile("laws")

DTYPES = st.sampled_from([torch.float32, torch.float64])
RADII = st.floats(0, 4, allow_subnormal=False)
SEEDS = st.integers(0, 2**31)
# Rounding of a handful of float64 operations on numbers of order one.
TIGHT = {"rtol": 1e-9, "atol": 1e-13}


def random_tree(seed: int, dtype: torch.dtype, channels: int = 6) -> dict[str, StatGrads]:
    """Statistic gradients of two layers, some of them exactly zero."""
    generator = torch.Generator().manual_seed(seed)

    def vector() -> Tensor:
        values = torch.randn(channels, generator=generator, dtype=dtype)
        return values * (torch.rand(channels, generator=generator) > 0.3)

    return {name: StatGrads(vector(), vector()) for name in ("a", "b.c")}


def random_stats(seed: int, dtype: torch.dtype) -> dict[str, BatchStats]:
    """Means of any sign and variances from 1e-8 to 1e4."""
    generator = torch.Generator().manual_seed(seed)
    mean = torch.randn(6, generator=generator, dtype=dtype) * 10
    var = 10 ** (torch.rand(6, generator=generator, dtype=dtype) * 12 - 8)
    return {"a": BatchStats(mean, var), "b.c": BatchStats(-mean, 1 / var)}


def step_of(model: Any, batch: Any, **options: Any) -> Any:
    params, buffers = split_state(model)
    return make_apart_step(model, F.cross_entropy, **options)(params, buffers, batch)


def plain_gradients(model: Any, batch: Any) -> dict[str, Tensor]:
    loss = F.cross_entropy(model(batch[0]), batch[1])
    names, tensors = zip(*model.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, tensors), strict=True))


# Every rule.

RULES = {
    "sign": sign_perturbation,
    "random sign": random_sign_perturbation,
    "l2": l2_perturbation,
}

every_rule = pytest.mark.parametrize("rule", RULES.values(), ids=RULES.keys())


@every_rule
@given(seed=SEEDS, epsilon=RADII, dtype=DTYPES)
def test_a_rule_returns_a_tree_like_that_of_the_gradients_within_the_radius(rule, seed, epsilon, dtype):
    stats, gradients = random_stats(seed, dtype), random_tree(seed, dtype)
    radius = torch.tensor(epsilon, dtype=dtype)
    shifts = rule(stats, gradients, radius)
    assert list(shifts) == list(gradients)
    for layer, shift in shifts.items():
        assert isinstance(shift, Perturbation)
        for delta, g in zip(shift, gradients[layer], strict=True):
            assert (delta.shape, delta.dtype, delta.device) == (g.shape, g.dtype, g.device)
            assert (delta.abs() <= radius).all()


@every_rule
def test_a_rule_changes_no_argument(rule: Rule) -> None:
    held = [random_stats(0, torch.float64), random_tree(0, torch.float64), torch.tensor(0.1).double()]
    before = tree_map(torch.clone, held)
    rule(*held)
    torch.testing.assert_close(held, before, rtol=0, atol=0)


@every_rule
def test_a_zero_radius_moves_nothing(rule: Rule) -> None:
    gradients = random_tree(0, torch.float32)
    shifts = rule(random_stats(0, torch.float32), gradients, torch.tensor(0.0))
    assert not any(delta.any() for delta in tree_leaves(shifts))


@every_rule
def test_a_rule_mapped_over_the_radius_is_the_rule_at_each_radius(rule: Rule) -> None:
    stats, gradients = random_stats(0, torch.float64), random_tree(0, torch.float64)
    radii = torch.tensor([0.0, 0.1, 0.7]).double()
    torch.manual_seed(0)
    together = vmap(lambda e: rule(stats, gradients, e), randomness="same")(radii)
    for i, radius in enumerate(radii):
        torch.manual_seed(0)
        one = rule(stats, gradients, radius)
        torch.testing.assert_close(tree_map(lambda t, i=i: t[i], together), one, **TIGHT)


@pytest.mark.usefixtures("dynamo")
@every_rule
def test_a_rule_compiles_to_one_graph(rule: Rule) -> None:
    compiled = torch.compile(rule, backend="eager", fullgraph=True)
    arguments = random_stats(0, torch.float64), random_tree(0, torch.float64), torch.tensor(0.1).double()
    torch.manual_seed(0)
    out = compiled(*arguments)
    torch.manual_seed(0)
    torch.testing.assert_close(out, rule(*arguments), **TIGHT)


# The radius, rule by rule.


@given(seed=SEEDS, epsilon=RADII, dtype=DTYPES)
def test_every_shift_stays_within_the_radius_and_reaches_it_where_the_gradient_is_not_zero(seed, epsilon, dtype):
    gradients = random_tree(seed, dtype)
    radius = torch.tensor(epsilon, dtype=dtype)
    shifts = sign_perturbation({}, gradients, radius)
    assert shifts.keys() == gradients.keys()
    for layer, shift in shifts.items():
        for delta, g in zip(shift, gradients[layer], strict=True):
            assert delta.dtype == dtype
            assert torch.equal(delta.abs(), torch.where(g == 0, 0, radius))
            assert torch.equal(delta.sign(), g.sign() * radius.sign())


def drawn(seed: int, gradients: dict[str, StatGrads]) -> dict[str, Perturbation]:
    torch.manual_seed(seed)
    return random_sign_perturbation({}, gradients, torch.tensor(0.3))


@given(seed=SEEDS)
def test_random_signs_reach_the_radius_everywhere_and_depend_on_the_seed_alone(seed: int) -> None:
    gradients, others = random_tree(seed, torch.float32, 64), random_tree(seed + 1, torch.float32, 64)
    shifts = drawn(seed, gradients)
    for delta in tree_leaves(shifts):
        assert torch.equal(delta.abs(), torch.full_like(delta, 0.3))
        assert delta.unique().numel() == 2  # of 64 signs, one in 2⁶³ times all are alike
    torch.testing.assert_close(shifts, drawn(seed, others), rtol=0, atol=0)
    assert not torch.equal(shifts["a"].mean, drawn(seed + 1, gradients)["a"].mean)
    assert not torch.equal(shifts["a"].mean, shifts["a"].scale)


def test_random_signs_are_as_often_plus_as_minus_in_both_parts() -> None:
    """The share of 10,000 fair signs is within five of its standard deviations, 0.025, of a half."""
    gradients = random_tree(0, torch.float32, 10_000)
    torch.manual_seed(0)
    for delta in tree_leaves(random_sign_perturbation({}, gradients, torch.tensor(0.1))):
        assert (delta > 0).double().mean().item() == pytest.approx(0.5, abs=0.025)


@given(seed=SEEDS, epsilon=st.floats(0.01, 0.99), dtype=DTYPES)
def test_random_signs_of_a_key_are_those_of_the_key_alone(seed: int, epsilon: float, dtype: torch.dtype) -> None:
    layers = random_tree(seed, dtype, 64)
    one, same, other = (random_signs(layers, epsilon, torch.Generator().manual_seed(seed + k)) for k in (0, 0, 1))
    radius = torch.tensor(epsilon, dtype=dtype)
    assert all(torch.equal(delta.abs(), radius.expand(64)) for delta in tree_leaves(one))
    torch.testing.assert_close(one, same, rtol=0, atol=0)
    assert not torch.equal(one["a"].mean, other["a"].mean)


def test_what_a_step_has_to_know_of_a_rule_is_known_of_one_whose_arguments_are_fixed() -> None:
    @rule_kind(is_bounded=True, needs_gradients=False)
    def own(stats: Any, stat_grads: Any, epsilon: Tensor, sign: float = 1.0) -> Any:
        return {layer: Perturbation(sign * epsilon + 0 * g.mean, 0 * g.scale) for layer, g in stat_grads.items()}

    assert kind_of(own) == RuleKind(is_bounded=True, draws=True, needs_gradients=False)
    assert kind_of(lambda *_: {}) == RuleKind() == RuleKind(is_bounded=False, draws=True, needs_gradients=True)
    for rule in (own, *RULES.values()):
        assert kind_of(partial(partial(rule), {})) == kind_of(rule)
    generator = torch.Generator().manual_seed(0)
    for rule in (partial(own, sign=-1.0), partial(random_sign_perturbation, generator=generator)):
        model = convolutional()
        step = make_one_pass_step(model, F.cross_entropy, epsilon=0.1, groups=2, rule=rule)
        assert step(*split_state(model), images()).all_finite  # with no perturbation of a step before
        with pytest.raises(SettingError, match=r"epsilon=1\.5"):
            make_apart_step(model, F.cross_entropy, epsilon=1.5, rule=rule)


def test_random_signs_of_mapped_models_are_different_or_the_same_as_one_says() -> None:
    gradients = random_tree(0, torch.float32, 64)
    for randomness, alike in (("different", False), ("same", True)):
        one, other = vmap(lambda e: random_sign_perturbation({}, gradients, e), randomness=randomness)(
            torch.tensor([0.1, 0.1])
        )["a"].mean
        assert torch.equal(one, other) == alike


# Squares of these gradients leave the range of float32; smallest and largest numbers are safe by a factor.
MAGNITUDES = st.sampled_from([1e-42, 1e-30, 1e-3, 1.0, 1e30, 1e37])


@given(seed=SEEDS, epsilon=RADII, scale=MAGNITUDES)
def test_an_l2_step_has_the_radius_for_its_length_and_the_gradients_direction_at_every_scale(seed, epsilon, scale):
    gradients = tree_map(lambda g: (scale * g.double()).float(), random_tree(seed, torch.float32))
    shifts = l2_perturbation({}, gradients, torch.tensor(epsilon))
    for layer, shift in shifts.items():
        delta, g = (torch.cat(pair).double() for pair in (shift, gradients[layer]))
        expected = epsilon * g / g.norm() if g.any() else torch.zeros_like(g)
        # a few roundings of float32, and of the smallest number that it holds
        torch.testing.assert_close(delta, expected, rtol=1e-6, atol=2e-45)


def test_where_no_statistic_of_a_layer_has_a_gradient_an_l2_step_is_zero() -> None:
    gradients = random_tree(0, torch.float32)
    gradients["a"] = StatGrads(torch.zeros(6), torch.zeros(6))
    shifts = l2_perturbation({}, gradients, torch.tensor(0.1))
    assert torch.equal(torch.cat(shifts["a"]), torch.zeros(12))
    torch.testing.assert_close(torch.cat(shifts["b.c"]).norm(), torch.tensor(0.1))


@given(seed=SEEDS, epsilon=st.floats(0, 0.99), dtype=DTYPES)
def test_perturbed_statistics_stay_within_the_radius_of_the_statistics(seed, epsilon, dtype):
    stats = random_stats(seed, dtype)
    radius = torch.tensor(epsilon, dtype=dtype)
    shifted = perturbed_stats(stats, sign_perturbation(stats, random_tree(seed, dtype), radius), 1e-5)
    slack = 8 * torch.finfo(dtype).eps  # a few roundings of numbers near one
    for layer, (mean, std) in shifted.items():
        s = torch.sqrt(stats[layer].var + 1e-5)
        assert ((mean - stats[layer].mean).abs() <= (radius + slack) * stats[layer].mean.abs()).all()
        assert ((s / std - 1).abs() <= radius + slack).all()


@given(epsilon=st.floats(1, 10))
def test_a_radius_of_one_or_more_has_no_perturbed_standard_deviation(epsilon: float) -> None:
    stats = random_stats(0, torch.float64)
    shifts = {layer: Perturbation(s.mean * 0, s.var * 0 - epsilon) for layer, s in stats.items()}
    with pytest.raises(SettingError, match=r"layer 'a' has \|δσ\| up to .* Use a radius below 1"):
        perturbed_stats(stats, shifts, 1e-5)


@settings(max_examples=15)
@given(epsilon=st.floats(0, 0.99), groups=st.sampled_from([0, 1, 2, 4]), seed=SEEDS)
def test_a_steps_perturbation_is_the_radius_times_the_sign_of_its_statistic_gradients(epsilon, groups, seed):
    model, batch = convolutional(), images(seed=seed)
    one_pass = make_one_pass_step(model, F.cross_entropy, epsilon=epsilon, groups=2, rule=sign_perturbation)
    for out in (
        step_of(model, batch, epsilon=epsilon, groups=groups),
        one_pass(*split_state(model), batch, init_perturbation(model)),
    ):
        for layer, shift in out.perturbation.items():
            for delta, g in zip(shift, out.stat_grads[layer], strict=True):
                assert torch.equal(delta, epsilon * g.sign())


# What must not matter.


@settings(max_examples=10)
@given(seed=SEEDS, groups=st.sampled_from([0, 1]))
def test_a_zero_radius_on_the_whole_batch_gives_the_plain_gradient(seed: int, groups: int) -> None:
    model, batch = convolutional(), images(seed=seed)
    out = step_of(model, batch, epsilon=0.0, groups=groups)
    torch.testing.assert_close(out.grads, plain_gradients(model, batch), **TIGHT)
    torch.testing.assert_close(out.loss, out.adversarial_loss, **TIGHT)


@settings(max_examples=10)
@given(seed=SEEDS, epsilon=st.floats(0, 0.99))
def test_no_groups_and_one_group_are_the_same(seed: int, epsilon: float) -> None:
    none, one = (step_of(convolutional(), images(seed=seed), epsilon=epsilon, groups=groups) for groups in (0, 1))
    for a, b in zip(none.grads.values(), one.grads.values(), strict=True):
        assert torch.equal(a, b)


@settings(max_examples=10)
@given(seed=SEEDS, scale=st.floats(0.1, 1e4))
def test_scaling_the_loss_does_not_move_the_perturbation(seed: int, scale: float) -> None:
    model, batch = convolutional(), images(seed=seed)
    params, buffers = split_state(model)
    plain = make_apart_step(model, F.cross_entropy)(params, buffers, batch)
    scaled = make_apart_step(model, lambda *a: scale * F.cross_entropy(*a))(params, buffers, batch)
    for layer, shift in plain.perturbation.items():
        for delta, other, g in zip(shift, scaled.perturbation[layer], plain.stat_grads[layer], strict=True):
            clear = g.abs() > 1e-10  # below, the sign is a matter of rounding
            assert torch.equal(delta[clear], other[clear])


@settings(max_examples=10)
@given(seed=SEEDS, data=st.data())
def test_permuting_samples_inside_their_groups_changes_no_gradient(seed: int, data: st.DataObject) -> None:
    samples, groups = 8, 2
    model, (x, y) = convolutional(), images(samples, seed=seed)
    params, buffers = split_state(model)
    fmodel = functionalize(model)
    within = [data.draw(st.permutations(range(g, samples, groups))) for g in range(groups)]
    order = torch.tensor([within[i % groups][i // groups] for i in range(samples)])
    shifts = {name: Perturbation(*torch.full((2, channels), 0.1).double()) for name, channels in fmodel.layers.items()}
    passes = [
        adversarial_pass(fmodel, F.cross_entropy, params, buffers, batch, shifts, groups=groups)
        for batch in ((x, y), (x[order], y[order]))
    ]
    torch.testing.assert_close(passes[0].grads, passes[1].grads, **TIGHT)


def test_exchanging_samples_between_groups_does_change_gradients() -> None:
    """So that the law above says something: the same test with samples that leave their group."""
    model, (x, y) = convolutional(), images(8)
    out, other = (
        step_of(model, (x[order], y[order]), epsilon=0.1, groups=2)
        for order in (torch.arange(8), torch.tensor([1, 0, 2, 3, 4, 5, 6, 7]))
    )
    assert (out.grads["0.weight"] - other.grads["0.weight"]).abs().max() > 1e-4
