"""The step under `torch.func.grad`, `vmap` and `torch.compile`, and its parts."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from forms import STEPS, more_of
from small import convolutional, images, one_layer, signs_differ, smooth
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.func import grad, stack_module_state, vmap
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.checkpoint import checkpoint

from apart_func import (
    ApartStep,
    Perturbation,
    StepOutput,
    adversarial_pass,
    functionalize,
    make_apart_step,
    make_one_pass_step,
    proxy_pass,
    split_state,
)

# The compared computations differ in the order of float64 sums only.
ROUNDING = {"rtol": 1e-8, "atol": 1e-12}
BATCH = images()


def small_step(**options: Any) -> tuple[ApartStep, dict[str, Tensor], dict[str, Tensor]]:
    model = convolutional()
    return make_apart_step(model, F.cross_entropy, **options), *split_state(model)


def assert_same(one: StepOutput, other: StepOutput) -> None:
    torch.testing.assert_close(one._asdict(), other._asdict(), **ROUNDING)


# torch.func


def test_sample_i_is_in_group_i_mod_g_under_grad() -> None:
    """And eagerly, mapped and compiled, as `properties/test_radius.py` says."""
    groups, i, channel = 3, 4, 1
    layer = nn.Sequential(nn.BatchNorm1d(2)).double()
    shifts = {"0": Perturbation(torch.tensor([0.3, -0.2]).double(), torch.tensor([-0.1, 0.4]).double())}
    x = torch.randn(12, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 1

    def output(x: Tensor) -> Tensor:
        arguments = functionalize(layer), lambda output, _: output.square().mean(), *split_state(layer)
        return adversarial_pass(*arguments, (x, torch.zeros(len(x))), shifts, groups=groups).output[i, channel]

    slopes = grad(output)(x)
    reached = [(row, column) for row in range(len(x)) for column in range(2) if slopes[row, column] != 0]
    assert reached == [(row, channel) for row in range(i % groups, len(x), groups)]


def test_a_step_can_be_differentiated() -> None:
    """The slope of the clean loss along a direction, against finite differences of the same step."""
    step, params, buffers = small_step(epsilon=0.1, groups=2)
    generator = torch.Generator().manual_seed(3)
    direction = {name: torch.randn(p.shape, generator=generator, dtype=p.dtype) for name, p in params.items()}

    def clean_loss(p: dict[str, Tensor]) -> Tensor:
        return step(p, buffers, BATCH).loss

    slopes = grad(clean_loss)(params)
    analytic = sum((slopes[name] * direction[name]).sum() for name in params)
    h = 1e-6
    plus, minus = (clean_loss({name: p + s * h * direction[name] for name, p in params.items()}) for s in (1, -1))
    torch.testing.assert_close(analytic, (plus - minus) / (2 * h), rtol=1e-6, atol=1e-9)


def test_a_step_can_be_differentiated_twice_through_its_gradients() -> None:
    """∇θ ½‖∇L_p‖² at a zero radius, against finite differences; the kind of thing meta-learning asks for."""
    step, params, buffers = small_step(epsilon=0.0)

    def energy(weight: Tensor) -> Tensor:
        return step({**params, "8.weight": weight}, buffers, BATCH).grads["8.weight"].square().sum() / 2

    weight, h = params["8.weight"], 1e-6
    numeric = (energy(weight + h) - energy(weight - h)) / (2 * h)
    torch.testing.assert_close(grad(energy)(weight).sum(), numeric, rtol=1e-6, atol=1e-10)


def test_where_a_step_is_differentiated_its_perturbation_is_a_constant() -> None:
    params, buffers = split_state(smooth())
    step = make_apart_step(smooth(), F.cross_entropy, epsilon=0.3, groups=2)
    given = step(params, buffers, BATCH).perturbation
    fixed = make_apart_step(smooth(), F.cross_entropy, groups=2, rule=lambda *_: given)
    slopes, expected = (grad(lambda p, s=s: s(p, buffers, BATCH).adversarial_loss)(params) for s in (step, fixed))
    torch.testing.assert_close(slopes, expected, **ROUNDING)


every_step = pytest.mark.parametrize("kind", STEPS)


@every_step
def test_vmap_over_the_radius_equals_the_radii_one_by_one(kind: str) -> None:
    model = smooth()
    step, state, more = STEPS[kind](model), split_state(model), more_of(kind, model)
    radii = torch.tensor([0.0, 0.05, 0.5], dtype=torch.float64)
    together = vmap(lambda e: step(*state, BATCH, *more, epsilon=e))(radii)
    for i, radius in enumerate(radii):
        assert_same(tree_map(lambda t, i=i: t[i], together), step(*state, BATCH, *more, epsilon=radius))


@pytest.mark.parametrize(("kind", "momentum"), [("two passes", 0.1), *((kind, None) for kind in STEPS)])
def test_vmap_over_models_equals_the_models_one_by_one(kind: str, momentum: float | None) -> None:
    models = [smooth(seed) for seed in range(3)]
    for model in models:
        model[1].momentum = model[4].momentum = momentum
    step, more = STEPS[kind](models[0]), more_of(kind, models[0])
    params, buffers = stack_module_state(models)
    together = vmap(lambda p, b: step(p, b, BATCH, *more))(tree_map(Tensor.detach, params), buffers)
    for i, model in enumerate(models):
        assert_same(tree_map(lambda t, i=i: t[i], together), step(*split_state(model), BATCH, *more))


def test_vmap_over_models_and_radii() -> None:
    step, params, buffers = small_step(groups=2)
    radii = torch.tensor([0.0, 0.2], dtype=torch.float64)
    scaled = {name: torch.stack([p, 1.1 * p]) for name, p in params.items()}
    together = vmap(lambda p: vmap(lambda e: step(p, buffers, BATCH, epsilon=e))(radii))(scaled)
    for i, factor in enumerate((1.0, 1.1)):
        for j, radius in enumerate(radii):
            one = step({name: factor * p for name, p in params.items()}, buffers, BATCH, epsilon=radius)
            assert_same(tree_map(lambda t, i=i, j=j: t[i, j], together), one)


# torch.compile


@pytest.mark.usefixtures("dynamo")
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("two passes", {}),
        ("APART-SAM", {}),
        ("one pass", {}),
        pytest.param("two passes", {"microbatches": 2}, marks=pytest.mark.slow),
    ],
)
def test_a_compiled_step_is_one_graph_over_many_steps_and_equals_the_eager_one(kind, options):
    model = smooth()
    model[1].momentum = None
    step, more = STEPS[kind](model, **options), more_of(kind, model)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(step, backend=counter, fullgraph=True)
    params, buffers = split_state(model)
    for t in range(3):
        call = {"epsilon": torch.tensor(0.1 + 0.2 * t), "loss_scale": torch.tensor(2.0**t)}
        out = compiled(params, buffers, images(seed=t), *more, **call)
        assert_same(out, step(params, buffers, images(seed=t), *more, **call))
        buffers, params = out.buffers, {name: p - 0.1 * out.grads[name] for name, p in params.items()}
    assert counter.frame_count == 1


@pytest.mark.usefixtures("dynamo")
@pytest.mark.parametrize("training", [False, True])
def test_a_model_that_was_never_run_compiles_as_a_function(training: bool) -> None:
    model, (x, _) = one_layer(), images()
    compiled = torch.compile(functionalize(model), fullgraph=True, backend="aot_eager")
    state = split_state(model)
    expected = functionalize(model)(*state, x, training=training)
    torch.testing.assert_close(compiled(*state, x, training=training), expected, **ROUNDING)


@pytest.mark.usefixtures("dynamo")
def test_a_compiled_step_draws_other_signs_in_every_call() -> None:
    model = one_layer(16)
    step = make_one_pass_step(model, F.cross_entropy, epsilon=0.3, groups=4)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    first, second = (compiled(*split_state(model), BATCH, epsilon=torch.tensor(0.2)) for _ in range(2))
    assert signs_differ(first.perturbation, second.perturbation)
    radii = torch.cat([part.abs() for shift in first.perturbation.values() for part in shift])
    torch.testing.assert_close(radii, torch.full_like(radii, 0.2), rtol=1e-6, atol=0)  # of float32
    torch.testing.assert_close(first.grads, step(*split_state(model), BATCH, first.perturbation).grads, **ROUNDING)


@pytest.mark.slow
@pytest.mark.usefixtures("dynamo")
@pytest.mark.parametrize("kind", ["two passes", "one pass"])
def test_a_step_compiled_by_inductor_equals_the_eager_one(kind: str) -> None:
    model = smooth()
    step, arguments = STEPS[kind](model), (*split_state(model), BATCH, *more_of(kind, model))
    assert_same(torch.compile(step, fullgraph=True, dynamic=False)(*arguments), step(*arguments))


@pytest.mark.slow
@pytest.mark.usefixtures("dynamo")
def test_a_compiled_vmapped_step_equals_the_models_one_by_one() -> None:
    step, params, buffers = small_step(epsilon=0.1, groups=2)
    stacked = {name: torch.stack([p, 1.1 * p]) for name, p in params.items()}
    together = torch.compile(vmap(lambda p: step(p, buffers, BATCH)), backend="aot_eager", fullgraph=True)(stacked)
    for i, factor in enumerate((1.0, 1.1)):
        one = step({name: factor * p for name, p in params.items()}, buffers, BATCH)
        assert_same(tree_map(lambda t, i=i: t[i], together), one)


@pytest.mark.slow
@pytest.mark.usefixtures("dynamo")
@pytest.mark.parametrize("kind", ["two passes", "one pass"])
def test_models_and_batch_sizes_in_one_process_compile_to_a_graph_each_without_symbolic_sizes(kind: str) -> None:
    """Without `dynamic=False`: Dynamo would make symbols of what differs, and Inductor minutes of algebra of these."""
    graphs: list[list[Any]] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        graphs.append([value for value in inputs if not isinstance(value, Tensor)])
        return graph

    expected_graphs = 0
    for width, side in ((3, 4), (5, 6)):
        model = one_layer(width)
        step, more = STEPS[kind](model), more_of(kind, model)
        compiled = torch.compile(step, backend=backend, fullgraph=True)
        for samples in (8, 12, 8, 12):
            x = torch.randn(samples, 2, side, side, dtype=torch.float64)
            batch = x, torch.arange(samples) % 3
            assert_same(compiled(*split_state(model), batch, *more), step(*split_state(model), batch, *more))
        expected_graphs += 2
        assert len(graphs) == expected_graphs, f"{len(graphs)} graphs of {expected_graphs} models and batch sizes"
    assert not any(graphs), "a graph takes numbers that are no tensors: symbolic sizes"


@pytest.mark.usefixtures("dynamo")
def test_a_sync_batch_norm_that_has_nobody_to_synchronise_with_compiles() -> None:
    model = nn.SyncBatchNorm.convert_sync_batchnorm(one_layer())
    step, (params, buffers) = make_apart_step(model, F.cross_entropy, groups=2), split_state(model)
    assert any(isinstance(layer, nn.SyncBatchNorm) for layer in model)
    compiled = torch.compile(step, backend="eager", fullgraph=True)
    assert_same(compiled(params, buffers, BATCH), step(params, buffers, BATCH))


@pytest.mark.usefixtures("dynamo")
def test_a_checkpointed_model_does_not_compile_and_the_compiler_says_why() -> None:
    class Checkpointed(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(super().forward, x, use_reentrant=False)

    layers = list(convolutional())
    model = nn.Sequential(Checkpointed(*layers[:3]), *layers[3:])
    step = make_apart_step(model, F.cross_entropy)
    with pytest.raises(torch._dynamo.exc.Unsupported, match=r"checkpoint"):
        torch.compile(step, backend="aot_eager", fullgraph=True)(*split_state(model), BATCH)


@pytest.mark.usefixtures("dynamo")
def test_a_module_under_two_names_compiles() -> None:
    block = nn.Sequential(nn.BatchNorm2d(2), nn.Tanh())
    model = nn.Sequential(block, block, nn.Flatten(), nn.Linear(32, 3)).double()
    step, state = make_apart_step(model, F.cross_entropy, groups=2), split_state(model)
    expected = step(*state, BATCH)
    assert expected.stats["0.0"].mean.shape == (2, 2)  # of two calls
    compiled = torch.compile(step, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(*state, BATCH).grads, expected.grads, **ROUNDING)


@pytest.mark.usefixtures("dynamo")
@pytest.mark.parametrize("kind", ["two passes", "one pass"])
def test_a_compiled_step_refuses_a_loss_that_reaches_parameters_past_its_arguments(kind: str) -> None:
    model = one_layer()
    step = STEPS[kind](model, loss_fn=lambda o, t: F.cross_entropy(o, t) + model[0].weight.square().sum())
    with pytest.raises(Exception, match="past the arguments"):  # Dynamo may replace the error's class
        torch.compile(step, backend="eager", fullgraph=True)(*split_state(model), BATCH, *more_of(kind, model))


# The parts.


def test_the_parts_make_the_step() -> None:
    step, params, buffers = small_step(epsilon=0.1, groups=2)
    fmodel, batch = functionalize(convolutional()), BATCH
    out = step(params, buffers, batch)
    proxy = proxy_pass(fmodel, F.cross_entropy, params, buffers, batch)
    adversarial = adversarial_pass(fmodel, F.cross_entropy, params, buffers, batch, out.perturbation, groups=2)
    for name, g in out.grads.items():
        torch.testing.assert_close(g, (proxy.grads[name] + adversarial.grads[name]) / 2, **ROUNDING)
    torch.testing.assert_close(out.stat_grads, proxy.stat_grads, rtol=0, atol=0)


def test_another_rule_takes_the_place_of_the_sign() -> None:
    def halved(stats: Any, stat_grads: Any, epsilon: Tensor) -> dict[str, Perturbation]:
        return {layer: Perturbation(epsilon * g.mean, epsilon * g.scale / 2) for layer, g in stat_grads.items()}

    step, params, buffers = small_step(epsilon=0.5, rule=halved)
    out = step(params, buffers, BATCH)
    for layer, g in out.stat_grads.items():
        torch.testing.assert_close(out.perturbation[layer], Perturbation(0.5 * g.mean, 0.25 * g.scale))


def test_outputs_are_detached_also_from_parameters_that_require_gradients() -> None:
    step, params, buffers = small_step(groups=2)
    leaves = {name: p.clone().requires_grad_() for name, p in params.items()}
    out = step(leaves, buffers, BATCH)
    assert not any(leaf.requires_grad for leaf in tree_leaves(out._asdict()))
    with torch.no_grad():
        assert_same(out, step(params, buffers, BATCH))


def test_dropout_draws_from_the_default_generator() -> None:
    model = nn.Sequential(convolutional(), nn.Dropout(0.5)).double()
    step = make_apart_step(model, F.cross_entropy)
    outs = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        outs.append(step(*split_state(model), BATCH).output)
    assert torch.equal(outs[0], outs[1])
    assert not torch.equal(outs[0], outs[2])
    # each mapped model draws for itself, once the user says so
    out = vmap(lambda e: step(*split_state(model), BATCH, epsilon=e), randomness="different")(torch.zeros(2))
    assert not torch.equal(out.output[0], out.output[1])
