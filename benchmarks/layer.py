"""What a layer of batch norm costs by itself, forward and backward, against `torch.nn.BatchNorm2d` in plain training.

    python benchmarks/layer.py
    python benchmarks/layer.py --shapes 8x16x8x8 --groups 1 4 --against ../older

The model is a chain of such layers and nothing else. A layer costs what ten of them take more than two do, divided by
eight: what a pass does once is not in it.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
from methods import PREPARED, RADIUS, Step, time_prepared
from timing import ROOT, Row, Table, Worker, arguments, as_ratio, as_seconds, interleaved, median_of, ratios, run
from torch import Tensor, nn

from apart_func import Perturbation, adversarial_pass, functionalize, proxy_pass, split_state

PLAIN, PROXY = "plain", "proxy pass"
FEW, MANY = 2, 10  # layers of the chains


def steps(shape: str, dtype: str, layout: str, groups: Sequence[int], device: str) -> dict[tuple[str, int], Step]:
    """The passes over chains of layers, by pass and number of layers.

    Args:
        shape: of the activations, as in 128x16x32x32.
        dtype: of the activations; γ and β are float32.
        layout: their memory format.
        groups: ghost groups of the adversarial passes.
        device: where they live.
    """
    torch.manual_seed(0)
    size, memory = tuple(map(int, shape.split("x"))), getattr(torch, f"{layout}_format", torch.channels_last)
    x, weights = (torch.randn(size).to(device, getattr(torch, dtype)).contiguous(memory_format=memory) for _ in "xw")
    norm = nn.BatchNorm2d if len(size) == 4 else nn.BatchNorm1d
    found: dict[tuple[str, int], Step] = {}
    for layers in (FEW, MANY):
        model = nn.Sequential(*(norm(size[1]) for _ in range(layers))).to(device)
        found |= {(name, layers): step for name, step in passes(model, (x, weights), groups).items()}
    return found


def passes(model: nn.Module, batch: tuple[Tensor, Tensor], groups: Sequence[int]) -> dict[str, Step]:
    """Plain training, the proxy pass, and adversarial passes in some numbers of ghost groups."""
    fmodel, state = functionalize(model), split_state(model)
    ones = {name: torch.ones_like(layer.weight) for name, layer in model.named_children()}  # type: ignore[arg-type]  # attributes of a module have no types
    perturbation = {name: Perturbation(RADIUS * one, -RADIUS * one) for name, one in ones.items()}

    def plain() -> None:
        model.zero_grad(set_to_none=True)
        weighted(model(batch[0]), batch[1]).backward()

    def adversarial(number: int) -> object:
        return adversarial_pass(fmodel, weighted, *state, batch, perturbation, groups=number)

    found: dict[str, Step] = {PLAIN: plain, PROXY: lambda: proxy_pass(fmodel, weighted, *state, batch)}
    return found | {f"adversarial pass, {number} groups": partial(adversarial, number) for number in groups}


def weighted(output: Tensor, weights: Tensor) -> Tensor:
    """A loss whose gradient by the output is `weights`."""
    return torch.dot(output.flatten(), weights.flatten())


def start(*kind: Any) -> list[tuple[str, int]]:
    """Make the steps of one kind of activations in this process; returns their names."""
    made: dict[Any, Callable[[], object]] = dict(steps(*kind))
    PREPARED.clear()
    PREPARED.update(made)
    return list(made)


def measure(settings: argparse.Namespace) -> Iterator[Row]:
    """Time all passes over one kind of activations against each other, then over the next.

    Yields:
        A row for every pass and kind of activations.
    """
    checkouts = {"here": ROOT} | ({"there": settings.against} if settings.against else {})
    for shape, dtype, layout in itertools.product(settings.shapes, settings.dtypes, settings.layouts):
        if layout == "channels_last" and shape.count("x") != 3:
            continue
        with ExitStack() as stack:
            measures: dict[Any, Callable[[], float]] = {}
            for checkout, path in checkouts.items():
                worker = stack.enter_context(Worker(path, threads=settings.threads))
                for name in worker(start, shape, dtype, layout, settings.groups, settings.device):
                    timed = partial(worker, time_prepared, name, settings.seconds, settings.device)
                    measures[(checkout, *name)] = timed
            seconds = interleaved(f"{shape}, {dtype}, {layout}", measures, settings.rounds)
        for checkout in checkouts:
            names = dict.fromkeys(name for _, name, _ in measures)
            each = {name: slope(seconds[checkout, name, FEW], seconds[checkout, name, MANY]) for name in names}
            for name in names:
                row = {"shape": shape, "dtype": dtype, "layout": layout, "checkout": checkout, "pass": name}
                yield row | {"seconds": median_of(each[name]), "ratio": median_of(ratios(each[name], each[PLAIN]))}


def slope(few: Sequence[float], many: Sequence[float]) -> list[float]:
    """Seconds of one layer, round by round."""
    return [(more - less) / (MANY - FEW) for less, more in zip(few, many, strict=True)]


def table(rows: Sequence[Row]) -> Table:
    """A line for every kind of activations, a column for every pass."""
    names = list(dict.fromkeys(row["pass"] for row in rows if row["pass"] != PLAIN))
    found: dict[tuple[str, ...], dict[str, Row]] = {}
    for row in rows:
        found.setdefault((row["shape"], row["dtype"], row["layout"], row["checkout"]), {})[row["pass"]] = row
    lines = [
        [f"{shape.replace('x', '×')}, {dtype}, {layout}", checkout, as_seconds(each[PLAIN]["seconds"])]
        + [as_ratio(each[name]["ratio"]) if name in each else "" for name in names]
        for (shape, dtype, layout, checkout), each in found.items()
    ]
    return Table(["activations", "", "a plain layer", *names], lines)


def parsed(line: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = arguments(__doc__, rounds=9, seconds=0.1)
    shapes = ["8x16x8x8", "16x64x8x8", "128x16x32x32", "128x64x8x8"]
    parser.add_argument("--shapes", nargs="+", default=shapes, help="of the activations, as in 128x16x32x32")
    parser.add_argument(
        "--dtypes", nargs="+", default=["float32"], choices=["float16", "bfloat16", "float32", "float64"]
    )
    parser.add_argument("--layouts", nargs="+", default=["contiguous", "channels_last"])
    parser.add_argument("--groups", nargs="+", type=int, default=[1, 4], help="ghost groups of the adversarial passes")
    parser.add_argument("--against", type=Path, help="root of another checkout to compare this one with")
    settings = parser.parse_args(line)
    if settings.quick:
        settings.rounds, settings.seconds = 6, 0.02
    return settings


if __name__ == "__main__":
    run(__file__, parsed(), measure, table)
