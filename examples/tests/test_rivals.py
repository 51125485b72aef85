"""What APART is compared with, each method against its formula."""

from __future__ import annotations

import copy
from typing import get_args

import pytest
import torch
import torch.nn.functional as F
from experiments.methods import initially_carried, make_step, with_ghost_noise
from experiments.settings import MethodName, MethodSettings, SettingsError
from test_training_parts import batch_of, first_step, network
from torch import Tensor, nn

from apart_func import Perturbation, adversarial_pass, functionalize, split_state


def gradient_at(model: nn.Module, moved: dict[str, Tensor], batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    """The gradient of an ordinary loss, where some parameters are other ones."""
    other = copy.deepcopy(model)
    other.load_state_dict({**other.state_dict(), **moved})
    F.cross_entropy(other(batch[0]), batch[1]).backward()
    return {name: parameter.grad for name, parameter in other.named_parameters()}


def assert_equal(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=1e-4, atol=1e-6)  # norms are rounded otherwise


def test_sam_on_moves_the_scale_and_bias_of_batch_norm_alone():
    model, batch = network(), batch_of()
    params, buffers = split_state(model)
    out = first_step(model, MethodSettings("sam_on", rho=0.2))(params, buffers, batch)
    first = {name: grad for name, grad in gradient_at(model, {}, batch).items() if name.startswith("1.")}
    moved = {name: params[name].detach() + 0.2 * grad.sign() for name, grad in first.items()}
    assert moved.keys() == {"1.weight", "1.bias"}
    assert_equal(out.grads, gradient_at(model, moved, batch))


def test_momentum_sam_goes_back_along_the_momentum_of_its_own_gradients():
    model = network()
    params, buffers = split_state(model)
    settings = MethodSettings("momentum_sam", rho=0.3)
    step, carried = make_step(model, settings, momentum=0.8), initially_carried(model, settings)
    velocity = {name: torch.zeros_like(param) for name, param in params.items()}
    for number in range(3):
        batch = batch_of(seed=number)
        out, carried = step(params, buffers, batch, carried)
        length = torch.cat([v.flatten() for v in velocity.values()]).norm()
        factor = 0.3 / length if length > 0 else 0.0
        expected = gradient_at(model, {k: p.detach() - factor * velocity[k] for k, p in params.items()}, batch)
        assert_equal(out.grads, expected)
        velocity = {name: 0.8 * velocity[name] + grad for name, grad in expected.items()}
        assert_equal(carried, velocity)


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


def test_rivals_refuse_micro_batches():
    with pytest.raises(SettingsError, match="micro-batches are APART's"):
        make_step(network(), MethodSettings("sam", microbatches=2))
