"""One pass a step: against the definition, its laws, and the promises that the two-pass step makes as well."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from architectures import Architecture, architectures, group_counts
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from oracle import Shift, ShiftTree, oracle_one_pass_step, oracle_proxy
from small import convolutional, images
from test_against_oracle import TOLERANCE, flatten, relative_error
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.func import stack_module_state, vmap
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.checkpoint import checkpoint

from apart_func import (
    APART,
    BatchError,
    ModelError,
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
    sign_flips,
    sign_perturbation,
    split_state,
)

BATCH = images()
# The compared computations differ in the order of float64 sums only.
ROUNDING = {"rtol": 1e-8, "atol": 1e-12}


def random_perturbation(model: nn.Module, radius: float = 0.2, seed: int = 0) -> dict[str, Perturbation]:
    """Some δ = ±radius, so that something is perturbed in a first step."""
    generator = torch.Generator().manual_seed(seed)

    def signs(like: Tensor) -> Tensor:
        return radius * torch.randint(2, like.shape, generator=generator, dtype=like.dtype).mul(2).sub(1)

    return {layer: Perturbation(*map(signs, shift)) for layer, shift in init_perturbation(model).items()}


def take_step(model: nn.Module, batch: Any = BATCH, perturbation: Any = None, **options: Any) -> StepOutput:
    """A step of the model from its own state."""
    step = make_one_pass_step(
        model, F.cross_entropy, **{"epsilon": 0.1, "groups": 4, "rule": sign_perturbation, **options}
    )
    return step(*split_state(model), batch, perturbation or random_perturbation(model))


def assert_same(one: Any, other: Any) -> None:
    torch.testing.assert_close(one._asdict(), other._asdict(), **ROUNDING)


# The definition.


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(architectures(), st.data())
def test_a_step_of_any_architecture_is_what_the_definition_says(
    architecture: Architecture, data: st.DataObject
) -> None:
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
    tolerance = TOLERANCE[architecture.dtype]
    for field in ("loss", "output", "buffers", "stats", "stat_grads", "adversarial_loss", "grads"):
        error = relative_error(getattr(library, field), getattr(definition, field))
        assert error <= tolerance, f"{field} is off by {error:.1e}"
    noise = tolerance * sum(g.square().sum() for g in flatten(definition.stat_grads).values()) ** 0.5
    for key, g in flatten(definition.stat_grads).items():
        shift, clear = flatten(library.perturbation)[key], g.abs() > noise
        radius = torch.tensor(architecture.epsilon, dtype=shift.dtype).double()
        assert torch.equal(shift.double()[clear], (radius * g.sign())[clear]), key


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


@settings(max_examples=15, deadline=None, derandomize=True)
@given(epsilon=st.floats(0, 0.99), seed=st.integers(0, 1000))
def test_the_next_perturbation_is_the_radius_times_the_sign_of_the_clean_statistic_gradients(
    epsilon: float, seed: int
) -> None:
    out = take_step(convolutional(), images(seed=seed), epsilon=epsilon)
    for layer, shift in out.perturbation.items():
        for delta, g in zip(shift, out.stat_grads[layer], strict=True):
            assert torch.equal(delta, epsilon * g.sign())


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
    """The step of the default rule."""
    return make_one_pass_step(model, F.cross_entropy, epsilon=0.3, groups=4)


def test_random_signs_need_no_perturbation_of_the_step_before_and_no_statistic_gradients() -> None:
    model = convolutional()
    out = drawing(model)(*split_state(model), BATCH)
    assert out.stat_grads == {}
    for shift in out.perturbation.values():
        assert all((part.abs() == 0.3).all() for part in shift)
    again = drawing(model)(*split_state(model), BATCH, out.perturbation)
    assert again.stat_grads.keys() == out.perturbation.keys()  # of a δ that was given there are some
    assert_same(out, again._replace(stat_grads={}))  # it was the δ of this step


def test_a_step_of_random_signs_is_what_the_definition_says_at_those_that_it_drew() -> None:
    model = convolutional()
    out = drawing(model)(*split_state(model), BATCH)
    drawn: ShiftTree = {layer: Shift(*shift) for layer, shift in out.perturbation.items()}
    expected = oracle_one_pass_step(model, F.cross_entropy, BATCH, drawn, epsilon=0.3, groups=4, clean=2)
    assert relative_error(out.grads, expected.grads) < TOLERANCE[torch.float64]
    assert relative_error(out.buffers, expected.buffers) < TOLERANCE[torch.float64]


def test_random_signs_are_drawn_again_in_every_step_from_the_default_generator() -> None:
    model = convolutional()
    torch.manual_seed(0)
    first, second = (drawing(model)(*split_state(model), BATCH).perturbation for _ in range(2))
    assert sign_flips(first, second) > 0
    torch.manual_seed(0)
    torch.testing.assert_close(drawing(model)(*split_state(model), BATCH).perturbation, first, rtol=0, atol=0)


def test_a_compiled_step_draws_too() -> None:
    model = convolutional()
    compiled = torch.compile(drawing(model), fullgraph=True, backend="aot_eager")
    first, second = (compiled(*split_state(model), BATCH, epsilon=torch.tensor(0.2)) for _ in range(2))
    assert sign_flips(first.perturbation, second.perturbation) > 0
    radii = [part.abs() for shift in first.perturbation.values() for part in shift]
    torch.testing.assert_close(torch.cat(radii), torch.full_like(torch.cat(radii), 0.2), rtol=1e-6, atol=0)
    expected = drawing(model)(*split_state(model), BATCH, first.perturbation)
    torch.testing.assert_close(first.grads, expected.grads, **ROUNDING)


def test_a_rule_of_gradients_needs_the_perturbation_of_the_step_before() -> None:
    model = convolutional()
    step = make_one_pass_step(model, F.cross_entropy, epsilon=0.1, groups=4, rule=sign_perturbation)
    with pytest.raises(StateError, match=r"got no perturbation.* Pass init_perturbation\(model\) to the first step"):
        step(*split_state(model), BATCH)


def test_a_radius_given_in_the_call_is_that_of_the_next_perturbation() -> None:
    model = convolutional()
    step = make_one_pass_step(model, F.cross_entropy, epsilon=0.1, groups=4, rule=sign_perturbation)
    shifts = random_perturbation(model)
    out = step(*split_state(model), BATCH, shifts, epsilon=torch.tensor(0.3))
    assert_same(out, take_step(model, perturbation=shifts, epsilon=float(torch.tensor(0.3))))


# The loss of the batch.


def of_pairs(output: Tensor, target: Tensor) -> Tensor:
    """Draws outputs of a class together: a loss that knows every sample by the others."""
    alike = (target[:, None] == target).to(output.dtype)
    return F.binary_cross_entropy_with_logits(output @ output.T, alike)


def first_ignored(output: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(output, target, ignore_index=0)


def weighted(output: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(output, target, weight=torch.tensor([0.2, 1.0, 3.0], dtype=output.dtype))


def summed(output: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(output, target, reduction="sum")


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: param.grad.clone() for name, param in model.named_parameters()}


@pytest.mark.parametrize("loss_fn", [F.cross_entropy, summed, weighted, first_ignored, of_pairs])
def test_the_loss_of_the_whole_batch_is_differentiated_and_those_of_the_parts_are_reported(loss_fn: Any) -> None:
    """As in the drop-in, whatever kind of mean it is; a loss that couples samples has no parts."""
    model, twin = convolutional(), convolutional()
    apart = APART(twin, 0.2, 4)
    with apart.one_pass():
        expected = loss_fn(twin(BATCH[0]), BATCH[1])
        expected.backward()
    step = make_one_pass_step(model, loss_fn, epsilon=0.2, groups=4)
    out = step(*split_state(model), BATCH, apart.perturbation)
    torch.testing.assert_close(out.grads, gradients(twin), **ROUNDING)
    clean = torch.arange(8) % 4 < 2
    reported = [loss_fn(out.output[part], BATCH[1][part]) for part in (clean, ~clean)]
    if loss_fn is of_pairs:
        reported = [expected.detach()] * 2
    torch.testing.assert_close([out.loss, out.adversarial_loss], reported, **ROUNDING)

    arguments = functionalize(model), loss_fn, *split_state(model), BATCH, apart.perturbation
    mixed = mixed_pass(*arguments, groups=4, clean=2, stat_grads=False)
    torch.testing.assert_close(mixed.batch_loss, expected.detach(), **ROUNDING)
    torch.testing.assert_close([mixed.loss, mixed.adversarial_loss], reported, **ROUNDING)
    assert mixed.stat_grads == {}


# Promises.


def test_no_argument_is_changed() -> None:
    model = convolutional()
    (params, buffers), shifts = split_state(model), random_perturbation(model)
    before = copy.deepcopy((params, buffers, BATCH, shifts))
    take_step(model, perturbation=shifts)
    torch.testing.assert_close((params, buffers, BATCH, shifts), before, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_outputs_have_the_dtype_shape_and_keys_of_what_came_in(dtype: torch.dtype) -> None:
    model, batch = convolutional(dtype=dtype), images(dtype=dtype)
    (params, buffers), shifts = split_state(model), random_perturbation(model)
    out = take_step(model, batch, shifts)
    for actual, expected in ((out.grads, params), (out.buffers, buffers), (out.perturbation, shifts)):
        look = {key: (leaf.shape, leaf.dtype, leaf.device) for key, leaf in flatten(actual).items()}
        assert look == {key: (leaf.shape, leaf.dtype, leaf.device) for key, leaf in flatten(expected).items()}
    assert not any(leaf.requires_grad for leaf in tree_leaves(tuple(out)))


def test_after_a_step_that_is_not_finite_buffers_and_perturbation_are_as_before() -> None:
    model = convolutional()
    x, y = BATCH[0].clone(), BATCH[1]
    x[0] = torch.inf
    shifts = random_perturbation(model)
    out = take_step(model, (x, y), shifts)
    assert not out.all_finite
    torch.testing.assert_close(out.buffers, split_state(model)[1], rtol=0, atol=0)
    torch.testing.assert_close(out.perturbation, shifts, rtol=0, atol=0)


def test_a_negative_radius_that_only_a_tensor_knows_is_reported_under_a_transform() -> None:
    model = convolutional()
    step = make_one_pass_step(model, F.cross_entropy, epsilon=0.1, groups=4, rule=sign_perturbation)
    state, shifts = split_state(model), init_perturbation(model)
    out = vmap(lambda e: step(*state, BATCH, shifts, epsilon=e))(torch.tensor([0.1, -0.1]))
    assert out.all_finite.tolist() == [True, False]


def test_mapped_over_models_it_is_the_same_steps_one_by_one() -> None:
    models = [convolutional() for _ in range(3)]
    for seed, model in enumerate(models):
        torch.manual_seed(seed)
        nn.init.normal_(model[0].weight)
    shifts = [random_perturbation(model, seed=seed) for seed, model in enumerate(models)]
    step = make_one_pass_step(models[0], F.cross_entropy, epsilon=0.1, groups=4, rule=sign_perturbation)
    params, buffers = (tree_map(Tensor.detach, tree) for tree in stack_module_state(models))
    stacked = {
        layer: Perturbation(*(torch.stack(parts) for parts in zip(*(each[layer] for each in shifts), strict=True)))
        for layer in shifts[0]
    }
    mapped = vmap(step, in_dims=(0, 0, None, 0))(params, buffers, BATCH, stacked)
    for number, model in enumerate(models):
        assert_same(tree_map(lambda leaf: leaf[number], mapped), take_step(model, perturbation=shifts[number]))  # noqa: B023


def test_the_compiled_step_is_one_graph_over_many_steps() -> None:
    model = convolutional()
    step = make_one_pass_step(model, F.cross_entropy, epsilon=0.1, groups=4, rule=sign_perturbation)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(step, backend=counter, fullgraph=True, dynamic=False)
    (params, buffers), perturbation = split_state(model), init_perturbation(model)
    for seed in range(4):
        batch, epsilon = images(seed=seed), torch.tensor(0.1 * (seed + 1))
        out = compiled(params, buffers, batch, perturbation, epsilon=epsilon)
        assert_same(out, step(params, buffers, batch, perturbation, epsilon=epsilon))
        buffers, perturbation = out.buffers, out.perturbation
    assert counter.frame_count == 1


@pytest.mark.slow
def test_inductor_computes_what_the_eager_step_computes() -> None:
    model = convolutional()
    step = make_one_pass_step(model, F.cross_entropy, epsilon=0.1, groups=4, rule=sign_perturbation)
    state, shifts = split_state(model), random_perturbation(model)
    assert_same(torch.compile(step, fullgraph=True, dynamic=False)(*state, BATCH, shifts), step(*state, BATCH, shifts))


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


@pytest.mark.parametrize("scale", [2.0**10, 2.0**-10])
def test_a_loss_scale_leaves_no_trace(scale: float) -> None:
    model, batch = convolutional(dtype=torch.float32), images(dtype=torch.float32)
    step = make_one_pass_step(model, F.cross_entropy, epsilon=0.1, groups=4, rule=sign_perturbation)
    shifts = random_perturbation(model)
    scaled = step(*split_state(model), batch, shifts, loss_scale=scale)
    # a power of two is exact
    torch.testing.assert_close(scaled._asdict(), step(*split_state(model), batch, shifts)._asdict(), rtol=0, atol=0)


def test_autocast_computes_in_the_lower_precision() -> None:
    model, batch = convolutional(dtype=torch.float32), images(dtype=torch.float32)
    out = take_step(model, batch, autocast_dtype=torch.bfloat16)
    assert out.output.dtype is torch.bfloat16
    assert all(leaf.dtype is torch.float32 for leaf in flatten(out.perturbation).values())


def test_a_checkpointed_block_counts_its_batch_once() -> None:
    class Checkpointed(nn.Module):
        def __init__(self, block: nn.Module) -> None:
            super().__init__()
            self.block = block

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.block, x, use_reentrant=False)

    plain = convolutional()
    model = nn.Sequential(Checkpointed(plain[:3]), *plain[3:])
    one = take_step(plain)
    shifts = dict(zip(init_perturbation(model), random_perturbation(plain).values(), strict=True))
    out = take_step(model, perturbation=shifts)
    torch.testing.assert_close(list(out.grads.values()), list(one.grads.values()), **ROUNDING)
    torch.testing.assert_close(list(out.buffers.values()), list(one.buffers.values()), **ROUNDING)


# What cannot be.


@pytest.mark.parametrize(("groups", "fraction"), [(1, 0.5), (0, 0.5), (4, 0.0), (4, 1.0), (4, 0.1), (4, 0.95), (2, -1)])
def test_groups_that_cannot_be_clean_and_perturbed_are_refused(groups: int, fraction: float) -> None:
    with pytest.raises(SettingError, match=f"groups={groups} and clean_fraction={fraction} .* Use groups=2 or more"):
        make_one_pass_step(convolutional(), F.cross_entropy, epsilon=0.1, groups=groups, clean_fraction=fraction)


def test_groups_that_do_not_divide_the_batch_are_refused() -> None:
    with pytest.raises(BatchError, match="groups=3 does not divide the 8 samples"):
        take_step(convolutional(), groups=3)


def test_an_output_that_cannot_be_cut_by_sample_is_refused() -> None:
    model = nn.Sequential(nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3), nn.Flatten(0)).double()
    with pytest.raises(BatchError, match=r"output have lengths \[384\] on dim 0; expected 8"):
        take_step(model)


@pytest.mark.parametrize(
    "changed",
    [
        lambda shifts: {},
        lambda shifts: shifts | {"7": shifts["1"]},
        lambda shifts: shifts | {"1": shifts["4"]},
    ],
)
def test_a_perturbation_of_another_model_is_refused(changed: Any) -> None:
    model = convolutional()
    step = make_one_pass_step(model, F.cross_entropy, epsilon=0.1, groups=4, rule=sign_perturbation)
    with pytest.raises(SettingError, match="perturbation"):
        step(*split_state(model), BATCH, changed(init_perturbation(model)))


def test_a_model_without_batch_norm_has_no_perturbation() -> None:
    with pytest.raises(ModelError, match="no batch-norm layer"):
        init_perturbation(nn.Linear(2, 2))
