"""APART-SAM: the functional step and the drop-in around a two-phase optimizer, against the definition."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from loops import gradients, weights
from oracle import oracle_sam_step
from small import convolutional, images
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.func import vmap

from apart_func import APART, ApartError, Perturbation, make_apart_sam_step, make_apart_step, split_state

# Rounding of float64 in another order, and its growth over the steps of a test.
ROUNDING = {"rtol": 1e-10, "atol": 1e-14}
OPTIONS: dict[str, Any] = {"epsilon": 0.2, "groups": 2, "ratio": 0.5, "rho": 0.3}
LEARNING_RATE = 0.1


def follow_definition(model: nn.Module, batch: Any, perturbation: dict[str, Perturbation]) -> dict[str, Tensor]:
    """Gradients of the definition at the model's state, by which the model then takes a step of plain descent."""
    out = oracle_sam_step(model, F.cross_entropy, batch, perturbation=perturbation, **OPTIONS)
    params = {name: p.detach() - LEARNING_RATE * out.grads[name] for name, p in model.named_parameters()}
    model.load_state_dict(params | out.buffers)
    return out.grads


def test_the_functional_step_is_what_the_definition_says_over_several_steps() -> None:
    model = convolutional()
    params, buffers = split_state(copy.deepcopy(model))
    step = make_apart_sam_step(model, F.cross_entropy, **OPTIONS)
    for t in range(4):
        out = step(params, buffers, images(seed=t))
        torch.testing.assert_close(out.grads, follow_definition(model, images(seed=t), out.perturbation), **ROUNDING)
        params, buffers = {name: p - LEARNING_RATE * out.grads[name] for name, p in params.items()}, out.buffers
        torch.testing.assert_close(params | buffers, dict(model.state_dict()), **ROUNDING)


class SAM:
    """A two-phase optimizer as they are written: up by what `backward()` has left so far, back, and a step."""

    def __init__(self, optimizer: torch.optim.Optimizer, rho: float) -> None:
        self.optimizer, self.rho = optimizer, rho
        self.before: dict[Tensor, Tensor] = {}

    @torch.no_grad()
    def ascend(self) -> None:
        params = [p for group in self.optimizer.param_groups for p in group["params"] if p.grad is not None]
        norm = torch.stack([p.grad.norm() for p in params]).norm()
        for p in params:
            self.before[p] = p.clone()
            p += self.rho / norm * p.grad

    @torch.no_grad()
    def step(self) -> None:
        for p, before in self.before.items():
            p.copy_(before)
        self.optimizer.step()


def test_the_drop_in_around_a_two_phase_optimizer_is_what_the_definition_says_over_several_steps() -> None:
    model = convolutional()
    definition = copy.deepcopy(model)
    apart = APART(model, OPTIONS["epsilon"], OPTIONS["groups"])
    sam = SAM(torch.optim.SGD(model.parameters(), LEARNING_RATE), OPTIONS["rho"])
    for t in range(4):
        x, y = images(seed=t)
        half = len(x) // 2
        r, rest = weights(len(x), half)
        sam.optimizer.zero_grad()
        with apart.to_proxy():
            (r * F.cross_entropy(model(x), y)).backward()
        sam.ascend()
        with apart.to_adver():
            (rest * F.cross_entropy(model(x[:half]), y[:half])).backward()
        grads = gradients(model)
        sam.step()
        torch.testing.assert_close(grads, follow_definition(definition, (x, y), apart.perturbation), **ROUNDING)
        torch.testing.assert_close(dict(model.state_dict()), dict(definition.state_dict()), **ROUNDING)


def test_without_a_radius_it_is_the_step_of_apart() -> None:
    model, batch = convolutional(), images()
    sam = make_apart_sam_step(model, F.cross_entropy, groups=2, rho=0.0)(*split_state(model), batch)
    plain = make_apart_step(model, F.cross_entropy, groups=2)(*split_state(model), batch)
    torch.testing.assert_close(sam._asdict(), plain._asdict(), rtol=0, atol=0)


def test_a_zero_gradient_climbs_nowhere() -> None:
    model = convolutional()
    step = make_apart_sam_step(model, lambda output, target: 0 * output.sum(), rho=0.5)
    out = step(*split_state(model), images())
    assert out.all_finite
    assert not any(grad.any() for grad in out.grads.values())


def test_the_climb_has_length_rho_in_the_norm_over_all_parameters() -> None:
    # With a linear model and a quadratic loss, the second gradient tells where it was taken.
    class Probe(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.a, self.b = nn.BatchNorm1d(3), nn.Parameter(torch.randn(4)), nn.Parameter(torch.randn(2, 3))

        def forward(self, x: Tensor) -> Tensor:
            return self.a.square().sum() / 2 + self.b.square().sum() / 2 + 0 * self.norm(x).sum()

    model = Probe().double()
    params, buffers = split_state(model)
    batch = (torch.randn(8, 3).double(), torch.zeros(8))
    grads = {}
    for rho in (0.0, 0.7):
        out = make_apart_sam_step(model, lambda output, target: output, rho=rho)(params, buffers, batch)
        grads[rho] = torch.cat([out.grads[name].flatten() for name in ("a", "b")])
    # the gradient of this loss is the point, and half of it is the adversarial pass's
    torch.testing.assert_close((grads[0.7] - grads[0.0]).norm() * 2, torch.tensor(0.7).double(), rtol=1e-6, atol=0)
    torch.testing.assert_close(F.cosine_similarity(grads[0.7], grads[0.0], dim=0), torch.tensor(1.0).double())


def test_the_loss_scale_does_not_change_the_climb() -> None:
    model, batch = convolutional(), images()
    step = make_apart_sam_step(model, F.cross_entropy, **OPTIONS)
    plain, scaled = step(*split_state(model), batch), step(*split_state(model), batch, loss_scale=1024.0)
    torch.testing.assert_close(scaled.grads, plain.grads, **ROUNDING)


def test_each_microbatch_climbs_by_its_own_gradient() -> None:
    model, (x, y) = convolutional(), images()
    together = make_apart_sam_step(model, F.cross_entropy, microbatches=2, **OPTIONS)(*split_state(model), (x, y))
    step = make_apart_sam_step(model, F.cross_entropy, **OPTIONS)
    params, buffers = split_state(model)
    first = step(params, buffers, (x[:4], y[:4]))
    second = step(params, first.buffers, (x[4:], y[4:]))
    mean = {name: (grad + second.grads[name]) / 2 for name, grad in first.grads.items()}
    torch.testing.assert_close(together.grads, mean, **ROUNDING)
    torch.testing.assert_close(together.buffers, second.buffers, **ROUNDING)


def test_vmap_over_the_radius_equals_the_radii_one_by_one() -> None:
    model, batch = convolutional(), images()
    step = make_apart_sam_step(model, F.cross_entropy, **OPTIONS)
    params, buffers = split_state(model)
    radii = torch.tensor([0.0, 0.2], dtype=torch.float64)
    together = vmap(lambda epsilon: step(params, buffers, batch, epsilon=epsilon))(radii)
    for i, radius in enumerate(radii):
        one = step(params, buffers, batch, epsilon=radius)
        torch.testing.assert_close({k: g[i] for k, g in together.grads.items()}, one.grads, **ROUNDING)


def test_a_compiled_step_is_one_graph_and_equals_the_eager_one() -> None:
    torch._dynamo.reset()
    model = convolutional()
    params, buffers = split_state(model)
    step = make_apart_sam_step(model, F.cross_entropy, **OPTIONS)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(step, backend=counter, fullgraph=True)
    for t in range(3):
        radius = torch.tensor(0.1 * t)
        out = compiled(params, buffers, images(seed=t), epsilon=radius)
        expected = step(params, buffers, images(seed=t), epsilon=radius)
        torch.testing.assert_close(out.grads, expected.grads, **ROUNDING)
    assert counter.frame_count == 1


@pytest.mark.parametrize("rho", [-0.1, float("nan"), float("inf")])
def test_a_radius_that_is_negative_or_not_finite(rho: float) -> None:
    with pytest.raises(ApartError, match=r"rho=.*expected a finite radius ≥ 0"):
        make_apart_sam_step(convolutional(), F.cross_entropy, rho=rho)
