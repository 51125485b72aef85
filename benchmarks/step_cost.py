"""What a training step costs: APART in all its forms against plain training and SAM.

    python benchmarks/step_cost.py --quick
    python benchmarks/step_cost.py --models wrn_40_2 --methods plain APART --device cuda

Every row is set against the plain step of the same model in the same rounds: eager; compiled, which is one function of
model and loss and its compiled backward; and in one graph, the gradient inside the compiled function, which is the form
of the compiled APART step. In steps.py stands what each step does.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from common import (
    RESULTS,
    Row,
    Sheet,
    command_line,
    default_device,
    format_ratio,
    format_seconds,
    interleaved,
    print_sheets,
    progress_bar,
    record,
    timing_row,
)
from networks import NETWORKS, make_case
from rich.progress import TaskID
from steps import METHODS, ONE_GRAPH, Choice, choices, make_step

BASELINES = ("plain", "plain compiled", "plain one graph")


@dataclass(frozen=True)
class Settings:
    """What is measured, and for how long.

    Attributes:
        models: which networks; see networks.py.
        methods: which steps; see steps.py.
        ratios: shares of the batch in the adversarial pass.
        groups: ghost groups in it, at most half its samples.
        compiled_models: the networks whose compiled steps are measured as well, since compiling takes minutes.
        compile_mode: mode of torch.compile.
        samples: batch size; None takes each network's own.
        channels_last: memory format of images and convolutions.
        rounds: how often each step is timed, in turn with the others.
        seconds: least time each gets in a round.
        threads: of the CPU.
        device: where to run.
        out: folder for the JSON file.
    """

    models: tuple[str, ...] = ("overhead", "mlp", "cifar_resnet", "wrn_40_2", "resnet18")
    methods: tuple[str, ...] = tuple(METHODS)
    ratios: tuple[float, ...] = (1.0, 0.5)
    groups: tuple[int, ...] = (0, 16)
    compiled_models: tuple[str, ...] = tuple(NETWORKS)
    compile_mode: Literal["default", "reduce-overhead", "max-autotune"] = "default"
    samples: int | None = None
    channels_last: bool = False
    rounds: int = 7
    seconds: float = 0.5
    threads: int = os.cpu_count() or 1
    device: str = default_device()
    out: Path = RESULTS


# One thread: two stall each other at random when anything else runs on the machine.
QUICK = Settings(
    models=("overhead", "mlp", "cifar_resnet"),
    ratios=(1.0,),
    groups=(16,),
    compiled_models=("cifar_resnet",),
    rounds=7,
    seconds=0.1,
    threads=1,
)


def measure(settings: Settings) -> list[Row]:
    """Time all steps of one network against each other, then those of the next.

    Args:
        settings: what to measure.

    Returns:
        A row for every step.
    """
    rows: list[Row] = []
    compiler = partial(ONE_GRAPH, mode=settings.compile_mode)
    with progress_bar() as progress:
        for model in settings.models:
            torch._dynamo.reset()  # the compiled steps share code, and Dynamo limits the versions it keeps of one
            case = make_case(model, settings.device, settings.samples, settings.channels_last)
            chosen = {choice.name: choice for choice in steps_of(model, settings)}
            steps = {name: make_step(choice, case, compiler) for name, choice in chosen.items()}
            task = progress.add_task(f"{model}: first calls", total=len(chosen) * (settings.rounds + 1))

            def show(name: str, model: str = model, task: TaskID = task) -> None:
                progress.update(task, advance=1, description=f"{model}: {name}")

            times = interleaved(steps, settings.rounds, settings.seconds, settings.threads, show)
            rows += [choice.labels() | timing_row(times, name, BASELINES) for name, choice in chosen.items()]
            progress.update(task, description=model)
    return rows


def steps_of(model: str, settings: Settings) -> list[Choice]:
    """The steps to measure on a network."""
    methods = [m for m in settings.methods if model in settings.compiled_models or not METHODS[m].compiled]
    return choices(model, settings.samples, methods, settings.ratios, settings.groups)


def sheets(content: Mapping[str, Any]) -> list[Sheet]:
    """The tables, one for each network.

    Args:
        content: what was recorded.

    Returns:
        A line for every step.
    """
    columns = ["step", "ratio", "groups", "time (IQR)", *(f"/ {base} (IQR)" for base in BASELINES)]
    models = dict.fromkeys(row["model"] for row in content["rows"])
    by_model = {model: [row for row in content["rows"] if row["model"] == model] for model in models}
    return [
        Sheet(f"{model}, batch of {rows[0]['samples']}", columns, [line(row) for row in rows])
        for model, rows in by_model.items()
    ]


def line(row: Row) -> list[str]:
    """The cells of a step."""
    settings = [f"{row['ratio']:g}", str(row["groups"])] if "ratio" in row else ["", ""]
    ratios = [format_ratio(row["relative_to"].get(base)) for base in BASELINES]
    return [row["method"], *settings, format_seconds(row["seconds"]), *ratios]


def main(settings: Settings) -> None:
    """Measure, write, and print the tables.

    Args:
        settings: from the command line.
    """
    rows = measure(settings)
    content = record(settings.out, "step_cost", settings, rows, settings.device, settings.threads)
    print_sheets(content, sheets(content))


if __name__ == "__main__":
    main(command_line(Settings(), QUICK, __doc__))
