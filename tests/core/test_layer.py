"""The layer: its two forms against the definition, in value and in first and second derivatives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from oracle import Shift, normalize
from torch import Tensor, nn

from apart_func import kernels
from apart_func.batch_norm import IndexedGroups, InterleavedGroups, affine, formula
from apart_func.kernels import KernelBatchNorm, Native

Layer = Callable[..., Any]
EPS = 1e-3
SHAPES = [(12, 3), (12, 3, 5), (12, 3, 4, 2), (12, 3, 2, 2, 2)]
# Of the largest value. Rounding: the forms differ in the order of sums, and a small group is divided by a small
# deviation, in a second derivative more than once. In bfloat16 results are rounded to 8 bits, and sums of such.
TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-3, torch.bfloat16: 5e-2}
# Values a channel in a group, for that.
SMALLEST_GROUP = {torch.float64: 2, torch.float32: 3, torch.bfloat16: 8}


def by_formula(
    x: Tensor, weight: Tensor, bias: Tensor, shift: Tensor, scale: Tensor, eps: float, groups: int
) -> tuple[Tensor, ...]:
    return formula(x, affine(x, weight, bias, shift, scale), eps, InterleavedGroups(groups))


FORMS: dict[str, Layer] = {"formula": by_formula, "kernels": KernelBatchNorm.apply}
every_form = pytest.mark.parametrize("form", FORMS)


def laid_out(x: Tensor, layout: str) -> Tensor:
    """The same values in other memory; expanded, fewer of them."""
    if layout == "channels last":
        return x.movedim(1, -1).contiguous().movedim(-1, 1)
    if layout == "permuted":
        return x.movedim(0, -1).contiguous().movedim(-1, 0)
    if layout == "sliced":
        return torch.stack([x, x], dim=-1)[..., 0]
    if layout == "expanded":
        return x[..., :1].expand_as(x)
    return x.contiguous()


LAYOUTS = ["contiguous", "channels last", "permuted", "sliced", "expanded"]


def drawn(seed: int, *sizes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(size, generator=generator, dtype=torch.float64) for size in sizes]


def by_definition(
    x: Tensor, weight: Tensor, bias: Tensor, shift: Tensor, scale: Tensor, eps: float, groups: int
) -> list[Tensor]:
    """y, mean and variance of every group, by the oracle's arithmetic."""
    layer: Any = nn.Module()
    layer.weight, layer.bias, layer.eps = None, None, eps
    y, means, variances = torch.empty_like(x), [], []
    along = (1, -1, *[1] * (x.dim() - 2))
    for g in range(groups):
        delta = Shift(*(part if part.dim() == 1 else part[g] for part in (shift, scale)))
        of_group, stats = normalize(layer, x[g::groups], delta)
        y[g::groups] = weight.view(along) * of_group + bias.view(along)
        means.append(stats.mean)
        variances.append(stats.var)
    return [y, torch.stack(means), torch.stack(variances)]


# Values and derivatives.


@every_form
@settings(max_examples=80, derandomize=True)
@given(
    shape=st.sampled_from(SHAPES),
    layouts=st.tuples(st.sampled_from(LAYOUTS), st.sampled_from(LAYOUTS)),
    groups=st.sampled_from([1, 2, 3, 4, 6, 12]),
    one_for_each=st.booleans(),
    at_zero=st.booleans(),
    many=st.booleans(),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
    seed=st.integers(0, 1000),
)
def test_every_form_and_its_first_two_derivatives_are_those_of_the_definition(
    form: str,
    shape: tuple[int, ...],
    layouts: tuple[str, str],
    groups: int,
    one_for_each: bool,
    at_zero: bool,
    many: bool,
    dtype: torch.dtype,
    seed: int,
) -> None:
    """Whatever the memory of activations and of incoming gradients is like."""
    of_rows = 12 // groups
    different = of_rows if layouts[0] == "expanded" and len(shape) > 2 else of_rows * torch.Size(shape[2:]).numel()
    assume(different >= SMALLEST_GROUP[dtype])
    size = (groups, 3) if one_for_each else (3,)
    x, weight, bias, *shift = drawn(seed, shape, (3,), (3,), size, size)
    upstream, *directions = drawn(seed + 1, shape, shape, (3,), (3,), size, size)
    x, upstream = (laid_out(t.to(dtype), layout) for t, layout in zip((x, upstream), layouts, strict=True))
    wide = torch.promote_types(dtype, torch.float32)
    inputs = [x, *(t.to(wide) for t in (weight, bias, *((0.0 if at_zero else 0.3) * part for part in shift)))]

    def derivatives(layer: Layer, arguments: list[Tensor], upstream: Tensor) -> list[Tensor]:
        leaves = [tensor.detach().requires_grad_() for tensor in arguments]
        y, mean, var = layer(*leaves, EPS, groups)
        mean, var = mean.view(groups, -1), var.view(groups, -1)
        first = torch.autograd.grad(y, leaves, upstream, create_graph=True)
        product = sum((g * d.to(g.dtype)).sum() for g, d in zip(first, directions, strict=True))
        second = torch.autograd.grad(product, leaves, allow_unused=True, retain_graph=True)
        plain = torch.autograd.grad(y, leaves, upstream)  # of a form, another algorithm than the first
        filled = [torch.zeros_like(leaf) if g is None else g for leaf, g in zip(leaves, second, strict=True)]
        return [tensor.detach().double() for tensor in (mean, var, y, *first, *plain, *filled)]

    before = x.clone(), upstream.clone()
    with patch.object(kernels, "FAST_MOMENTS_MIN_NUMEL", 0 if many else 2**16):
        found = derivatives(FORMS[form], inputs, upstream)
    assert torch.equal(x, before[0])
    assert torch.equal(upstream, before[1])
    expected = derivatives(by_definition, [t.double().contiguous() for t in inputs], upstream.double())
    for number, (one, other) in enumerate(zip(found, expected, strict=True)):
        tolerance = TOLERANCE[wide if number < 2 else dtype]  # moments are not rounded to bfloat16
        scale = max(1.0, other.abs().max().item())
        torch.testing.assert_close(one / scale, other / scale, rtol=0, atol=tolerance)


@every_form
@pytest.mark.parametrize("groups", [1, 2])
def test_first_and_second_derivatives_at_no_shift_of_the_mean_are_those_of_finite_differences(
    form: str, groups: int
) -> None:
    x, weight, bias, scale = (tensor.requires_grad_() for tensor in drawn(0, (6, 2, 3), (2,), (2,), (2,)))
    zero = torch.zeros(2, dtype=torch.float64)  # the shift of the mean is a constant, which differences do not know

    def layer(*tensors: Tensor) -> Tensor:
        return FORMS[form](*tensors[:3], zero, 0.3 * tensors[3], EPS, groups)[0]

    assert torch.autograd.gradcheck(layer, (x, weight, bias, scale))
    assert torch.autograd.gradgradcheck(layer, (x, weight, bias, scale))


@every_form
@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (3,), (4,), (0, 2), (1, 2), (3, 4)])
def test_derivatives_are_there_whatever_is_differentiated_by(form: str, wanted: tuple[int, ...]) -> None:
    inputs = drawn(0, (6, 2, 3), (2,), (2,), (2,), (2,))
    upstream, *directions = drawn(1, (6, 2, 3), *(tensor.shape for tensor in inputs))
    results = []
    for layer in (FORMS[form], by_definition):
        leaves = [tensor.clone().requires_grad_(i in wanted) for i, tensor in enumerate(inputs)]
        chosen, grad_y = [leaves[i] for i in wanted], upstream.clone().requires_grad_()
        y = layer(*leaves, EPS, 2)[0]
        plain = torch.autograd.grad(y, chosen, upstream, retain_graph=True)
        first = torch.autograd.grad(y, chosen, grad_y, create_graph=True)
        product = sum((g * directions[i]).sum() for g, i in zip(first, wanted, strict=True))
        second = torch.autograd.grad(product, [grad_y, *chosen], allow_unused=True)
        results.append([*plain, *(torch.zeros(()) if g is None or not g.any() else g for g in second)])
    torch.testing.assert_close(*results, rtol=1e-8, atol=1e-9)  # sums in another order


def test_without_scale_and_bias_they_are_one_and_zero() -> None:
    x, shift, scale = drawn(0, (6, 2, 3), (2,), (2,))
    ones, zeros = torch.ones(2).double(), torch.zeros(2).double()
    for layer in FORMS.values():
        found, expected = (layer(x, *vectors, shift, scale, EPS, 2) for vectors in ((None, None), (ones, zeros)))
        torch.testing.assert_close(tuple(found), tuple(expected), rtol=0, atol=0)


@every_form
def test_of_one_channel_every_group_has_its_own_statistics_and_the_scale_of_all(form: str) -> None:
    """One γ for every group can be had without a copy, as a tensor of stride 0, and BN's kernels read past its end."""
    x, *vectors = drawn(0, (6, 1, 2), (1,), (1,), (1,), (1,))
    results = [layer(x, *vectors, EPS, 3) for layer in (FORMS[form], by_definition)]
    torch.testing.assert_close(*map(list, results), rtol=1e-8, atol=1e-9)


def test_rows_of_any_group_are_normalised_as_the_definition_does_it() -> None:
    x, weight, bias, *shift = drawn(0, (7, 3, 4), (3,), (3,), (2, 3), (2, 3))
    group = torch.tensor([1, 0, 0, 1, 1, 1, 0])
    sizes = torch.tensor([[3 * 4], [4 * 4]]).double()
    y, mean, var = formula(x, affine(x, weight, bias, *shift), EPS, IndexedGroups(group, sizes))
    for g in range(2):
        rows = group == g
        expected = by_definition(x[rows], weight, bias, *(part[g] for part in shift), EPS, 1)
        torch.testing.assert_close([y[rows], mean[g][None], var[g][None]], expected, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("shape", [(6, 3, 4, 2), (6, 3, 2, 2, 2)])
def test_activations_keep_their_layout(shape: tuple[int, ...]) -> None:
    for layout in ("contiguous", "channels last"):
        x, *vectors = drawn(0, shape, (3,), (3,), (3,), (3,))
        arranged = laid_out(x, layout).requires_grad_()
        y = KernelBatchNorm.apply(arranged, *vectors, EPS, 2)[0]
        assert y.stride() == arranged.stride()
        assert y._base is None  # an in-place activation may follow, and must not see a view


def test_moments_of_many_activations_are_as_exact_as_those_of_few() -> None:
    """Float32 around a mean that is 1000 deviations away, against float64."""
    x = 1000 + drawn(0, (64, 8, 16, 16))[0].float()
    assert x.numel() >= kernels.FAST_MOMENTS_MIN_NUMEL
    exact_var, exact_mean = torch.var_mean(x.double(), (0, 2, 3), correction=0)
    mean, var = Native(1, False).moments(x, scratch=torch.empty_like(x))
    torch.testing.assert_close(mean.double(), exact_mean, rtol=1e-6, atol=0)  # a few units in the last place
    torch.testing.assert_close(var.double(), exact_var, rtol=1e-5, atol=0)
