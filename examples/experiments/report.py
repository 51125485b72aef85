"""Compare finished runs, method by method: `python -m experiments report runs/*`.

Runs that differ in split and seed alone are one row of the table. Within seeds, every row is set against plain training
of its own settings, against that for twice the epochs, and against plain training of any other weight decay. For each
data set the table is printed and written as Markdown, and the learning curves are drawn. A folder that holds run
folders stands for all of them.
"""

from __future__ import annotations

import json
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import matplotlib.pyplot as plt
import tyro

from experiments.groups import (
    Group,
    base_epochs,
    by_data,
    by_text,
    group_runs,
    machines_of,
    plain_training,
    shared_settings,
    unconverged,
)
from experiments.paired import estimate
from experiments.runs import FinishedRun, find_finished, read_run
from experiments.tables import Curve, ResultTable, draw_curves, format_error, gains, markdown, print_table

DECAY = "training.weight_decay"
COLUMNS = ("method", "runs", "passes", "time a step", "training loss", "error %")
GAINS = {"gain on plain": 1, "gain on plain, 2× epochs": 2}  # by column: how often the epochs
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


def table_of(groups: Sequence[Group], title: str) -> ResultTable:
    """The table of one data set."""
    tuned = other_decays(groups)
    opponents = [[plain_training(groups, group, factor) for group in groups] for factor in GAINS.values()]
    opponents += [[None if plain is group else plain for group in groups] for plain in tuned]
    columns = [
        gains([(plain and plain.errors, group.errors) for plain, group in zip(column, groups, strict=True)])
        for column in opponents
    ]
    rows = [
        [
            group.label,
            str(len(group.runs)),
            f"{group.epochs * group.passes_per_epoch:g}",
            _step_time(group, plain or group),
            f"{group.loss:.4f}",
            format_error(estimate(list(group.errors.values()))),
            *of_group,
        ]
        for group, plain, *of_group in zip(groups, opponents[0], *columns, strict=True)
    ]
    settings = f" Shared settings: {shared_settings(groups)}. Trained with {machines_of(groups)}."
    names = (*COLUMNS, *GAINS, *(f"gain on {plain.label}" for plain in tuned))
    return ResultTable(title, names, rows, EXPLANATION + unconverged(groups) + settings)


def other_decays(groups: Sequence[Group]) -> list[Group]:
    """Plain training, not prolonged, whose weight decay is not that of most rows: tuned, it is what is to be beaten."""
    usual = Counter(group.settings[DECAY] for group in groups).most_common(1)[0][0]
    shortest = base_epochs([group.settings for group in groups])
    return [group for group in groups if group.is_plain and group.epochs == shortest and group.settings[DECAY] != usual]


def _step_time(group: Group, plain: Group) -> str:
    keys = group.runs.keys() & plain.runs.keys()
    ratios = [group.runs[key].step_seconds / plain.runs[key].step_seconds for key in keys]
    return f"{statistics.median(ratios):.2f} ×" if ratios else ""


def draw(path: Path, groups: Sequence[Group], title: str) -> None:
    """Draw the learning curves of all groups."""
    runs = {
        group.label: [
            Curve([epoch * group.passes_per_epoch for epoch in run.errors], list(run.errors.values()))
            for run in group.runs.values()
        ]
        for group in groups
    }
    figure, axes = plt.subplots(figsize=(10, 5), layout="constrained")
    draw_curves(axes, runs, title)
    figure.savefig(path, dpi=80)
    plt.close(figure)


def report(data: str, runs: Sequence[FinishedRun], measure_on: str, stem: Path) -> None:
    """Print and write the table of one data set, and draw its curves."""
    groups = group_runs(runs)
    title = f"{data}: {measure_on} error"
    table = table_of(groups, title)
    errors = [{"label": each.label, "settings": each.settings, "errors": by_text(each.errors)} for each in groups]
    print_table(table)
    stem.parent.mkdir(parents=True, exist_ok=True)
    stem.with_suffix(".md").write_text(markdown(table), encoding="utf-8")
    content = json.dumps({"notes": table.notes, "groups": errors}, indent=2, ensure_ascii=False, default=str)
    stem.with_suffix(".json").write_text(content + "\n", encoding="utf-8")
    draw(stem.with_suffix(".png"), groups, title)
    print(f"Written: {stem}.md, .png, .json")


def main(arguments: Sequence[str]) -> None:
    """Report on every data set among the runs."""
    options = tyro.cli(Options, args=arguments, prog="python -m experiments report", description=__doc__)
    found = [read_run(folder, options.measure_on) for folder in find_finished(options.folders)]
    for data, runs in by_data(found).items():
        report(data, runs, options.measure_on, options.out / f"{data}-{options.measure_on}")
