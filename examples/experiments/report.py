"""Compare finished runs, method by method: `python -m experiments report runs/*`.

Runs that differ in split and seed alone are one row of the table. Within seeds, every row is set against plain training
of its own settings, against that for twice the epochs, and against plain training of any other weight decay. For each
data set the table is printed and written as Markdown, and the learning curves are drawn. A folder that holds run
folders stands for all of them.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import matplotlib.pyplot as plt
import tyro

from experiments.figures import Curve, draw_curves, format_error
from experiments.groups import (
    DECAY,
    Group,
    base_epochs,
    by_data,
    by_key,
    group_runs,
    plain_training,
    shared_settings,
    unconverged,
)
from experiments.paired import estimate
from experiments.runs import FinishedRun, find_finished, read_run
from experiments.tables import Cell, ResultTable, gains, write_results

COLUMNS = (
    "method",
    "runs",
    "passes",
    "time a step",
    "training loss",
    "error %",
    "gain on plain",
    "gain on plain, 2× epochs",
)
EXPLANATION = (
    "Means over runs, ± standard error. A gain is by how many points the error is lower, within seeds, with its 95 % "
    "interval (over splits, where there are several), in bold where it is clear of zero by Holm's procedure over the "
    "rows. Passes are forward-backward passes over the training data; the time of a step is this machine's, as a "
    "multiple of plain training's on the same seed (median). The training loss is that of the last epoch on training "
    "batches, without perturbation."
)


@dataclass(frozen=True)
class Options:
    """What is compared.

    Attributes:
        folders: run folders, and folders of run folders.
        measure_on: whose error: settings are chosen on validation data, results stated on test data.
        out: folder for tables (.md), the errors of every seed (.json) and figures (.png), named after the data.
    """

    folders: Annotated[tuple[Path, ...], tyro.conf.Positional]
    measure_on: Literal["test", "validation"] = "test"
    out: Path = Path("runs/report")


def rows_of(groups: Sequence[Group]) -> list[list[Cell]]:
    """The rows of the table: a cell for each of `COLUMNS`."""
    opponents = [[plain_training(groups, group, factor) for group in groups] for factor in (1, 2)]
    opponents += [[None if plain is group else plain for group in groups] for plain in other_decays(groups)]
    columns = [
        gains([(plain and plain.errors, group.errors) for plain, group in zip(column, groups, strict=True)])
        for column in opponents
    ]
    return [
        [
            Cell(group.label),
            Cell(str(len(group.runs))),
            Cell(f"{group.passes:g}"),
            Cell(_step_time(group, plain or group)),
            Cell(f"{group.loss:.4f}"),
            Cell(format_error(estimate(list(group.errors.values())))),
            *of_group,
        ]
        for group, plain, *of_group in zip(groups, opponents[0], *columns, strict=True)
    ]


def other_decays(groups: Sequence[Group]) -> list[Group]:
    """Plain training, not prolonged, whose weight decay is not that of most rows: tuned, it is what is to be beaten."""
    usual = Counter(group.settings[DECAY] for group in groups).most_common(1)[0][0]
    shortest = base_epochs([group.settings for group in groups])
    return [group for group in groups if group.is_plain and group.epochs == shortest and group.settings[DECAY] != usual]


def _step_time(group: Group, plain: Group) -> str:
    keys = group.runs.keys() & plain.runs.keys()
    ratios = [group.runs[key].step_seconds / plain.runs[key].step_seconds for key in keys]
    return f"{statistics.median(ratios):.2f} ×" if ratios else ""


def table_of(groups: Sequence[Group], title: str) -> ResultTable:
    """The table of one data set."""
    machines = "; ".join(sorted({run.machine for group in groups for run in group.runs.values()}))
    notes = f"{EXPLANATION}{unconverged(groups)} Shared settings: {shared_settings(groups)}. Trained with {machines}."
    columns = (*COLUMNS, *(f"gain on {plain.label}" for plain in other_decays(groups)))
    return ResultTable(title, columns, rows_of(groups), notes)


def draw(path: Path, groups: Sequence[Group], title: str) -> None:
    """Draw the learning curves of all groups."""
    runs = {
        group.label: [
            Curve([epoch * group.passes_per_epoch for epoch in run.errors], list(run.errors.values()))
            for run in group.runs.values()
        ]
        for group in groups
    }
    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    draw_curves(axes, runs, title)
    figure.savefig(path, dpi=80)
    plt.close(figure)


def report(data: str, runs: Sequence[FinishedRun], measure_on: str, stem: Path) -> None:
    """Print and write the table of one data set, and draw its curves."""
    groups = group_runs(runs)
    title = f"{data}: {measure_on} error"
    errors = [{"label": each.label, "settings": each.settings, "errors": by_key(each.errors)} for each in groups]
    table = table_of(groups, title)
    write_results(stem, [table], {"notes": table.notes, "groups": errors})
    draw(stem.with_suffix(".png"), groups, title)
    print(f"Written: {stem}.md, .png, .json")


def main(arguments: Sequence[str]) -> None:
    """Report on every data set among the runs."""
    options = tyro.cli(Options, args=arguments, prog="python -m experiments report", description=__doc__)
    measure_on = options.measure_on
    found = [read_run(folder, measure_on) for folder in find_finished(options.folders)]
    for data, runs in by_data(found).items():
        report(data, runs, measure_on, options.out / f"{data}-{measure_on}")
