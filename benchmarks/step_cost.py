"""What a training step costs: APART in all its forms against plain training and SAM.

    python benchmarks/step_cost.py --quick
    python benchmarks/step_cost.py --models timm --rounds 7 --threads 1
    python benchmarks/step_cost.py --models wrn_40_2 --methods plain APART --device cuda

Every row is set against the plain step of the same model in the same rounds: eager; compiled, which is one function of
model and loss and its compiled backward; and in one graph, the gradient inside the compiled function, which is the form
of the compiled APART step. In steps.py stands what each step does.

Memory that is freed is kept by the process, or handled by glibc's defaults, in a process of its own: mapping large
activations anew takes as long as the arithmetic on them, now and then. A goal is the most that the time of a step may
be, in plain steps.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from common import (
    Row,
    Sheet,
    TimedRounds,
    in_child,
    interleaved,
    run_script,
    time_cells,
    time_columns,
    timing_row,
)
from networks import expanded, make_case
from steps import METHODS, ONE_GRAPH, choices, make_step, setting_cells

BASELINES = ("plain", "plain compiled", "plain one graph")
GOALS = {
    "overhead": {"APART": 2.8, "one pass": 1.7},
    "digits": {"APART": 2.3, "one pass": 1.3},
    "timm/lcnet_035": {"APART": 2.3, "one pass": 1.25},
    "timm/mobilenetv3_small_050": {"APART": 2.3, "one pass": 1.25},
    "timm/efficientvit_b0": {"APART": 2.2, "one pass": 1.2},
    "timm/resnet18": {"APART": 2.2, "one pass": 1.1},
    "timm/test_resnet": {"APART": 2.1, "one pass": 1.08},
}


@dataclass(frozen=True)
class Settings(TimedRounds):
    """What is measured, and for how long.

    Attributes:
        models: which networks; see networks.py. timm: those that are small, by that package and others.
        methods: which steps; see steps.py.
        ratios: shares of the batch in the adversarial pass.
        groups: ghost groups in it, at most half its samples.
        compiled_models: the networks whose compiled steps are measured as well, since compiling takes minutes.
        compile_mode: mode of torch.compile.
        samples: batch sizes; none takes each network's own.
        channels_last: memory format of images and convolutions.
        allocators: what becomes of memory that is freed.
    """

    models: tuple[str, ...] = ("overhead", "mlp", "cifar_resnet", "wrn_40_2", "resnet18")
    methods: tuple[str, ...] = tuple(METHODS)
    ratios: tuple[float, ...] = (1.0, 0.5)
    groups: tuple[int, ...] = (0, 16)
    compiled_models: tuple[str, ...] = ("overhead", "mlp", "cifar_resnet", "wrn_40_2", "resnet18")
    compile_mode: Literal["default", "reduce-overhead", "max-autotune"] = "default"
    samples: tuple[int, ...] = ()
    channels_last: bool = False
    allocators: tuple[Literal["kept", "glibc"], ...] = ("kept",)


# One thread: two stall each other at random when anything else runs on the machine.
QUICK = Settings(
    models=("mlp", "cifar_resnet", "timm"),
    ratios=(1.0,),
    groups=(16,),
    compiled_models=("cifar_resnet",),
    rounds=7,
    seconds=0.1,
    threads=1,
)


def measure(settings: Settings) -> Iterator[Row]:
    """Time all steps on one network and batch against each other, then on the next, each time in a new process.

    Args:
        settings: what to measure.

    Yields:
        A row for every step.
    """
    for model, samples, allocator in itertools.product(
        expanded(settings.models), settings.samples or (None,), settings.allocators
    ):
        yield from in_child(rows_of, model, samples, allocator, settings, allocator=allocator)


def rows_of(model: str, samples: int | None, allocator: str, settings: Settings) -> list[Row]:
    """Time all steps on a network and batch, in this process.

    Args:
        model: which network.
        samples: batch size; None takes the network's own.
        allocator: that this process has.
        settings: which steps, and how to time them.

    Returns:
        A row for every step.
    """
    case = make_case(model, settings.device, samples, settings.channels_last)
    methods = [m for m in settings.methods if model in settings.compiled_models or not METHODS[m].compiled]
    made = choices(model, samples, methods, settings.ratios, settings.groups)
    chosen = {choice.name: choice for choice in made}
    compiler = partial(ONE_GRAPH, mode=settings.compile_mode)
    steps = {name: make_step(choice, case, compiler) for name, choice in chosen.items()}
    times = interleaved(f"{model}, memory {allocator}", steps, settings)
    return [
        choice.labels() | {"allocator": allocator} | timing_row(times, name, BASELINES)
        for name, choice in chosen.items()
    ]


def sheets(content: Mapping[str, Any]) -> list[Sheet]:
    """The tables, one for each network and batch.

    Args:
        content: what was recorded.

    Returns:
        A line for every step.
    """
    tables: dict[str, list[Row]] = {}
    for row in content["rows"]:
        tables.setdefault(f"{row['model']}, batch of {row['samples']}", []).append(row)
    return [sheet(title, rows) for title, rows in tables.items()]


def sheet(title: str, rows: Sequence[Row]) -> Sheet:
    """One table."""
    goals = GOALS.get(rows[0]["model"], {})
    bases = [base for base in BASELINES if any(base in row["wall"]["relative_to"] for row in rows)]
    columns = ["step", "ratio", "groups", "memory", *time_columns(bases), *(["goal"] if goals else [])]
    lines = [
        [row["method"], *setting_cells(row), row["allocator"], *time_cells(row, bases)]
        + ([f"{goals[row['method']]:g} ×" if row["method"] in goals else ""] if goals else [])
        for row in rows
    ]
    return Sheet(title, columns, lines)


if __name__ == "__main__":
    run_script(__file__, __doc__, Settings(), QUICK, measure, sheets)
