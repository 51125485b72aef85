r"""What the layer costs by itself, forward and backward, against `torch.nn.functional.batch_norm`.

python benchmarks/layer_cost.py --quick
python benchmarks/layer_cost.py --shapes 128x64x32x32 --dtypes bfloat16 --device cuda
python benchmarks/layer_cost.py --name forms --forms --threads 1 --groups 1 4 --dtypes float32 float64 bfloat16 \
    --shapes 8x8x8x8 32x16x8x8 64x16x16x16 128x16x32x32

clean        the layer of the proxy pass: plain batch norm that hands out its statistics
perturbed    the layer of the adversarial pass, in one group or more
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from common import (
    Row,
    Sheet,
    TimedRounds,
    interleaved,
    run_script,
    time_cells,
    time_columns,
    timing_row,
)
from torch import Tensor

from apart_func import Perturbation
from apart_func.layer import clean_batch_norm, perturbed_batch_norm
from apart_func.layer.affine import Parameters, affine, clean_vectors
from apart_func.layer.formula import arithmetic_layer
from apart_func.layer.kernels import KernelLayer
from apart_func.layer.native import native_layer

EPS = 1e-5
RADIUS = 0.1
PLAIN = "F.batch_norm"


@dataclass(frozen=True)
class Settings(TimedRounds):
    """What is measured, and for how long.

    Attributes:
        shapes: of the activations, (N, C, ...), as in 128x64x16x16.
        layouts: memory formats; channels_last is for four dimensions.
        dtypes: of the activations; affine parameters are float32.
        groups: ghost groups of the perturbed layer.
        forms: each form of the perturbed layer as well, by which `layer/` chooses between them.
    """

    shapes: tuple[str, ...] = ("128x16x32x32", "128x64x8x8", "128x64x32x32", "128x512")
    layouts: tuple[str, ...] = ("contiguous", "channels_last")
    dtypes: tuple[str, ...] = ("float32", "bfloat16")
    groups: tuple[int, ...] = (1, 16)
    forms: bool = False


# One thread: two stall each other at random when anything else runs on the machine.
QUICK = Settings(shapes=("128x16x32x32", "128x64x8x8"), rounds=7, seconds=0.05, threads=1)


class Layer(NamedTuple):
    """The tensors of one call.

    Attributes:
        x: activations, differentiated.
        weight: scale γ, differentiated.
        bias: shift β, differentiated.
        upstream: gradient of the output.
        running_mean: of plain batch norm, which moves it.
        running_var: likewise.
        shift: (δμ, δσ) of the perturbed layer.
    """

    x: Tensor
    weight: Tensor
    bias: Tensor
    upstream: Tensor
    running_mean: Tensor
    running_var: Tensor
    shift: Perturbation


def make_layer(shape: tuple[int, ...], layout: str, dtype: torch.dtype, device: str) -> Layer:
    """Random tensors of one size.

    Args:
        shape: of the activations.
        layout: contiguous or channels_last.
        dtype: of the activations.
        device: where they live.

    Returns:
        What the functions below call a layer with.
    """
    torch.manual_seed(0)
    channels = shape[1]
    memory = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    x, upstream = (torch.randn(shape).to(device, dtype).contiguous(memory_format=memory) for _ in range(2))
    weight, bias = torch.rand(2, channels, device=device)
    return Layer(
        x.requires_grad_(),
        weight.requires_grad_(),
        bias.requires_grad_(),
        upstream,
        torch.zeros(channels, device=device),
        torch.ones(channels, device=device),
        Perturbation(*(RADIUS * torch.randn(2, channels, device=device).sign())),
    )


def plain(layer: Layer) -> object:
    """Plain training-mode batch norm."""
    x, weight, bias, upstream, mean, var, _ = layer
    return torch.autograd.grad(F.batch_norm(x, mean, var, weight, bias, True, 0.1, EPS), (x, weight, bias), upstream)


def clean(layer: Layer) -> object:
    """The layer of the proxy pass."""
    y = clean_batch_norm(layer.x, clean_vectors(layer.x, Parameters(layer.weight, layer.bias)), EPS)
    return torch.autograd.grad(y, (layer.x, layer.weight, layer.bias), layer.upstream)


def perturbed(layer: Layer, groups: int) -> object:
    """The layer of the adversarial pass."""
    vectors = affine(layer.x, Parameters(layer.weight, layer.bias), layer.shift, groups)
    y, _ = perturbed_batch_norm(layer.x, vectors, EPS, groups)
    return torch.autograd.grad(y, (layer.x, layer.weight, layer.bias), layer.upstream)


def of_form(form: Callable[..., Any], layer: Layer, groups: int) -> object:
    """One form of the perturbed layer, chosen or not."""
    vectors = affine(layer.x, Parameters(layer.weight, layer.bias), layer.shift, groups)
    y = form(layer.x, *vectors, EPS, groups)[0]
    return torch.autograd.grad(y, (layer.x, layer.weight, layer.bias), layer.upstream)


FORMS = {"native_layer": native_layer, "KernelLayer": KernelLayer.apply, "arithmetic_layer": arithmetic_layer}


def calls(layer: Layer, groups: tuple[int, ...], forms: bool = False) -> dict[str, Callable[[], object]]:
    """The functions to time against each other, by name."""
    named: dict[str, Callable[[], object]] = {PLAIN: lambda: plain(layer), "clean": lambda: clean(layer)}
    for number in groups:
        named[f"perturbed, groups {number}"] = partial(perturbed, layer, number)
        for name, form in FORMS.items() if forms else ():
            named[f"{name}, groups {number}"] = partial(of_form, form, layer, number)
    return named


def inputs(shapes: Sequence[str], layouts: Sequence[str], dtypes: Sequence[str]) -> Iterator[tuple[str, str, str]]:
    """All kinds of activations that exist."""
    for shape, layout, dtype in itertools.product(shapes, layouts, dtypes):
        if layout == "contiguous" or shape.count("x") == 3:
            yield shape, layout, dtype


def measure(settings: Settings) -> Iterator[Row]:
    """Time all layers on one input against each other, then on the next.

    Args:
        settings: what to measure.

    Yields:
        A row for every layer and input.
    """
    for shape, layout, dtype in inputs(settings.shapes, settings.layouts, settings.dtypes):
        size = tuple(map(int, shape.split("x")))
        functions = calls(
            make_layer(size, layout, getattr(torch, dtype), settings.device), settings.groups, settings.forms
        )
        times = interleaved(f"{shape} {layout} {dtype}", functions, settings)
        labels = {"shape": shape, "layout": layout, "dtype": dtype}
        yield from ({**labels, "layer": name, **timing_row(times, name, [PLAIN])} for name in functions)


def sheets(content: Mapping[str, Any]) -> list[Sheet]:
    """The table.

    Args:
        content: what was recorded.

    Returns:
        A line for every layer and input.
    """
    lines = [
        [
            row["layer"],
            row["shape"].replace("x", "×"),
            row["layout"],
            row["dtype"],
            *time_cells(row, [PLAIN]),
        ]
        for row in content["rows"]
    ]
    columns = ["layer", "activations", "layout", "dtype", *time_columns([PLAIN])]
    return [Sheet("one layer, forward and backward", columns, lines)]


if __name__ == "__main__":
    run_script(__file__, __doc__, Settings(), QUICK, measure, sheets)
