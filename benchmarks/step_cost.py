"""What a training step costs: APART in all its forms against plain training and SAM.

    python benchmarks/step_cost.py --quick
    python benchmarks/step_cost.py --models wrn_40_2 --methods plain APART --device cuda

Every row is set against the plain step of the same model in the same rounds: eager; compiled, which is one function of
model and loss and its compiled backward; and in one graph, the gradient inside the compiled function, which is the form
of the compiled APART step. In steps.py stands what each step does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import matplotlib.pyplot as plt
import torch
from common import (
    Row,
    Sheet,
    TimedRounds,
    format_ratio,
    format_seconds,
    interleaved,
    run_script,
    timing_row,
)
from networks import NETWORKS, make_case
from steps import METHODS, ONE_GRAPH, Choice, choices, make_step, setting_cells, step_name

BASELINES = ("plain", "plain compiled", "plain one graph")
COLOURS = {"plain": "#999999", "SAM": "#009E73", "APART": "#D55E00", "one": "#0072B2"}


@dataclass(frozen=True)
class Settings(TimedRounds):
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
    """

    models: tuple[str, ...] = ("overhead", "mlp", "cifar_resnet", "wrn_40_2", "resnet18")
    methods: tuple[str, ...] = tuple(METHODS)
    ratios: tuple[float, ...] = (1.0, 0.5)
    groups: tuple[int, ...] = (0, 16)
    compiled_models: tuple[str, ...] = tuple(NETWORKS)
    compile_mode: Literal["default", "reduce-overhead", "max-autotune"] = "default"
    samples: int | None = None
    channels_last: bool = False


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
    for model in settings.models:
        torch._dynamo.reset()  # the compiled steps share code, and Dynamo limits the versions it keeps of one
        case = make_case(model, settings.device, settings.samples, settings.channels_last)
        chosen = {choice.name: choice for choice in steps_of(model, settings)}
        steps = {name: make_step(choice, case, compiler) for name, choice in chosen.items()}
        times = interleaved(model, steps, settings)
        rows += [choice.labels() | timing_row(times, name, BASELINES) for name, choice in chosen.items()]
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
    models = dict.fromkeys(row["model"] for row in content["rows"])
    return [sheet(model, [row for row in content["rows"] if row["model"] == model]) for model in models]


def sheet(model: str, rows: Sequence[Row]) -> Sheet:
    """The table of one network."""
    bases = [base for base in BASELINES if any(base in row["relative_to"] for row in rows)]
    columns = ["step", "ratio", "groups", "time (IQR)", *(f"/ {base} (IQR)" for base in bases)]
    lines = [
        [row["method"], *setting_cells(row), format_seconds(row["seconds"])]
        + [format_ratio(row["relative_to"].get(base)) for base in bases]
        for row in rows
    ]
    return Sheet(f"{model}, batch of {rows[0]['samples']}", columns, lines)


def draw(content: Mapping[str, Any], path: Path) -> None:
    """Draw every step's time as a multiple of the plain step, a panel for each network.

    Args:
        content: what was recorded.
        path: the PNG file.
    """
    models = list(dict.fromkeys(row["model"] for row in content["rows"]))
    figure, axes = plt.subplots(1, len(models), figsize=(4.4 * len(models), 4), layout="constrained", squeeze=False)
    for panel, model in zip(axes[0], models, strict=True):
        rows = [row for row in content["rows"] if row["model"] == model and "plain" in row["relative_to"]][::-1]
        ratios = [row["relative_to"]["plain"] for row in rows]
        panel.barh(
            [step_name(row) for row in rows],
            [ratio["median"] for ratio in ratios],
            xerr=[ratio["iqr"] / 2 for ratio in ratios],
            color=[COLOURS[row["method"].replace("-", " ").split()[0]] for row in rows],
            capsize=2,
        )
        panel.axvline(2, color="black", linewidth=0.8, linestyle=":")  # two plain steps
        panel.set(title=model, xlabel="time / plain step, eager")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def bar_label(row: Mapping[str, Any]) -> str:
    """A step, in few words."""
    return f"{row['method']} r{row['ratio']:g} g{row['groups']}" if "ratio" in row else str(row["method"])


if __name__ == "__main__":
    run_script(__file__, __doc__, Settings(), QUICK, measure, sheets, draw)
