"""What the step decides by itself: how many samples, which dtype, what is kept."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from forms import STEPS, more_of
from oracle import oracle_step
from small import convolutional, images, smooth
from torch import Tensor, nn
from torch.func import vmap
from torch.utils._pytree import tree_leaves

from apart_func import (
    APART,
    Perturbation,
    SettingError,
    adversarial_pass,
    functionalize,
    init_perturbation,
    make_apart_step,
    make_one_pass_step,
    mixed_pass,
    perturbed_stats,
    random_sign_perturbation,
    random_signs,
    sign_perturbation,
    split_state,
)


@pytest.mark.parametrize(("samples", "ratio", "groups", "kept"), [(10, 1.0, 4, 8), (10, 0.5, 2, 4), (9, 0.5, 0, 4)])
def test_dropping_the_remainder_lowers_the_samples_and_their_weight(samples, ratio, groups, kept):
    model, batch = convolutional(), images(samples)
    step = make_apart_step(model, F.cross_entropy, epsilon=0.1, groups=groups, ratio=ratio, remainder="drop")
    out = step(*split_state(model), batch)
    # The definition knows no remainder: it is told the share that leaves exactly the kept samples.
    share = (kept + 0.5) / samples
    expected = oracle_step(
        model, F.cross_entropy, batch, epsilon=0.1, groups=groups, ratio=share, perturbation=out.perturbation
    )
    torch.testing.assert_close(out.adversarial_loss, expected.adversarial_loss, rtol=1e-10, atol=0)
    torch.testing.assert_close(out.grads, expected.grads, rtol=1e-8, atol=1e-12)


def test_a_ratio_that_is_no_fraction_of_the_batch_is_rounded_down() -> None:
    model, batch = convolutional(), images(7)
    out = make_apart_step(model, F.cross_entropy, epsilon=0.0, ratio=0.5)(*split_state(model), batch)
    alone = F.cross_entropy(model(batch[0][:3]), batch[1][:3])
    torch.testing.assert_close(out.adversarial_loss, alone.detach())


def test_statistics_of_a_float64_model_are_float64_also_under_autocast() -> None:
    model = convolutional()
    step = make_apart_step(model, F.cross_entropy, groups=2, autocast_dtype=torch.bfloat16)
    out = step(*split_state(model), images())
    parts = [part for tree in (out.stats, out.stat_grads, out.perturbation) for pair in tree.values() for part in pair]
    assert {part.dtype for part in parts} == {torch.float64}


def test_a_mean_far_from_zero_costs_no_precision() -> None:
    """Variances are not differences of squares: the mean here is a million standard deviations from zero."""
    model = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 3)).double()
    x = 1e6 + torch.randn(32, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    out = make_apart_step(model, F.cross_entropy, groups=4)(*split_state(model), (x, torch.arange(32) % 3))
    torch.testing.assert_close(out.stats["0"].var, x.var(0, correction=0), rtol=1e-8, atol=0)


MAKERS: dict[str, Callable[[nn.Module], Any]] = {
    "two passes": lambda model: make_apart_step(model, F.cross_entropy, groups=2),
    "one pass": lambda model: make_one_pass_step(model, F.cross_entropy, epsilon=0.1, groups=2),
}


# What steps of every kind have in common.

every_step = pytest.mark.parametrize("kind", STEPS)


@every_step
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_what_comes_out_is_like_what_came_in_and_cut_from_every_graph(kind: str, dtype: torch.dtype) -> None:
    model, batch = smooth(dtype=dtype), images(dtype=dtype)
    state = split_state(model)
    out = STEPS[kind](model)(*state, batch, *more_of(kind, model))
    for found, given in zip((out.grads, out.buffers), state, strict=True):
        assert list(found) == list(given)
        for name, tensor in given.items():
            assert (found[name].shape, found[name].dtype) == (tensor.shape, tensor.dtype)
    wide = torch.promote_types(dtype, torch.float32)
    for tree in (out.stats, out.stat_grads, out.perturbation):
        assert [(p.shape, p.dtype) for pair in tree.values() for p in pair] == [((n,), wide) for n in (4, 4, 5, 5)]
    assert not any(leaf.requires_grad for leaf in tree_leaves(out._asdict()))
    assert out.all_finite


@every_step
@pytest.mark.parametrize("microbatches", [1, 2])
def test_no_argument_is_written_to_and_a_second_call_returns_the_same(kind: str, microbatches: int) -> None:
    model, batch = smooth(), images()
    held = [model.state_dict(), *split_state(model), batch, *more_of(kind, model)]
    before, versions = copy.deepcopy(held), [leaf._version for leaf in tree_leaves(held)]
    step = STEPS[kind](model, microbatches=microbatches)
    first, second = (step(*held[1:]) for _ in range(2))
    torch.testing.assert_close(held, before, rtol=0, atol=0)
    assert [leaf._version for leaf in tree_leaves(held)] == versions
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all("forward" not in vars(module) for module in model.modules())
    torch.testing.assert_close(first._asdict(), second._asdict(), rtol=0, atol=0)


@every_step
@pytest.mark.parametrize("scale", [2.0**10, 2.0**-10])
def test_a_loss_scale_leaves_no_trace(kind: str, scale: float) -> None:
    model = smooth(dtype=torch.float32)
    step, arguments = STEPS[kind](model), (*split_state(model), images(dtype=torch.float32), *more_of(kind, model))
    scaled, plain = step(*arguments, loss_scale=scale), step(*arguments)
    torch.testing.assert_close(scaled._asdict(), plain._asdict(), rtol=0, atol=0)  # a power of two is exact


@pytest.mark.parametrize("kind", ["two passes", "APART-SAM"])
def test_each_microbatch_is_a_step_of_its_own(kind: str) -> None:
    model, (x, y) = smooth(), images()
    params, buffers = split_state(model)
    together, step = STEPS[kind](model, microbatches=2)(params, buffers, (x, y)), STEPS[kind](model)
    first = step(params, buffers, (x[:4], y[:4]))
    second = step(params, first.buffers, (x[4:], y[4:]))
    mean = {name: (grad + second.grads[name]) / 2 for name, grad in first.grads.items()}
    torch.testing.assert_close(together.grads, mean, rtol=1e-10, atol=1e-14)
    torch.testing.assert_close(together.buffers, second.buffers, rtol=1e-10, atol=1e-14)
    for part, alone in enumerate((first, second)):
        own = {name: Perturbation(*(p[part] for p in shift)) for name, shift in together.perturbation.items()}
        torch.testing.assert_close(own, alone.perturbation, rtol=0, atol=0)


# What is reported.


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS.keys())
def test_the_statistics_of_ghost_groups_at_the_perturbation_are_what_layers_normalised_by(make: Any) -> None:
    """Also in the second layer, which sees what the first one changed."""
    model = convolutional()
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    for name in ("1", "4"):
        model.get_submodule(name).register_forward_hook(
            lambda layer, args, y, name=name: seen.update({name: (args[0].detach(), y.detach().clone())})
        )
    out = make(model)(*split_state(model), images())
    used = perturbed_stats(out.adversarial_stats, out.perturbation)
    first = 2 - len(used["1"].mean)  # in one pass, group 0 is clean
    for name, (x, y) in seen.items():
        assert used[name].mean.shape == (2 - first, x.shape[1])
        for group, (mean, std) in enumerate(zip(*used[name], strict=True), first):
            expected = (x[group::2] - mean[:, None, None]) / std[:, None, None]  # γ = 1, β = 0
            torch.testing.assert_close(y[group::2], expected, rtol=1e-9, atol=1e-12)


def test_what_a_loss_function_returns_besides_the_loss_comes_back() -> None:
    def with_more(output: Tensor, target: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        losses = F.cross_entropy(output, target, reduction="none")
        return losses.mean(), {"losses": losses, "hits": (output.argmax(1) == target).sum()}

    model = convolutional()
    for make in (make_apart_step, make_one_pass_step):
        options: dict[str, Any] = {"epsilon": 0.1, "groups": 2}
        out = make(model, with_more, **options)(*split_state(model), images())
        torch.testing.assert_close(out.aux["losses"], F.cross_entropy(out.output, images()[1], reduction="none"))
        assert out.aux["hits"].shape == ()
        assert not out.aux["losses"].requires_grad
        parts = make(model, with_more, microbatches=2, **options)(*split_state(model), images())
        assert parts.aux["losses"].shape == (8,)
        assert parts.aux["hits"].shape == (2,)
        assert make(model, F.cross_entropy, **options)(*split_state(model), images()).aux == ()


def test_a_perturbation_that_is_given_takes_the_place_of_the_rules() -> None:
    model, batch = convolutional(), images()
    params, buffers = split_state(model)
    step = make_apart_step(model, F.cross_entropy, groups=2)
    shifts = random_signs(init_perturbation(model), 0.2, torch.Generator().manual_seed(0))
    out = step(params, buffers, batch, perturbation=shifts)
    torch.testing.assert_close(out.perturbation, shifts, rtol=0, atol=0)
    expected = oracle_step(model, F.cross_entropy, batch, epsilon=0.2, groups=2, ratio=1.0, perturbation=shifts)
    torch.testing.assert_close(out.grads, expected.grads, rtol=1e-9, atol=1e-12)
    many = {name: Perturbation(*(torch.stack([part, -part]) for part in shift)) for name, shift in shifts.items()}
    mapped = vmap(lambda shifts: step(params, buffers, batch, perturbation=shifts).adversarial_loss)(many)
    torch.testing.assert_close(mapped[0], out.adversarial_loss, rtol=1e-9, atol=1e-12)
    assert mapped[0] != mapped[1]
    with pytest.raises(SettingError, match=r"missing \['4'\]"):
        step(params, buffers, batch, perturbation={"1": shifts["1"]})


@pytest.mark.parametrize("rule", [sign_perturbation, random_sign_perturbation])
def test_a_radius_of_exactly_one_is_refused_under_a_rule_of_signs(rule: Any) -> None:
    """There δσ = −1, and s' = s/(1 + δσ) is infinite."""
    model, batch = convolutional(), images()
    step = make_apart_step(model, F.cross_entropy, epsilon=0.999, rule=rule)
    refused = [lambda e=e: step(*split_state(model), batch, epsilon=e) for e in (1.0, torch.tensor(1.0))]
    refused += [lambda: make_apart_step(model, F.cross_entropy, epsilon=1.0, rule=rule)]
    refused += [lambda: make_one_pass_step(model, F.cross_entropy, epsilon=1.0, groups=2)]
    refused += [lambda: APART(model, epsilon=1.0), lambda: APART(model).set_epsilon(1.0)]
    for call in refused:
        with pytest.raises(SettingError, match=r"epsilon=1"):
            call()
    assert step(*split_state(model), batch).all_finite


def test_a_shift_of_exactly_one_has_no_perturbed_deviation() -> None:
    model = convolutional()
    stats = make_apart_step(model, F.cross_entropy)(*split_state(model), images()).stats
    shifts = {name: Perturbation(0 * mean, 0 * mean - 1) for name, (mean, _) in stats.items()}
    with pytest.raises(SettingError, match=r"\|δσ\| up to 1,"):
        perturbed_stats(stats, shifts)


class Counting(nn.Module):
    """A network that counts its forwards in a buffer, and returns the count with the scores."""

    def __init__(self) -> None:
        super().__init__()
        self.body = convolutional()
        self.register_buffer("forwards", torch.tensor(0))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        self.forwards += 1
        return self.body(x), self.forwards.expand(len(x)).double()


@pytest.mark.parametrize("rho", [0.0, 0.1])
def test_the_adversarial_pass_goes_on_from_the_buffers_of_the_proxy_pass(rho: float) -> None:
    """And what it does to them is nobody's: the counter has moved by one."""
    model = Counting()
    step = make_apart_step(model, lambda output, _: output[0].square().mean() + output[1].mean(), epsilon=0.0, rho=rho)
    out = step(*split_state(model), images())
    clean = out.output[0].square().mean()
    assert out.loss.item() == pytest.approx(clean.item() + 1)
    if not rho:
        assert out.adversarial_loss.item() == pytest.approx(clean.item() + 2)
    assert 1.9 < out.adversarial_loss < 3.5
    assert out.buffers["forwards"] == 1


@pytest.mark.parametrize("infinite", ["proxy", "adversarial"])
def test_a_loss_that_is_infinite_alone_is_seen(infinite: str) -> None:
    """All gradients are finite, and so is the other loss."""
    model = Counting()
    state, batch = split_state(model), images()
    bad = {"proxy": 1, "adversarial": 2}[infinite]

    def loss_fn(output: tuple[Tensor, Tensor], target: Tensor) -> Tensor:
        return F.cross_entropy(output[0], target) + torch.where(output[1] == bad, float("inf"), 0.0).sum()

    out = make_apart_step(model, loss_fn)(*state, batch)
    assert all(tensor.isfinite().all() for tensor in out.grads.values())
    assert out.loss.isfinite() == (infinite != "proxy")
    assert out.adversarial_loss.isfinite() == (infinite != "adversarial")
    assert not out.all_finite
    torch.testing.assert_close(out.buffers, state[1], rtol=0, atol=0)


@pytest.mark.parametrize("infinite", ["clean", "perturbed"])
def test_in_one_pass_as_well(infinite: str) -> None:
    model, (x, y) = convolutional(), images()
    state, penalties = split_state(model), torch.zeros(len(x)).double()
    penalties[0 if infinite == "clean" else 1] = float("inf")  # groups are of every second sample, the first is clean

    def loss_fn(output: Tensor, target: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(output, target[0]) + target[1].sum()

    step = make_one_pass_step(model, loss_fn, epsilon=0.1, groups=2)
    out = step(*state, (x, (y, penalties)))
    assert all(tensor.isfinite().all() for tensor in out.grads.values())
    assert not out.all_finite
    torch.testing.assert_close(out.buffers, state[1], rtol=0, atol=0)
    assert step(*state, (x, (y, 0 * y))).all_finite


def with_a_graph(model: nn.Module, leaf: Tensor) -> dict[str, Perturbation]:
    """A perturbation that depends on a leaf which wants a gradient."""
    return {
        name: Perturbation(leaf + 0 * mean, -leaf + 0 * scale)
        for name, (mean, scale) in init_perturbation(model).items()
    }


def test_a_perturbation_is_a_constant_whatever_it_depends_on() -> None:
    """Neither one that is given nor one that a rule makes is differentiated by, or keeps its graph alive."""
    model, batch = convolutional(), images()
    leaf = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    given = with_a_graph(model, leaf)
    two_passes = make_apart_step(model, F.cross_entropy, rule=lambda *_: given)
    one_pass = make_one_pass_step(model, F.cross_entropy, epsilon=0.1, groups=2, rule=lambda *_: given)
    state, infinite = split_state(model), (batch[0] * float("inf"), batch[1])
    steps = [two_passes(*state, batch), two_passes(*state, batch, perturbation=given), one_pass(*state, batch, given)]
    steps.append(one_pass(*state, infinite, given))  # which returns the one that came in
    drawn = make_one_pass_step(model, F.cross_entropy, epsilon=leaf, groups=2)(*state, batch)
    signs = make_apart_step(model, F.cross_entropy, epsilon=leaf)(*state, batch)
    arguments = functionalize(model), F.cross_entropy, *state, batch, given
    passes = [adversarial_pass(*arguments, stat_grads=True), mixed_pass(*arguments, groups=2, clean=1)]
    for out in steps:
        assert out.perturbation["1"].mean.tolist() == pytest.approx([0.1] * 4)
    for out in [*steps, *passes, drawn, signs]:
        assert not any(isinstance(part, Tensor) and part.requires_grad for part in tree_leaves(out._asdict()))
    assert leaf.grad is None
