"""The methods as training steps, and the learner that takes them."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any, get_args

import pytest
import torch
import torch.nn.functional as F
from experiments.methods import Learner, NonFiniteError, initially_carried, make_step, with_ghost_noise
from experiments.settings import (
    METHODS,
    MethodName,
    MethodSettings,
    Settings,
    SettingsError,
    TrainingSettings,
)
from torch import Tensor, nn

from apart_func import (
    Perturbation,
    StepOutput,
    adversarial_pass,
    assign_grads_,
    functionalize,
    init_perturbation,
    l2_perturbation,
    make_apart_step,
    make_one_pass_step,
    random_sign_perturbation,
    sign_perturbation,
    split_state,
)


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(4 * 4 * 4, 3)
    )


def batch_of(count: int = 16, seed: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 1, 6, 6, generator=generator), torch.randint(3, (count,), generator=generator)


def learner_of(model: nn.Module | None = None, method: str = "plain", **training: Any) -> Learner:
    settings = Settings(method=MethodSettings(method, groups=4), training=TrainingSettings(**training))
    return Learner([model or network()], [settings])


def first_step(
    model: nn.Module, settings: MethodSettings, dtype: torch.dtype | None = None
) -> Callable[..., StepOutput]:
    """A method's step with what it carries at first, and what comes out but for that."""
    step, carried = make_step(model, settings, dtype), initially_carried(model, settings)
    return lambda params, buffers, batch, **keywords: step(params, buffers, batch, carried, **keywords)[0]


# steps


def test_the_plain_step_is_an_ordinary_forward_and_backward():
    model, (images, labels) = network(), batch_of()
    out = first_step(model, MethodSettings("plain"))(*split_state(model), (images, labels))
    ordinary = copy.deepcopy(model)
    loss = F.cross_entropy(ordinary(images), labels)
    loss.backward()
    assert out.loss == loss
    assert out.adversarial_loss.isnan()
    assert out.grads.keys() == dict(ordinary.named_parameters()).keys()
    for name, parameter in ordinary.named_parameters():
        assert torch.equal(out.grads[name], parameter.grad)
    for name, buffer in ordinary.named_buffers():
        assert torch.equal(out.buffers[name], buffer)


def test_the_sam_step_has_the_gradient_of_the_package():
    from pytorch_optimizer import SAM

    model, (images, labels) = network(), batch_of()
    out = first_step(model, MethodSettings("sam", rho=0.1))(*split_state(model), (images, labels))
    other = copy.deepcopy(model)
    optimizer = SAM(other.parameters(), torch.optim.SGD, rho=0.1, lr=0.0)
    F.cross_entropy(other(images), labels).backward()
    optimizer.first_step(zero_grad=True)
    second_loss = F.cross_entropy(other(images), labels)
    second_loss.backward()
    torch.testing.assert_close(out.adversarial_loss, second_loss.detach())
    for name, parameter in other.named_parameters():
        # They differ in how the norm is rounded, and the package adds 1e-12 to it.
        torch.testing.assert_close(out.grads[name], parameter.grad, rtol=1e-4, atol=1e-6)


def test_sam_moves_the_running_statistics_by_its_first_pass_alone():
    model, batch = network(), batch_of()
    params, buffers = split_state(model)
    sam = first_step(model, MethodSettings("sam"))(params, buffers, batch)
    plain = first_step(model, MethodSettings("plain"))(params, buffers, batch)
    for name, buffer in plain.buffers.items():
        assert torch.equal(sam.buffers[name], buffer)


@pytest.mark.parametrize("method", METHODS)
def test_a_step_changes_nothing(method):
    model, batch = network(), batch_of()
    before = copy.deepcopy(model.state_dict())
    params, buffers = split_state(model)
    out = first_step(model, MethodSettings(method, groups=4))(params, buffers, batch)
    assert out.all_finite
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("method", METHODS)
def test_low_precision_reaches_the_activations_and_not_the_gradients(method):
    model, batch = network(), batch_of()
    out = first_step(model, MethodSettings(method, groups=4), torch.bfloat16)(*split_state(model), batch)
    assert out.output.dtype == torch.bfloat16
    assert {grad.dtype for grad in out.grads.values()} == {torch.float32}


@pytest.mark.parametrize("method", ["plain", "sam", "one_pass"])
def test_a_step_compiles_into_one_graph(method, traced_alone):
    model, batch = network(), batch_of()
    step = first_step(model, MethodSettings(method, groups=4))
    params, buffers = split_state(model)
    eager, compiled = step(params, buffers, batch), torch.compile(step, fullgraph=True)(params, buffers, batch)
    for name, grad in eager.grads.items():
        torch.testing.assert_close(compiled.grads[name], grad)
    for name, buffer in eager.buffers.items():
        torch.testing.assert_close(compiled.buffers[name], buffer)


@pytest.mark.parametrize(
    ("rule", "function"),
    [
        ("sign", sign_perturbation),
        ("random_sign", random_sign_perturbation),
        ("l2", l2_perturbation),
    ],
)
def test_a_rule_is_the_library_s(rule, function):
    model, batch = network(), batch_of()
    settings = MethodSettings("apart", rule=rule, groups=4)
    outs = []
    for step in (first_step(model, settings), make_apart_step(model, F.cross_entropy, groups=4, rule=function)):
        torch.manual_seed(0)
        outs.append(step(*split_state(model), batch))
    for layer, shift in outs[1].perturbation.items():
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(outs[0].perturbation[layer], shift, strict=True))


# ghost noise, and what perturbed statistics are in one group


def test_ghost_noise_normalises_every_sample_by_a_random_group_that_no_gradient_goes_through():
    layer = nn.BatchNorm2d(3).double()
    with torch.no_grad():
        layer.weight.uniform_(0.5, 2)
        layer.bias.normal_()
    gamma, beta = layer.weight.detach()[:, None, None], layer.bias.detach()[:, None, None]
    x, weights = torch.randn(2, 8, 3, 5, 5, dtype=torch.float64)
    x.requires_grad_()
    torch.manual_seed(0)
    output = with_ghost_noise(nn.Sequential(layer), size=4)(x)
    (output * weights).sum().backward()

    torch.manual_seed(0)
    groups = torch.randint(8, (8, 4))
    other = x.detach().clone().requires_grad_()
    mean = other.mean((0, 2, 3))[:, None, None]
    s = (other.var((0, 2, 3), correction=0) + layer.eps).sqrt()[:, None, None]
    expected = []
    for sample, group in zip(other, groups, strict=True):
        ghosts = other.detach()[group]
        ghost_mean = ghosts.mean((0, 2, 3))[:, None, None]
        ghost_s = (ghosts.var((0, 2, 3), correction=0) + layer.eps).sqrt()[:, None, None]
        shift = (ghost_mean - mean.detach()) / s.detach()
        expected.append(gamma * ((sample - mean) / s - shift) * (s.detach() / ghost_s) + beta)
    (torch.stack(expected) * weights).sum().backward()
    torch.testing.assert_close(output, torch.stack(expected))
    torch.testing.assert_close(x.grad, other.grad)


def test_ghost_noise_is_off_in_evaluation_and_knows_no_other_batch_norm():
    from timm.layers import BatchNormAct2d

    model, x = nn.Sequential(nn.BatchNorm1d(3)).eval(), torch.randn(4, 3)
    assert torch.equal(with_ghost_noise(model, 2)(x), model(x))
    with pytest.raises(SettingsError, match="ghost noise does not know BatchNormAct2d, layer '0'"):
        with_ghost_noise(nn.Sequential(BatchNormAct2d(3)), 2)


def test_at_one_group_the_adversarial_pass_is_a_move_of_scale_and_bias():
    torch.manual_seed(0)
    layer, x = nn.BatchNorm1d(5).double(), 2 + torch.randn(16, 5, dtype=torch.float64)
    shift = Perturbation(*torch.tensor([[0.1], [-0.2]], dtype=torch.float64).expand(2, 5))
    model, seen = nn.Sequential(layer), []

    def loss(y: Tensor, _: Tensor) -> Tensor:
        seen.append(y.detach())
        return y.sum()

    adversarial_pass(functionalize(model), loss, *split_state(model), (x, x), {"0": shift})
    mean, s = x.mean(0), (x.var(0, correction=0) + layer.eps).sqrt()
    scale = layer.weight * (1 - 0.2)
    moved = F.batch_norm(x, None, None, scale, layer.bias - scale * 0.1 * mean / s, training=True, eps=layer.eps)
    torch.testing.assert_close(seen[0], moved.detach(), rtol=0, atol=2e-15)  # a few roundings of float64


@pytest.mark.parametrize("method", get_args(MethodName))
def test_smoothed_labels_reach_the_loss_of_every_method(method):
    model, losses = network(), []
    for smoothing in (0.0, 0.3):
        torch.manual_seed(0)
        settings = MethodSettings(method, groups=4, label_smoothing=smoothing)
        losses.append(first_step(model, settings)(*split_state(model), batch_of()).loss)
    assert losses[0] != losses[1]


# the learner


@pytest.mark.parametrize("nesterov", [False, True])
def test_plain_steps_are_those_of_an_ordinary_loop(nesterov):
    model = network()
    other = copy.deepcopy(model)
    learner = learner_of(model, momentum=0.9, nesterov=nesterov, weight_decay=5e-4, clip=0.5)
    optimizer = torch.optim.SGD(other.parameters(), lr=0.1, momentum=0.9, nesterov=nesterov, weight_decay=5e-4)
    for number in range(3):
        images, labels = batch_of(seed=number)
        learner.train([(images, labels)], 0.1, 1, number)
        optimizer.zero_grad()
        F.cross_entropy(other(images), labels).backward()
        nn.utils.clip_grad_norm_(other.parameters(), 0.5)
        optimizer.step()
    trained = learner.evaluated(0).state_dict()
    for name, tensor in other.state_dict().items():
        assert torch.equal(trained[name], tensor)


def test_one_pass_steps_carry_the_perturbation():
    model, other = network(), network()
    learner = Learner([model], [Settings(method=MethodSettings("one_pass", groups=4, clean_fraction=0.75))])
    options = {"epsilon": 0.1, "groups": 4, "clean_fraction": 0.75, "rule": sign_perturbation}
    step = make_one_pass_step(other, F.cross_entropy, **options)
    optimizer = torch.optim.SGD(other.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    (params, buffers), perturbation = split_state(other), init_perturbation(other)
    for number in (1, 2, 3):
        learner.train([batch_of(seed=number)], 0.1, 1, number)
        out = step(params, buffers, batch_of(seed=number), perturbation)
        buffers, perturbation = out.buffers, out.perturbation
        assign_grads_(other, out.grads)
        optimizer.step()
    assert perturbation["1"].mean.abs().max() > 0
    for name, param in params.items():
        assert torch.equal(learner.state["params"][name], param)


def test_a_rehearsal_changes_nothing():
    learner = learner_of(nn.Sequential(network(), nn.Dropout(0.5)), "apart")
    before, state = copy.deepcopy(learner.state_dict()), torch.get_rng_state()
    learner.rehearse(batch_of())
    assert torch.equal(torch.get_rng_state(), state)
    for kind in ("params", "buffers"):
        for name, tensor in learner.state_dict()[kind].items():
            assert torch.equal(tensor, before[kind][name])


def test_a_step_that_is_not_finite_moves_nothing():
    learner = learner_of()
    before = copy.deepcopy(learner.state_dict())
    with pytest.raises(NonFiniteError, match="epoch 2, step 7 is not finite"):
        learner.train([(batch_of()[0] * math.nan, batch_of()[1])], 0.1, epoch=2, step=7)
    for kind in ("params", "buffers", "momenta"):
        for name, tensor in learner.state_dict()[kind].items():
            assert torch.equal(tensor, before[kind][name])
