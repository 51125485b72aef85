"""Second derivatives through batch norm: losses that hold a gradient, in every form of the step and of the layer."""

import pytest
import torch
import torch.nn.functional as F
from agreement import functional_step, relative_error, take_step
from loops import drop_in_step
from oracle import Step, oracle_one_pass_step
from small import images
from torch import Tensor, nn

from apart_func import (
    APART,
    StepOutput,
    functionalize,
    init_perturbation,
    make_one_pass_step,
    proxy_pass,
    random_signs,
    split_state,
)
from apart_func.kernels import FAST_MOMENTS_MIN_NUMEL

EPSILON = 0.2
# Of the whole gradient: rounding, which a second derivative divides by a deviation once more.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-3}
SIDES = {"few": 4, "many": 48}  # positions on a side: 2·4·8·4² activations a layer, or 2·4·8·48²
LAYOUTS = {"contiguous": torch.contiguous_format, "channels last": torch.channels_last}


class Penalised(nn.Module):
    """A network whose output comes with the squared gradient of its input, as in adversarial and WGAN training."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(
            nn.Conv2d(2, 4, 3, padding=1),
            nn.BatchNorm2d(4),
            nn.SiLU(inplace=True),
            nn.Conv2d(4, 4, 3, padding=1),
            nn.BatchNorm2d(4),
            nn.Tanh(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(4, 3),
        )
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.5)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = x.detach().requires_grad_()
        with torch.enable_grad():
            output = self.body(x)
            (gradient,) = torch.autograd.grad(output.square().sum(), x, create_graph=True)
        return output, gradient.square().flatten(1).mean(1) * 100


def penalised_loss(output: tuple[Tensor, Tensor], target: Tensor) -> Tensor:
    return F.cross_entropy(output[0], target) + output[1].mean()


def batch_of(size: str, dtype: torch.dtype, layout: str) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    side = SIDES[size]
    x = torch.randn(8, 2, side, side, generator=generator, dtype=torch.float64) + 0.5
    return x.to(dtype).contiguous(memory_format=LAYOUTS[layout]), torch.arange(8) % 3


def test_the_sizes_are_on_both_sides_of_the_choice() -> None:
    few, many = (4 * 8 * side**2 for side in SIDES.values())
    assert few < FAST_MOMENTS_MIN_NUMEL < many


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("groups", [0, 4])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("size", SIDES)
@pytest.mark.parametrize("take", [functional_step, drop_in_step])
def test_a_step_with_a_gradient_penalty_is_that_of_the_definition(take, size, dtype, groups, layout):
    model, batch = Penalised().to(dtype), batch_of(size, dtype, layout)
    step = take_step(model, batch, take, loss_fn=penalised_loss, epsilon=EPSILON, groups=groups)
    assert_near(step.library, step.definition, dtype)


def assert_near(out: StepOutput, expected: Step, dtype: torch.dtype) -> None:
    for field in ("loss", "adversarial_loss", "stat_grads", "grads"):
        error = relative_error(getattr(out, field), getattr(expected, field))
        assert error < TOLERANCE[dtype], f"{field} is off by {error:.1e}"


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("size", SIDES)
def test_one_pass_with_a_gradient_penalty_is_that_of_the_definition(size: str, dtype: torch.dtype) -> None:
    model, batch = Penalised().to(dtype), batch_of(size, dtype, "contiguous")
    given = random_signs(init_perturbation(model), 0.2, torch.Generator().manual_seed(0))
    step = make_one_pass_step(model, penalised_loss, epsilon=EPSILON, groups=4)
    out = step(*split_state(model), batch, given)
    expected = oracle_one_pass_step(model, penalised_loss, batch, given, epsilon=EPSILON, groups=4, clean=2)
    assert_near(out, expected, dtype)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("size", SIDES)
def test_a_hessian_vector_product_inside_a_proxy_pass_is_that_outside(size: str, dtype: torch.dtype) -> None:
    model, (x, y) = Penalised().to(dtype).body, batch_of(size, dtype, "contiguous")
    parameters = list(model.parameters())
    generator = torch.Generator().manual_seed(3)
    vectors = [torch.randn(p.shape, generator=generator, dtype=dtype) for p in parameters]

    def products() -> dict[str, Tensor]:
        gradients = torch.autograd.grad(F.cross_entropy(model(x), y), parameters, create_graph=True)
        along = sum((g * v).sum() for g, v in zip(gradients, vectors, strict=True))
        found = torch.autograd.grad(along, parameters)
        return {str(i): product.double() for i, product in enumerate(found)}

    expected = products()
    with APART(model).to_proxy():
        found = products()
    assert relative_error(found, expected) < TOLERANCE[dtype]


def test_the_gradient_of_a_scale_gradients_size_is_that_of_finite_differences() -> None:
    """∇θ ½‖∂L_p/∂δσ‖² under torch.func. In ∂L_p/∂δμ the factor μ/s is a constant, which differences do not know."""
    model, batch = Penalised().double().body, images()
    fmodel, (params, buffers) = functionalize(model), split_state(model)

    def size(weight: Tensor) -> Tensor:
        out = proxy_pass(fmodel, F.cross_entropy, {**params, "0.weight": weight}, buffers, batch)
        return sum((g.scale.square().sum() for g in out.stat_grads.values()), torch.zeros(())) / 2

    weight, h = params["0.weight"], 1e-6
    direction = torch.randn(weight.shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    slope = (torch.func.grad(size)(weight) * direction).sum()
    quotient = (size(weight + h * direction) - size(weight - h * direction)) / (2 * h)
    torch.testing.assert_close(slope, quotient, rtol=1e-6, atol=1e-10)
