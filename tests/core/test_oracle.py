"""The definition against what needs no definition: plain training, and difference quotients."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from architectures import EXAMPLES, Architecture, architectures
from golden.models import conv1d
from hypothesis import given, settings
from oracle import Shift, oracle_adversarial, oracle_proxy, oracle_step
from torch import Tensor, nn


def small_case() -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    """A float64 model with two norm layers of six channels, '1' and '4', and twelve sequences of length four."""
    torch.manual_seed(0)
    return conv1d().double(), (torch.randn(12, 2, 4).double(), torch.randint(3, (12,)))


def pushed(push: Callable[[Shift], Shift]) -> dict[str, Shift]:
    """A perturbation of the small case, made from no perturbation."""
    return {layer: push(Shift(*torch.zeros(2, 6).double())) for layer in ("1", "4")}


@settings(max_examples=EXAMPLES)
@given(architectures())
def test_the_proxy_pass_is_plain_training(architecture: Architecture) -> None:
    model, (x, y) = architecture.build()
    model, x = model.double(), x.double()
    proxy = oracle_proxy(model, F.cross_entropy, x, y)
    # The model itself is run here, with PyTorch's own batch norm.
    output = model(x)
    loss = F.cross_entropy(output, y)
    params = {name: p for name, p in model.named_parameters() if p.requires_grad}
    grads = torch.autograd.grad(loss, list(params.values()), allow_unused=True, materialize_grads=True)
    # Two orders of float64 sums, which a layer with hardly any variance enlarges.
    tolerance = {"rtol": 1e-9, "atol": 1e-9}
    torch.testing.assert_close(proxy.output, output.detach(), **tolerance)
    torch.testing.assert_close(proxy.grads, dict(zip(params, grads, strict=True)), **tolerance)
    buffers = {name: proxy.buffers[name] for name, _ in model.named_buffers()}
    torch.testing.assert_close(buffers, dict(model.named_buffers()), **tolerance)


def test_a_zero_perturbation_of_one_group_changes_nothing() -> None:
    model, batch = small_case()
    adversarial = oracle_adversarial(model, F.cross_entropy, *batch, pushed(lambda none: none), groups=0)
    proxy = oracle_proxy(model, F.cross_entropy, *batch)
    torch.testing.assert_close(adversarial.loss, proxy.loss, rtol=0, atol=0)
    torch.testing.assert_close(adversarial.grads, proxy.grads, rtol=0, atol=0)


@pytest.mark.parametrize("part", ["mean", "scale"])
@pytest.mark.parametrize("layer", ["1", "4"])
def test_statistic_gradients_are_the_slope_of_the_adversarial_loss(layer: str, part: str) -> None:
    model, batch = small_case()
    gradient = getattr(oracle_proxy(model, F.cross_entropy, *batch).stat_grads[layer], part)
    h = 1e-5
    slopes = []
    for channel in range(6):
        losses = []
        for signed_h in (h, -h):
            perturbation = pushed(lambda none: Shift(*(delta.clone() for delta in none)))
            getattr(perturbation[layer], part)[channel] = signed_h
            losses.append(oracle_adversarial(model, F.cross_entropy, *batch, perturbation, groups=1).loss)
        slopes.append((losses[0] - losses[1]) / (2 * h))
    # A central difference is off by h² times a third derivative, and by rounding, 1e-16/h.
    torch.testing.assert_close(gradient, torch.stack(slopes), rtol=1e-6, atol=1e-9)


def test_a_perturbed_mean_and_deviation_are_what_a_layer_normalises_by() -> None:
    layer = nn.BatchNorm1d(5, eps=1e-3).double()
    model = nn.Sequential(layer)
    nn.init.normal_(layer.weight)
    nn.init.normal_(layer.bias)
    x = 1 + torch.randn(8, 5).double()
    delta = Shift(0.3 * torch.randn(5).double(), 0.3 * torch.randn(5).double())
    mean, s = x.mean(0), (x.var(0, correction=0) + 1e-3).sqrt()
    pushed_mean, pushed_s = mean * (1 + delta.mean), s / (1 + delta.scale)
    expected = layer.weight * (x - pushed_mean) / pushed_s + layer.bias

    outputs: list[Tensor] = []
    oracle_adversarial(model, lambda output, _: outputs.append(output) or output.sum(), x, None, {"0": delta}, groups=1)
    # rounding of another order of operations
    torch.testing.assert_close(outputs[0].detach(), expected.detach(), rtol=1e-12, atol=1e-14)


def test_ghost_groups_are_batches_of_their_own() -> None:
    # In a model that does not mix samples but by batch norm, a pass in groups is a pass for each group.
    model, (x, y) = small_case()
    delta = pushed(lambda none: Shift(none.mean + 0.1, none.scale - 0.2))
    together = oracle_adversarial(model, F.cross_entropy, x, y, delta, groups=3)
    alone = [oracle_adversarial(model, F.cross_entropy, x[g::3], y[g::3], delta, groups=1) for g in range(3)]
    # rounding: the mean over twelve samples, or over three means of four
    torch.testing.assert_close(together.loss, sum(group.loss for group in alone) / 3, rtol=1e-13, atol=0)
    mean_grads = {name: sum(group.grads[name] for group in alone) / 3 for name in together.grads}
    torch.testing.assert_close(together.grads, mean_grads, rtol=1e-11, atol=1e-15)


def test_sam_differentiates_the_adversarial_pass_where_the_gradient_leads() -> None:
    model, batch = small_case()
    rho, settings = 0.7, {"epsilon": 0.1, "groups": 2, "ratio": 1.0}
    plain = oracle_step(model, F.cross_entropy, batch, **settings)
    sam = oracle_step(model, F.cross_entropy, batch, **settings, rho=rho)
    gradient = oracle_proxy(model, F.cross_entropy, *batch).grads
    torch.testing.assert_close(sam.loss, plain.loss, rtol=0, atol=0)

    length = torch.cat([grad.flatten() for grad in gradient.values()]).norm()
    moved = {name: p.detach() + rho * gradient[name] / length for name, p in model.named_parameters()}
    model.load_state_dict(moved, strict=False)
    adversarial = oracle_adversarial(model, F.cross_entropy, *batch, plain.perturbation, groups=2)
    halves = {name: gradient[name] / 2 + grad / 2 for name, grad in adversarial.grads.items()}
    # rounding of the norm, a sum in another order
    torch.testing.assert_close(sam.adversarial_loss, adversarial.loss, rtol=1e-12, atol=0)
    torch.testing.assert_close(sam.grads, halves, rtol=1e-11, atol=1e-14)


def test_the_callers_model_and_batch_are_never_changed() -> None:
    model, (x, y) = small_case()
    model = nn.Sequential(nn.ReLU(inplace=True), model)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    x_before = x.clone()
    oracle_step(model, F.cross_entropy, (x, y), epsilon=0.1, groups=2, ratio=0.5, rho=0.1)
    torch.testing.assert_close(dict(model.state_dict()), state, rtol=0, atol=0)
    assert torch.equal(x, x_before)
    assert all(p.grad is None for p in model.parameters())
