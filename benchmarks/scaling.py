"""How the cost of a step grows with batch, depth, width and the number of models.

    python benchmarks/scaling.py --quick
    python benchmarks/scaling.py --axes models --models 1 2 4 8 16

Batch, depth and width are those of the CIFAR ResNet. The models are small digits ResNets that take the same step on
the same batch, one by one or together under vmap.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
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
from experiments.resnets import cifar_resnet, small_resnet
from networks import CLASSES, case_of
from steps import METHODS, ONE_GRAPH, RADIUS, Step, Variant
from torch.func import stack_module_state, vmap
from torch.utils._pytree import tree_map

from apart_func import make_apart_step, split_state

GROUPS = 4


@dataclass(frozen=True)
class Settings(TimedRounds):
    """What is measured, and for how long.

    Attributes:
        axes: what grows: batch, depth, width, models.
        batch: batch sizes; that of the other axes is `samples`.
        depth: residual blocks a stage.
        width: channels of the first stage.
        models: how many models are trained at a time.
        samples: batch size along depth and width.
        model_samples: batch size of each of the many models.
        compiled: whether the steps of one model are compiled too, at every point.
    """

    axes: tuple[str, ...] = ("batch", "depth", "width", "models")
    batch: tuple[int, ...] = (16, 32, 64, 128, 256)
    depth: tuple[int, ...] = (1, 2, 4, 8)
    width: tuple[int, ...] = (8, 16, 32, 64)
    models: tuple[int, ...] = (1, 2, 4, 8, 16)
    samples: int = 64
    model_samples: int = 32
    compiled: bool = False


# One thread: two stall each other at random when anything else runs on the machine.
QUICK = Settings(
    batch=(8, 32, 128), depth=(1, 2, 4), width=(8, 16, 32), models=(8,), samples=16, rounds=5, seconds=0.05, threads=1
)


class Point(NamedTuple):
    """One size on one axis.

    Attributes:
        axis: what grows.
        size: how large it is.
        steps: what is timed there, by name.
        baseline: which of them the others are divided by.
    """

    axis: str
    size: int
    steps: dict[str, Step]
    baseline: str


def points(settings: Settings) -> Iterator[Point]:
    """All points to measure, each made when its turn comes.

    Args:
        settings: which.

    Yields:
        The points, axis by axis.
    """
    for axis in settings.axes:
        for size in getattr(settings, axis):
            torch._dynamo.reset()
            torch.manual_seed(0)
            yield many_models(size, settings) if axis == "models" else one_model(axis, size, settings)


def one_model(axis: str, size: int, settings: Settings) -> Point:
    """The CIFAR ResNet with one of its sizes changed."""
    changed = {"width": 16, "depth": 2, "batch": settings.samples, axis: size}
    model = cifar_resnet(width=changed["width"], blocks_per_stage=changed["depth"], classes=CLASSES)
    case = case_of(model, (3, 32, 32), changed["batch"], settings.device)
    names = ["plain", "APART", "one pass"]
    names += ["plain compiled", "APART compiled", "one pass compiled"] if settings.compiled else []
    variant = Variant(groups=min(GROUPS, changed["batch"] // 2))
    steps = {name: METHODS[name].make(case, variant, ONE_GRAPH) for name in names}
    return Point(axis, size, steps, "plain")


def many_models(number: int, settings: Settings) -> Point:
    """Digits ResNets from different seeds: the same APART steps in sequence and together."""
    models = [small_resnet(in_channels=1, classes=CLASSES).to(settings.device) for _ in range(number)]
    batch = case_of(models[0], (1, 8, 8), settings.model_samples, settings.device).batch
    step = make_apart_step(models[0], F.cross_entropy, epsilon=RADIUS, groups=GROUPS)
    states = [split_state(model) for model in models]
    stacked = tree_map(torch.detach, stack_module_state(models))
    together = vmap(lambda params, buffers: step(params, buffers, batch))

    def in_sequence(one: Callable[..., object]) -> Step:
        return lambda: [one(params, buffers, batch) for params, buffers in states]

    def at_once(all_of_them: Callable[..., object]) -> Step:
        return lambda: all_of_them(*stacked)

    steps = {
        "one by one": in_sequence(step),
        "one by one, compiled": in_sequence(ONE_GRAPH(step)),
        "vmapped": at_once(together),
        "vmapped, compiled": at_once(ONE_GRAPH(together)),
    }
    return Point("models", number, steps, "one by one")


def measure(settings: Settings) -> Iterator[Row]:
    """Time the steps of every point against each other.

    Args:
        settings: what to measure.

    Yields:
        A row for every step and point.
    """
    for axis, size, steps, baseline in points(settings):
        times = interleaved(f"{axis} {size}", steps, settings)
        yield from ({"axis": axis, "size": size, "step": name, **timing_row(times, name, [baseline])} for name in steps)


def sheets(content: Mapping[str, Any]) -> list[Sheet]:
    """The tables, one for each axis.

    Args:
        content: what was recorded.

    Returns:
        A line for every step and point.
    """
    tables = []
    for axis in dict.fromkeys(row["axis"] for row in content["rows"]):
        rows = [row for row in content["rows"] if row["axis"] == axis]
        (baseline,) = rows[0]["wall"]["relative_to"]
        lines = [[row["step"], str(row["size"]), *time_cells(row, [baseline])] for row in rows]
        tables.append(Sheet(f"growing {axis}", ["step", axis, *time_columns([baseline])], lines))
    return tables


if __name__ == "__main__":
    run_script(__file__, __doc__, Settings(), QUICK, measure, sheets)
