"""One pass a step: against the definition, what it is made of, which loss it differentiates, and what it refuses."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from agreement import TOLERANCE, Comparison, assert_agree, relative_error
from architectures import EXAMPLES, architectures, group_counts
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from loops import gradients
from oracle import Shift, ShiftTree, oracle_one_pass_step, oracle_proxy
from small import convolutional, images, signs_differ
from torch import Tensor, nn

from apart_func import (
    APART,
    BatchError,
    OnePassStep,
    Perturbation,
    SettingError,
    StateError,
    StepOutput,
    functionalize,
    init_perturbation,
    make_one_pass_step,
    mixed_pass,
    proxy_pass,
    random_signs,
    sign_perturbation,
    split_state,
)

BATCH = images()
# The compared computations differ in the order of float64 sums only.
ROUNDING = {"rtol": 1e-8, "atol": 1e-12}


def random_perturbation(model: nn.Module, radius: float = 0.2) -> dict[str, Perturbation]:
    return random_signs(init_perturbation(model), radius, torch.Generator().manual_seed(0))


def take_step(model: nn.Module, batch: Any = BATCH, perturbation: Any = None, **options: Any) -> StepOutput:
    step = make_one_pass_step(
        model, F.cross_entropy, **{"epsilon": 0.1, "groups": 4, "rule": sign_perturbation, **options}
    )
    return step(*split_state(model), batch, perturbation or random_perturbation(model))


# The definition.


@settings(max_examples=EXAMPLES)
@given(architectures(), st.data())
def test_a_step_of_any_architecture_is_what_the_definition_says(architecture, data):
    # A layer that evaluates by the statistics of the batch mixes clean and perturbed samples, and is refused.
    assume(all(block.norm.training or block.norm.tracked for block in architecture.blocks))
    smallest = 2 if architecture.dtype is torch.float64 else 8
    positions = torch.Size(architecture.positions).numel()
    counts = [g for g in group_counts(architecture.samples, positions, smallest) if g not in (0, 1)]
    assume(counts)
    groups = data.draw(st.sampled_from(counts), label="groups")
    parts = architecture.samples if groups == -1 else groups
    clean = data.draw(st.integers(1, parts - 1), label="clean groups")
    model, batch = architecture.build()
    given = random_perturbation(model, architecture.epsilon)

    options = {"epsilon": architecture.epsilon, "groups": groups, "rows": architecture.rows_setting()}
    library = take_step(model, batch, given, clean_fraction=clean / parts, **options)
    definition = oracle_one_pass_step(model, F.cross_entropy, batch, given, clean=clean, **options)
    assert_agree(Comparison(library, definition, architecture.epsilon, TOLERANCE[architecture.dtype]))


def test_several_steps_end_where_the_definition_ends() -> None:
    model, reference = convolutional(), convolutional()
    step = make_one_pass_step(model, F.cross_entropy, epsilon=0.1, groups=4, rule=sign_perturbation)
    (params, buffers), perturbation = split_state(copy.deepcopy(model)), init_perturbation(model)
    expected: ShiftTree = {layer: Shift(*shift) for layer, shift in perturbation.items()}
    start = params
    for seed in range(4):
        batch = images(seed=seed)
        out = step(params, buffers, batch, perturbation)
        params = {name: param - 0.5 * out.grads[name] for name, param in params.items()}
        buffers, perturbation = out.buffers, out.perturbation
        definition = oracle_one_pass_step(reference, F.cross_entropy, batch, expected, epsilon=0.1, groups=4, clean=2)
        expected = definition.perturbation
        with torch.no_grad():
            for name, param in reference.named_parameters():
                param -= 0.5 * definition.grads[name]
            for name, buffer in reference.named_buffers():
                buffer.copy_(definition.buffers[name])
    moved = {name: param - start[name] for name, param in params.items()}
    theirs = {name: param.detach() - start[name] for name, param in reference.named_parameters()}
    assert relative_error(moved, theirs) < TOLERANCE[torch.float64]
    assert relative_error(buffers, dict(reference.named_buffers())) < TOLERANCE[torch.float64]


# What it is made of.


def test_the_clean_samples_see_a_proxy_pass_and_do_not_know_of_the_others() -> None:
    """With one clean group of two, loss, statistics, their gradients and buffers are those of the proxy pass on it."""
    model = convolutional()
    out = take_step(model, groups=2)
    proxy = proxy_pass(functionalize(model), F.cross_entropy, *split_state(model), (BATCH[0][::2], BATCH[1][::2]))
    for field in ("loss", "stats", "stat_grads", "buffers"):
        torch.testing.assert_close(getattr(out, field), getattr(proxy, field), **ROUNDING)


def test_running_statistics_of_the_first_layer_are_those_of_all_clean_samples_whatever_the_groups() -> None:
    """Clean samples of 2 of 4 groups and of 1 of 2 groups are the same ones if the batch is sorted so."""
    model = nn.Sequential(nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(32, 3)).double()
    clean = BATCH[0].unflatten(0, (2, 4))[:, :2].flatten(0, 1)  # samples 0, 1, 4, 5
    out = take_step(model, groups=4)
    _, buffers = split_state(model)
    plain = copy.deepcopy(model)
    plain(clean)
    assert not torch.equal(out.buffers["0.running_mean"], buffers["0.running_mean"])
    torch.testing.assert_close(out.buffers, split_state(plain)[1], **ROUNDING)


def test_at_zero_it_is_plain_training_in_ghost_groups() -> None:
    """With one group a sample and no perturbation, both losses are those of the groups by themselves."""
    model = convolutional()
    out = take_step(model, perturbation=init_perturbation(model), groups=2)
    halves = [oracle_proxy(model, F.cross_entropy, BATCH[0][g::2], BATCH[1][g::2]) for g in range(2)]
    torch.testing.assert_close(out.loss, halves[0].loss, **ROUNDING)
    torch.testing.assert_close(out.adversarial_loss, halves[1].loss, **ROUNDING)
    mean = {name: (grad + halves[1].grads[name]) / 2 for name, grad in halves[0].grads.items()}
    torch.testing.assert_close(out.grads, mean, **ROUNDING)


def test_statistic_gradients_of_every_group_come_out_of_the_pass() -> None:
    model = convolutional()
    fmodel, (params, buffers), shifts = functionalize(model), split_state(model), random_perturbation(model)
    mixed = mixed_pass(fmodel, F.cross_entropy, params, buffers, BATCH, shifts, groups=4, clean=2)
    out = take_step(model, perturbation=shifts)
    for layer, g in mixed.stat_grads.items():
        assert g.mean.shape == (4, shifts[layer].mean.shape[0])
        torch.testing.assert_close(2 * g.mean[:2].sum(0), out.stat_grads[layer].mean, **ROUNDING)
        assert g.mean[2:].any()


def drawing(model: nn.Module) -> OnePassStep:
    return make_one_pass_step(model, F.cross_entropy, epsilon=0.3, groups=4)


def test_random_signs_need_no_perturbation_of_the_step_before_and_no_statistic_gradients() -> None:
    model = convolutional()
    out = drawing(model)(*split_state(model), BATCH)
    assert out.stat_grads == {}
    for shift in out.perturbation.values():
        assert all((part.abs() == 0.3).all() for part in shift)
    before = torch.get_rng_state()
    again = drawing(model)(*split_state(model), BATCH, out.perturbation)
    assert torch.equal(torch.get_rng_state(), before)  # what is given is not drawn
    assert again.stat_grads.keys() == out.perturbation.keys()  # of a δ that was given there are some
    # it was the δ of this step
    torch.testing.assert_close(again._replace(stat_grads={})._asdict(), out._asdict(), **ROUNDING)


def test_random_signs_are_drawn_again_in_every_step_from_the_default_generator() -> None:
    model = convolutional()
    torch.manual_seed(0)
    first, second = (drawing(model)(*split_state(model), BATCH).perturbation for _ in range(2))
    assert signs_differ(first, second)
    torch.manual_seed(0)
    torch.testing.assert_close(drawing(model)(*split_state(model), BATCH).perturbation, first, rtol=0, atol=0)


def test_a_rule_of_gradients_needs_the_perturbation_of_the_step_before() -> None:
    model = convolutional()
    step = make_one_pass_step(model, F.cross_entropy, epsilon=0.1, groups=4, rule=sign_perturbation)
    with pytest.raises(StateError, match=r"got no perturbation.* Pass init_perturbation\(model\) to the first step"):
        step(*split_state(model), BATCH)


# The loss of the batch.


def of_halves(output: Tensor, target: Tensor) -> Tensor:
    """The first and the second half of a batch belong together, sample by sample."""
    first, second = target.chunk(2)
    assert torch.equal(first, second)
    return (torch.sub(*output.chunk(2))).square().mean() + 1 / output.square().mean()


COUPLING: dict[str, Any] = {
    "similarities": lambda o, t: F.cross_entropy(o @ o.T, torch.arange(len(o))),
    "pairs of a class": lambda o, t: F.binary_cross_entropy_with_logits(o @ o.T, (t[:, None] == t).to(o.dtype)),
    "halves": of_halves,
}
LOSSES: dict[str, Any] = {
    "mean": F.cross_entropy,
    "sum": nn.CrossEntropyLoss(reduction="sum"),
    "class weights": nn.CrossEntropyLoss(weight=torch.tensor([0.2, 1.0, 3.0]).double()),
    "a class is ignored": nn.CrossEntropyLoss(ignore_index=0),
    "label smoothing": nn.CrossEntropyLoss(label_smoothing=0.1),
    "sorted": lambda o, t: F.cross_entropy(o, t, reduction="none").sort().values.mean(),
    **COUPLING,
}


@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize("groups", [2, 4])
def test_the_loss_of_the_whole_batch_is_differentiated_and_those_of_the_parts_are_reported(kind, groups):
    """As in the drop-in, whatever kind of mean it is; a loss that couples samples has no parts."""
    model, twin, loss_fn = convolutional(), convolutional(), LOSSES[kind]
    batch = BATCH[0], torch.arange(4).repeat(2) % 3
    apart = APART(twin, 0.2, groups)
    with apart.one_pass():
        expected = loss_fn(twin(batch[0]), batch[1])
        expected.backward()
    out = make_one_pass_step(model, loss_fn, epsilon=0.2, groups=groups)(*split_state(model), batch, apart.perturbation)
    torch.testing.assert_close(out.grads, gradients(twin), **ROUNDING)
    clean = torch.arange(8) % groups < groups // 2
    reported = [expected.detach()] * 2
    if kind not in COUPLING:
        reported = [loss_fn(out.output[part], batch[1][part]) for part in (clean, ~clean)]
    torch.testing.assert_close([out.loss, out.adversarial_loss], reported, **ROUNDING)

    arguments = functionalize(model), loss_fn, *split_state(model), batch, apart.perturbation
    mixed = mixed_pass(*arguments, groups=groups, clean=groups // 2, stat_grads=False)
    torch.testing.assert_close(mixed.batch_loss, expected.detach(), **ROUNDING)
    torch.testing.assert_close([mixed.loss, mixed.adversarial_loss], reported, **ROUNDING)
    torch.testing.assert_close(mixed.grads, out.grads, **ROUNDING)
    assert mixed.stat_grads == {}


# Micro-batches and precision.


def test_microbatches_are_a_batch_of_more_groups() -> None:
    """Two parts in two groups each have the gradients, and the next δ, of one batch in four groups."""
    model = convolutional()
    (x, y), shifts = BATCH, random_perturbation(model)
    parts = take_step(model, (x, y), shifts, groups=2, microbatches=2)
    # rows of both parts, group by group: clean of the first, clean of the second, perturbed of the first, of the second
    order = torch.tensor([0, 4, 1, 5, 2, 6, 3, 7])
    whole = take_step(model, (x[order], y[order]), shifts, groups=4)
    for field in ("grads", "loss", "adversarial_loss"):
        torch.testing.assert_close(getattr(parts, field), getattr(whole, field), **ROUNDING)
    torch.testing.assert_close(parts.perturbation, whole.perturbation, rtol=0, atol=0)
    assert parts.buffers["1.num_batches_tracked"] == 2


def test_autocast_computes_in_the_lower_precision() -> None:
    model, batch = convolutional(dtype=torch.float32), images(dtype=torch.float32)
    out = take_step(model, batch, autocast_dtype=torch.bfloat16)
    assert out.output.dtype is torch.bfloat16
    assert all(leaf.dtype is torch.float32 for shift in out.perturbation.values() for leaf in shift)


# What cannot be.


@pytest.mark.parametrize(("groups", "fraction"), [(1, 0.5), (0, 0.5), (4, 0.0), (4, 1.0), (4, 0.1), (4, 0.95), (2, -1)])
def test_groups_that_cannot_be_clean_and_perturbed_are_refused(groups: int, fraction: float) -> None:
    with pytest.raises(SettingError, match=f"groups={groups} and clean_fraction={fraction} .* Use groups=2 or more"):
        make_one_pass_step(convolutional(), F.cross_entropy, epsilon=0.1, groups=groups, clean_fraction=fraction)


def test_an_output_that_cannot_be_cut_by_sample_is_refused() -> None:
    model = nn.Sequential(nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3), nn.Flatten(0)).double()
    with pytest.raises(BatchError, match=r"output have lengths \[384\] on dim 0; expected 8"):
        take_step(model)


@pytest.mark.parametrize(
    "changed",
    [lambda shifts: {}, lambda shifts: shifts | {"7": shifts["1"]}, lambda shifts: shifts | {"1": shifts["4"]}],
)
def test_a_perturbation_of_another_model_is_refused(changed: Any) -> None:
    model = convolutional()
    step = make_one_pass_step(model, F.cross_entropy, epsilon=0.1, groups=4, rule=sign_perturbation)
    with pytest.raises(SettingError, match="perturbation"):
        step(*split_state(model), BATCH, changed(init_perturbation(model)))
