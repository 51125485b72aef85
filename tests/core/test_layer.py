"""The layer: its forms against the definition, their derivatives, and the statistics that a pass normalises by."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import Shift, normalize
from torch import Tensor, nn
from torch.func import vmap

import apart_func.layer
from apart_func import APART, Perturbation, adversarial_pass, functionalize, split_state
from apart_func.layer import kernels
from apart_func.layer.affine import Parameters, affine
from apart_func.layer.formula import arithmetic_layer, indexed_layer
from apart_func.layer.kernels import KernelLayer
from apart_func.layer.native import native_layer

Layer = Callable[..., Any]
# From activations, (γ', ω, β), eps and groups to y, mean and variance.
FORMS: dict[str, Layer] = {"arithmetic": arithmetic_layer, "native": native_layer, "kernels": KernelLayer.apply}
every_form = pytest.mark.parametrize("form", FORMS)
SHAPES = [(6, 3), (6, 3, 5), (6, 3, 4, 2), (6, 3, 2, 2, 2)]
EPS = 1e-3
# Rounding: the forms differ in the order of sums, and a group of two is divided by a small deviation.
TOLERANCE = {
    torch.float64: {"rtol": 1e-8, "atol": 1e-9},
    torch.float32: {"rtol": 1e-3, "atol": 1e-3},
}


def laid_out(x: Tensor, layout: str) -> Tensor:
    """The same values in other memory."""
    if layout == "channels last":
        return x.movedim(1, -1).contiguous().movedim(-1, 1)
    if layout == "samples last":
        return x.movedim(0, -1).contiguous().movedim(-1, 0)
    if layout == "with gaps":
        return torch.stack([x, x], dim=-1)[..., 0]
    return x.contiguous()


LAYOUTS = ["contiguous", "channels last", "samples last", "with gaps"]


def drawn(seed: int, *sizes: tuple[int, ...], dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(size, generator=generator, dtype=torch.float64).to(dtype) for size in sizes]


def by_definition(x: Tensor, weight: Tensor, bias: Tensor, shift: Shift, groups: int) -> list[Tensor]:
    """y, mean and variance of every group, by the oracle's arithmetic."""
    layer: Any = nn.Module()
    layer.weight, layer.bias, layer.eps = None, None, EPS
    y, means, variances = torch.empty_like(x), [], []
    along = (1, -1, *[1] * (x.dim() - 2))
    for g in range(groups):
        of_group, stats = normalize(
            layer, x[g::groups], Shift(*(part.view(-1, x.shape[1])[g % part[..., 0].numel()] for part in shift))
        )
        y[g::groups] = weight.view(along) * of_group + bias.view(along)
        means.append(stats.mean)
        variances.append(stats.var)
    return [y, torch.cat(means), torch.cat(variances)]


def by_form(form: str, x: Tensor, weight: Tensor, bias: Tensor, shift: Shift, groups: int) -> list[Tensor]:
    return list(FORMS[form](x, *affine(x, Parameters(weight, bias), Perturbation(*shift), groups), EPS, groups))


# Forms and their derivatives.


@every_form
@settings(max_examples=40, derandomize=True)
@given(
    shape=st.sampled_from(SHAPES),
    layout=st.sampled_from(LAYOUTS),
    groups=st.sampled_from([1, 2, 3]),
    one_for_each=st.booleans(),
    at_zero=st.booleans(),
    many=st.booleans(),
    dtype=st.sampled_from([torch.float64, torch.float32]),
    seed=st.integers(0, 1000),
)
def test_every_form_and_its_first_two_derivatives_are_those_of_the_definition(
    form: str,
    shape: tuple[int, ...],
    layout: str,
    groups: int,
    one_for_each: bool,
    at_zero: bool,
    many: bool,
    dtype: torch.dtype,
    seed: int,
) -> None:
    size = (groups, 3) if one_for_each else (3,)
    x, weight, bias, *shift = drawn(seed, shape, (3,), (3,), size, size, dtype=dtype)
    inputs = [x, weight, bias, *((0.0 if at_zero else 0.3) * part for part in shift)]
    upstream, *directions = drawn(seed + 1, shape, *(tensor.shape for tensor in inputs), dtype=dtype)

    def derivatives(layer: Layer, wide: torch.dtype, arranged: str) -> list[Tensor]:
        leaves = [tensor.detach().to(wide) for tensor in inputs]
        leaves[0] = laid_out(leaves[0], arranged).detach()
        for leaf in leaves:
            leaf.requires_grad_()
        y, mean, var = layer(*leaves[:3], Shift(*leaves[3:]), groups)
        first = torch.autograd.grad(y, leaves, upstream.to(wide), create_graph=True)
        product = sum((g * d.to(wide)).sum() for g, d in zip(first, directions, strict=True))
        second = torch.autograd.grad(product, leaves, allow_unused=True)
        filled = [torch.zeros_like(leaf) if g is None else g for leaf, g in zip(leaves, second, strict=True)]
        return [tensor.detach().double() for tensor in (y, mean, var, *first, *filled)]

    with patch.object(kernels, "MANY", 0 if many else kernels.MANY):
        found = derivatives(lambda *a: by_form(form, *a), dtype, layout)
    expected = derivatives(by_definition, torch.float64, "contiguous")
    scale = [max(1.0, tensor.abs().max().item()) for tensor in expected]
    for one, other, size_of in zip(found, expected, scale, strict=True):
        torch.testing.assert_close(one / size_of, other / size_of, **TOLERANCE[dtype])


@every_form
@pytest.mark.parametrize("groups", [1, 2])
def test_first_and_second_derivatives_at_no_shift_of_the_mean_are_those_of_finite_differences(
    form: str, groups: int
) -> None:
    x, weight, bias, scale = (tensor.requires_grad_() for tensor in drawn(0, (6, 2, 3), (2,), (2,), (2,)))
    zero = torch.zeros(2, dtype=torch.float64)  # the shift of the mean is a constant, which differences do not know

    def layer(*tensors: Tensor) -> Tensor:
        return by_form(form, *tensors[:3], Shift(zero, 0.3 * tensors[3]), groups)[0]

    assert torch.autograd.gradcheck(layer, (x, weight, bias, scale))
    assert torch.autograd.gradgradcheck(layer, (x, weight, bias, scale))


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 2), (1, 2)])
@every_form
def test_second_derivatives_are_there_whatever_is_differentiated_by(form: str, wanted: tuple[int, ...]) -> None:
    inputs = drawn(0, (6, 2, 3), (2,), (2,))
    upstream, *directions = drawn(1, (6, 2, 3), *(tensor.shape for tensor in inputs))
    zero = torch.zeros(2, dtype=torch.float64)
    results = []
    for layer in (lambda *a: by_form(form, *a), by_definition):
        leaves = [tensor.clone().requires_grad_(i in wanted) for i, tensor in enumerate(inputs)]
        chosen, grad_y = [leaves[i] for i in wanted], upstream.clone().requires_grad_()
        first = torch.autograd.grad(layer(*leaves, Shift(zero, zero), 2)[0], chosen, grad_y, create_graph=True)
        product = sum((g * directions[i]).sum() for g, i in zip(first, wanted, strict=True))
        second = torch.autograd.grad(product, [grad_y, *chosen], allow_unused=True)
        results.append([torch.zeros(()) if g is None or not g.any() else g for g in second])
    torch.testing.assert_close(*results, **TOLERANCE[torch.float64])


def test_rows_of_any_group_are_normalised_as_the_definition_does_it() -> None:
    x, weight, bias, *shift = drawn(0, (7, 3, 4), (3,), (3,), (2, 3), (2, 3))
    group = torch.tensor([1, 0, 0, 1, 1, 1, 0])
    sizes = torch.tensor([[3 * 4], [4 * 4]]).double()
    vectors = [part.view(2, 3) for part in affine(x, Parameters(weight, bias), Perturbation(*shift), 2)]
    y, mean, var = indexed_layer(x, *vectors, EPS, group, sizes)
    for g in range(2):
        rows = group == g
        expected = by_definition(x[rows], weight, bias, Shift(*(part[g] for part in shift)), 1)
        torch.testing.assert_close([y[rows], mean[g], var[g]], expected, **TOLERANCE[torch.float64])


@pytest.mark.parametrize("shape", [(6, 3, 4, 2), (6, 3, 2, 2, 2)])
@pytest.mark.parametrize("form", ["native", "kernels"])
def test_activations_keep_their_layout(form: str, shape: tuple[int, ...]) -> None:
    x, weight, bias, *shift = drawn(0, shape, (3,), (3,), (3,), (3,), dtype=torch.float32)
    for layout in ("contiguous", "channels last"):
        arranged = laid_out(x, layout).requires_grad_()
        y = by_form(form, arranged, weight, bias, Shift(*shift), 2)[0]
        assert y.stride() == arranged.stride()
        assert y._base is None  # an in-place activation may follow, and must not see a view


def test_groups_of_channels_last_half_precision_are_those_of_float32() -> None:
    x, upstream, *vectors = drawn(0, (6, 3, 4, 2), (6, 3, 4, 2), (6,), (6,), (6,), dtype=torch.float32)
    x, upstream = (tensor.bfloat16().contiguous(memory_format=torch.channels_last) for tensor in (x, upstream))
    results = []
    for dtype in (torch.bfloat16, torch.float32):
        leaves = [tensor.requires_grad_() for tensor in (x.detach().to(dtype), *(v.clone() for v in vectors))]
        y, mean, var = KernelLayer.apply(*leaves, 1e-5, 2)
        assert y.dtype == dtype
        assert mean.dtype == torch.float32
        results.append([mean, var, y.float(), *(g.float() for g in torch.autograd.grad(y, leaves, upstream.to(dtype)))])
    torch.testing.assert_close(results[0][:2], results[1][:2], rtol=1e-5, atol=1e-6)  # moments are not rounded
    torch.testing.assert_close(results[0][2:], results[1][2:], rtol=2**-7, atol=2**-5)  # 8 bits, and sums of them


def test_moments_of_many_activations_are_as_exact_as_those_of_few() -> None:
    """Float32 around a mean that is 1000 deviations away, against float64."""
    x = 1000 + drawn(0, (64, 8, 16, 16), dtype=torch.float32)[0]
    assert kernels.outruns_batch_norm(x)
    exact_var, exact_mean = torch.var_mean(x.double(), (0, 2, 3), correction=0)
    mean, var = kernels.fast_moments(x, scratch=torch.empty_like(x))
    torch.testing.assert_close(mean.double(), exact_mean, rtol=1e-6, atol=0)  # a few units in the last place
    torch.testing.assert_close(var.double(), exact_var, rtol=1e-5, atol=0)


# The law of the radius, for the layer itself.


def run_eagerly(model: nn.Module, x: Tensor, shift: Any, **options: Any) -> Tensor:
    batch = x, torch.zeros(len(x))
    return adversarial_pass(functionalize(model), square, *split_state(model), batch, shift, **options).output


def run_mapped(model: nn.Module, x: Tensor, shift: Any, **options: Any) -> Tensor:
    return vmap(lambda each: run_eagerly(model, each, shift, **options))(x[None])[0]


def run_in_the_drop_in(model: nn.Module, x: Tensor, shift: Any, groups: int, **options: Any) -> Tensor:
    apart = APART(model, groups=groups, rule=lambda *_: shift, **options)
    with apart.to_proxy():
        square(model(x)).backward()
    with apart.to_adver():
        return model(x).detach()


def square(output: Tensor, target: Any = None) -> Tensor:
    return output.float().square().mean()


RUNS = {"eager": run_eagerly, "mapped": run_mapped, "drop-in": run_in_the_drop_in}
# How twelve rows belong to samples: one to each of twelve, two to each of six, or as a function says.
SAMPLES: dict[str, list[int]] = {
    "one a sample": list(range(12)),
    "consecutive": [row // 2 for row in range(12)],
    "in_turn": [row % 6 for row in range(12)],
    "function": [5, 0, 0, 1, 2, 2, 2, 3, 3, 4, 4, 1],
}


def rows_setting(rows: str) -> Any:
    if rows == "function":
        return lambda layer, x: torch.tensor(SAMPLES["function"])
    return None if rows == "one a sample" else rows


class Points(nn.Module):
    """Batch norm on rows that stand in samples, (samples, rows of each, C, ...), in some layout."""

    def __init__(self, norm: nn.Module, rows: str, layout: str) -> None:
        super().__init__()
        self.norm, self.rows, self.layout = norm, rows, layout

    def forward(self, x: Tensor) -> Tensor:
        if self.rows != "one a sample":
            x = (x.transpose(0, 1) if self.rows == "in_turn" else x).flatten(0, 1)
        return self.norm(laid_out(x, self.layout))


def effective_statistics(x: Tensor, y: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """What an output was normalised by: the line through all (x, y) of a channel, y = γ (x − mean)/std + β."""
    x, y = (tensor.double().transpose(0, 1).flatten(1) for tensor in (x, y))
    centred = x - x.mean(1, keepdim=True)
    slope = (centred * y).sum(1) / centred.square().sum(1)
    line = slope[:, None] * centred + y.mean(1, keepdim=True)
    residue = (y - line).abs().amax(1) / y.std(1).clamp(min=1e-6)
    # 8 bits of an output that may be a few deviations large; in wider types it is a line but for rounding
    assert (residue < 0.1).all(), "the output of a channel is no affine map of its input"
    std = weight.double() / slope
    return x.mean(1) - (y.mean(1) - bias.double()) / slope, std


@pytest.mark.parametrize("run", RUNS)
@settings(max_examples=60, derandomize=True)
@given(
    positions=st.lists(st.integers(1, 4), max_size=3),
    layout=st.sampled_from(LAYOUTS),
    groups=st.sampled_from([1, 2, 3]),
    rows=st.sampled_from(sorted(SAMPLES)),
    one_for_each=st.booleans(),
    small=st.booleans(),
    many=st.booleans(),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
    epsilon=st.floats(0, 0.9),
    seed=st.integers(0, 1000),
)
def test_a_pass_normalises_by_statistics_within_the_radius_of_those_of_the_samples(
    run: str,
    positions: list[int],
    layout: str,
    groups: int,
    rows: str,
    one_for_each: bool,
    small: bool,
    many: bool,
    dtype: torch.dtype,
    epsilon: float,
    seed: int,
) -> None:
    """μ' = μ (1 + δμ) and s' = s / (1 + δσ), of every channel of every group, read off input and output."""
    norm: Any = {0: nn.BatchNorm1d, 1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}[len(positions)](3, eps=EPS)
    x, weight, bias, offset, *shift = drawn(seed, (12, 3, *positions), (3,), (3,), (3,), (groups, 3), (groups, 3))
    x = (x + 2 * offset.view(1, 3, *[1] * len(positions))).to(dtype)
    with torch.no_grad():
        norm.weight.copy_(0.5 + weight.abs())
        norm.bias.copy_(bias)
    model = Points(norm.to(dtype), rows, layout)
    batch = {"one a sample": x, "in_turn": x.unflatten(0, (2, 6)).transpose(0, 1)}.get(rows, x.unflatten(0, (6, 2)))
    wide = torch.float64 if dtype is torch.float64 else torch.float32
    # |δ| ≤ ε; the drop-in's δ is one for all groups
    delta = [(epsilon * torch.tanh(part)).to(wide) for part in shift]
    if not one_for_each or run == "drop-in":
        delta = [part[0] for part in delta]

    with ExitStack() as stack:  # each form of the layer at this size
        stack.enter_context(patch.object(apart_func.layer, "SMALL", 2**15 if small else 0))
        stack.enter_context(patch.object(kernels, "MANY", 0 if many else kernels.MANY))
        y = RUNS[run](model, batch, {"norm": Perturbation(*delta)}, groups=groups, rows=rows_setting(rows))

    # bfloat16 rounds y by 2⁻⁹ of its size, which a small slope enlarges; rounding of wider types is negligible.
    slack = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 2e-2}[dtype]
    assert y.dtype == dtype
    for g in range(groups):
        chosen = [row for row, sample in enumerate(SAMPLES[rows]) if sample % groups == g]
        members = x[chosen].double()
        dims = [dim for dim in range(x.dim()) if dim != 1]
        var, mean = torch.var_mean(members, dims, correction=0)
        std = (var + EPS).sqrt()
        by_mean, by_scale = (part.double().view(-1, 3)[g % part[..., 0].numel()] for part in delta)
        found_mean, found_std = effective_statistics(x[chosen], y[chosen], norm.weight, norm.bias)
        size = std + mean.abs()
        torch.testing.assert_close(found_mean / size, mean * (1 + by_mean) / size, rtol=0, atol=slack)
        torch.testing.assert_close(found_std / std, 1 / (1 + by_scale), rtol=slack, atol=0)
        assert ((found_mean - mean).abs() <= epsilon * mean.abs() + slack * size).all()
        assert ((std / found_std - 1).abs() <= epsilon + 2 * slack).all()
