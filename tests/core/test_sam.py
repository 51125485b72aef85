"""APART-SAM: the functional step and the drop-in around a two-phase optimizer, against the definition."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from loops import gradients, weights
from oracle import oracle_step
from small import Parts, convolutional, images
from torch import Tensor, nn

from apart_func import APART, ApartError, Perturbation, make_apart_sam_step, make_apart_step, split_state

# Rounding of float64 in another order, and its growth over the steps of a test.
ROUNDING = {"rtol": 1e-10, "atol": 1e-14}
OPTIONS: dict[str, Any] = {"epsilon": 0.2, "groups": 2, "ratio": 0.5, "rho": 0.3}
LEARNING_RATE = 0.1


def follow_definition(model: nn.Module, batch: Any, perturbation: dict[str, Perturbation]) -> dict[str, Tensor]:
    """Gradients of the definition at the model's state, by which the model then takes a step of plain descent."""
    out = oracle_step(model, F.cross_entropy, batch, perturbation=perturbation, **OPTIONS)
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
    parts = {"norm": nn.BatchNorm1d(3), "a": nn.Parameter(torch.randn(4)), "b": nn.Parameter(torch.randn(2, 3))}
    model = Parts(lambda m, x: (m.a.square().sum() + m.b.square().sum()) / 2 + 0 * m.norm(x).sum(), **parts)
    params, buffers = split_state(model)
    batch = (torch.randn(8, 3).double(), torch.zeros(8))
    grads = {}
    for rho in (0.0, 0.7):
        out = make_apart_sam_step(model, lambda output, target: output, rho=rho)(params, buffers, batch)
        grads[rho] = torch.cat([out.grads[name].flatten() for name in ("a", "b")])
    # the gradient of this loss is the point, and half of it is the adversarial pass's
    torch.testing.assert_close((grads[0.7] - grads[0.0]).norm() * 2, torch.tensor(0.7).double(), rtol=1e-6, atol=0)
    torch.testing.assert_close(F.cosine_similarity(grads[0.7], grads[0.0], dim=0), torch.tensor(1.0).double())


@pytest.mark.parametrize("rho", [-0.1, float("nan"), float("inf")])
def test_a_radius_that_is_negative_or_not_finite(rho: float) -> None:
    with pytest.raises(ApartError, match=r"rho=.*expected a finite radius ≥ 0"):
        make_apart_sam_step(convolutional(), F.cross_entropy, rho=rho)
