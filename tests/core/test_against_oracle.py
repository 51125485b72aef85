"""The library against the definition: on random architectures, and on each decision about what a step means."""

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from agreement import TOLERANCE, assert_agree, functional_step, relative_error, take_step
from architectures import EXAMPLES, Architecture, Block, Norm, architectures
from hypothesis import given, settings
from loops import drop_in_step
from oracle import Adversarial, oracle_adversarial
from small import Parts
from timm.layers import BatchNormAct2d, ScaledStdConv2d
from torch import Tensor, nn

from apart_func import Perturbation, adversarial_pass, functionalize, make_apart_step, split_state


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def sequential(*layers: nn.Module) -> nn.Module:
    """A float64 model in training mode, whose batch norm is not at its initial values."""
    model = nn.Sequential(*layers).double()
    for layer in model.modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            for parameter in layer.parameters():
                nn.init.normal_(parameter)
    return model


def mlp(norm: nn.Module) -> nn.Module:
    """Five numbers to three logits, with one norm layer of width four, named '1'."""
    return sequential(nn.Linear(5, 4), norm, nn.Tanh(), nn.Linear(4, 3))


def vectors(samples: int = 12, seed: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(samples, 5, generator=generator).double(), torch.randint(3, (samples,), generator=generator)


def images(samples: int = 8, size: int = 5) -> tuple[Tensor, Tensor]:
    return torch.randn(samples, 3, size, size).double(), torch.randint(3, (samples,))


# Any architecture.


def check(architecture: Architecture, take: Any) -> None:
    tolerance = TOLERANCE[architecture.dtype]
    assert_agree(take_step(*architecture.build(), take, tolerance, **architecture.settings()))


@pytest.mark.parametrize("take", [functional_step, drop_in_step])
@settings(max_examples=EXAMPLES)
@given(architectures())
def test_a_step_of_any_architecture_is_what_the_definition_says(take: Any, architecture: Architecture) -> None:
    check(architecture, take)


@pytest.mark.slow
@settings(max_examples=max(500, EXAMPLES))
@given(architectures())
def test_a_step_of_five_hundred_other_architectures_is_what_the_definition_says(architecture: Architecture) -> None:
    check(architecture, functional_step)


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    # Five to ten times, and in bfloat16 twice, the worst of ten seeds. What the random test allows for the sake of
    # unlucky architectures would hide a loss of precision here.
    [(torch.float64, 1e-14), (torch.float32, 5e-6), (torch.bfloat16, 2e-2)],
)
def test_a_well_conditioned_network_is_off_by_a_few_roundings_only(dtype: torch.dtype, tolerance: float) -> None:
    norm = Norm(affine=True, frozen_scale=False, momentum=0.1, eps=1e-5, tracked=True, training=True, calls=1)
    block = Block(width=8, bias=False, norm=norm, activation="silu", residual=False)
    architecture = Architecture(
        channels=3,
        positions=(4, 4),
        blocks=(block, replace(block, residual=True)),
        uncalled_norm=False,
        samples=32,
        ratio=1.0,
        groups=4,
        epsilon=0.1,
        dtype=dtype,
        seed=0,
    )
    model, batch = architecture.build()
    assert_agree(take_step(model, batch, groups=4, tolerance=tolerance))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_statistics_of_half_precision_activations_are_as_exact_as_float32(dtype: torch.dtype) -> None:
    # The norm layer comes first, so that nothing but its own moments is rounded.
    model = sequential(nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(75, 3)).to(dtype)
    x, y = images(samples=64)
    step = take_step(model, ((10 + x).to(dtype), y))
    # float32 rounds at 6e-8, and σ² loses (μ/σ)² = 100 times that where it is the difference of two sums. Moments in
    # half precision would be off by 5e-4 or more.
    assert relative_error(step.library.stats, step.definition.stats) < 1e-5


# Which layers are perturbed.


def test_a_layer_called_twice_adds_its_statistic_gradients_and_moves_with_both_calls() -> None:
    def unrolled(first: nn.Module, second: nn.Module) -> nn.Module:
        """Two names for what is one layer if `second` is `first`."""
        parts = {"first": first, "second": second, "head": nn.Linear(5, 3)}
        return Parts(lambda m, x: m.head(m.second(torch.tanh(m.first(x))).tanh()), **parts)

    shared = unrolled(*[nn.BatchNorm1d(5, momentum=0.5)] * 2)
    nn.init.normal_(shared.first.weight)
    apart = unrolled(nn.BatchNorm1d(5), nn.BatchNorm1d(5))
    apart.load_state_dict(shared.state_dict())  # of two layers, equal in value

    of_shared, of_each = take_step(shared, vectors()), take_step(apart, vectors())
    assert_agree(of_shared)
    found, each = of_shared.library, of_each.library.stat_grads
    # rounding of sums of two float64 numbers
    for one, *parts in zip(found.stat_grads["first"], each["first"], each["second"], strict=True):
        torch.testing.assert_close(one, sum(parts), rtol=1e-13, atol=1e-16)
    first, second = found.stats["first"].mean  # (2, 5)
    # from 0, half of the way to the first mean and then half of the way to the second
    torch.testing.assert_close(found.buffers["first.running_mean"], first / 4 + second / 2, rtol=1e-13, atol=1e-16)
    assert found.buffers["first.num_batches_tracked"] == 2


def test_a_layer_in_evaluation_mode_is_plain_and_in_no_tree() -> None:
    model = sequential(nn.BatchNorm1d(5), nn.Tanh(), nn.BatchNorm1d(5), nn.Linear(5, 3))
    model[0].eval()
    step = take_step(model, vectors(), groups=3)
    for tree in (step.library.stats, step.library.stat_grads, step.library.perturbation):
        assert tree.keys() == {"2"}
    assert step.library.buffers["0.num_batches_tracked"] == 0
    assert_agree(step)


def test_an_untracked_layer_in_evaluation_mode_normalises_by_the_whole_batch_in_both_passes() -> None:
    model = sequential(nn.BatchNorm1d(5, track_running_stats=False), nn.Tanh(), nn.BatchNorm1d(5), nn.Linear(5, 3))
    model[0].eval()
    step = take_step(model, vectors(), groups=3)
    assert step.library.stats.keys() == {"2"}
    assert_agree(step)


def test_a_training_layer_that_is_never_called_has_no_statistics_and_a_zero_perturbation() -> None:
    model = mlp(nn.BatchNorm1d(4))
    model[1].uncalled = nn.BatchNorm1d(7).double()
    step = take_step(model, vectors())
    assert step.library.stats.keys() == {"1"}
    assert not step.library.perturbation["1.uncalled"].mean.any()
    assert not step.library.perturbation["1.uncalled"].scale.any()
    assert step.library.buffers["1.uncalled.num_batches_tracked"] == 0
    assert_agree(step)


def test_batch_norm_of_a_convolutions_weights_is_left_alone() -> None:
    model = sequential(ScaledStdConv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(100, 3))
    assert_agree(take_step(model, images(), groups=2))


def test_a_norm_act_layer_is_perturbed_before_its_activation() -> None:
    norm = BatchNormAct2d(3, act_layer=nn.SiLU, inplace=True)
    assert_agree(take_step(sequential(norm, nn.Flatten(), nn.Linear(75, 3)), images(), groups=2))


# What is differentiated.


def test_a_frozen_scale_stays_as_it_is_and_still_yields_statistic_gradients() -> None:
    model, batch = mlp(nn.BatchNorm1d(4)), vectors()
    trained = take_step(model, batch)
    model[1].weight.requires_grad_(False)
    frozen = take_step(model, batch)
    assert "1.weight" not in frozen.library.grads
    assert torch.equal(frozen.library.buffers["1.weight"], model[1].weight)
    torch.testing.assert_close(frozen.library.stat_grads, trained.library.stat_grads, rtol=0, atol=0)
    assert_agree(frozen)


def test_a_layer_without_affine_has_the_statistic_gradients_of_scale_one() -> None:
    absent, batch = mlp(nn.BatchNorm1d(4, affine=False)), vectors()
    neutral = sequential(absent[0], nn.BatchNorm1d(4), *absent[2:])
    nn.init.ones_(neutral[1].weight)
    nn.init.zeros_(neutral[1].bias)
    step = take_step(absent, batch)
    torch.testing.assert_close(step.library.stat_grads, take_step(neutral, batch).library.stat_grads, rtol=0, atol=0)
    assert_agree(step)


def test_a_tied_parameter_appears_once_with_the_gradient_of_all_its_uses() -> None:
    model = sequential(nn.Linear(5, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 5))
    model[3].weight = model[0].weight
    step = take_step(model, vectors(), groups=2)
    assert "0.weight" in step.library.grads
    assert "3.weight" not in step.library.grads
    assert_agree(step)


# Buffers.


def test_without_momentum_running_statistics_are_the_average_of_all_batches() -> None:
    norm = nn.BatchNorm1d(4, momentum=None)
    model = mlp(norm)
    params, buffers = split_state(model)
    apart_step = make_apart_step(model, F.cross_entropy)
    means, variances = [], []
    for seed in range(3):
        out = apart_step(params, buffers, vectors(12, seed))
        buffers = out.buffers
        means.append(out.stats["1"].mean)
        variances.append(out.stats["1"].var * 12 / 11)  # the unbiased estimate
    assert buffers["1.num_batches_tracked"] == 3
    # rounding of a float64 sum of three
    torch.testing.assert_close(buffers["1.running_mean"], torch.stack(means).mean(0), rtol=1e-13, atol=1e-15)
    torch.testing.assert_close(buffers["1.running_var"], torch.stack(variances).mean(0), rtol=1e-13, atol=1e-15)


def test_an_untracked_layer_is_perturbed_and_has_no_running_statistics() -> None:
    step = take_step(mlp(nn.BatchNorm1d(4, track_running_stats=False)), vectors())
    assert step.library.buffers == {}
    assert step.library.stats.keys() == {"1"}
    assert_agree(step)


# Groups and batches.


def test_each_group_can_have_a_perturbation_of_its_own() -> None:
    model, batch, groups = mlp(nn.BatchNorm1d(4)), vectors(), 3
    perturbation = {"1": Perturbation(0.2 * torch.randn(groups, 4).double(), 0.2 * torch.randn(groups, 4).double())}
    library = adversarial_pass(
        functionalize(model), F.cross_entropy, *split_state(model), batch, perturbation, groups=groups
    )
    definition = oracle_adversarial(model, F.cross_entropy, *batch, perturbation, groups)
    for field in Adversarial._fields:
        assert relative_error(getattr(library, field), getattr(definition, field)) < TOLERANCE[torch.float64], field


def test_a_dict_input_is_passed_as_keywords_and_a_0d_tensor_of_it_whole() -> None:
    model = Parts(lambda m, *, x, temperature: m.rest(x) / temperature, rest=mlp(nn.BatchNorm1d(4)))
    x, y = vectors()
    batch = {"x": x, "temperature": torch.tensor(0.5).double()}, y
    assert_agree(take_step(model, batch, ratio=0.5))
