"""Compare finished runs of `train.py`, method by method: `python examples/report.py runs/*`.

Runs that differ in their seed alone are one row of the table. Every row is set against plain training, and against
plain training for twice the epochs, within seeds. For each data set the table is printed and written as Markdown, and
the learning curves are drawn. A folder that holds run folders stands for all of them.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import matplotlib.pyplot as plt
import tyro
from compare_report import Run, draw_curves, format_error, write_json
from groups import Group, group_runs, plain_training, shared_settings
from paired import estimate
from tables import Cell, ResultTable, gain, markdown, print_table, show_on_page
from training.runs import FinishedRun, FolderError, find_finished, read_run

COLUMNS = ("method", "seeds", "passes", "training loss", "error %", "gain on plain", "gain on plain, 2× epochs")
EXPLANATION = (
    "Means over seeds, ± standard error. A gain is by how many points the error is lower, within seeds, with its 95 % "
    "interval, in bold where that excludes zero. Passes are forward-backward passes over the training data; the "
    "training loss is that of the last epoch, without perturbation."
)


@dataclass(frozen=True)
class Options:
    """What is compared.

    Attributes:
        folders: run folders, and folders of run folders.
        measure_on: whose error: settings are chosen on validation data, results stated on test data.
        out: folder for tables (.md), the errors of every seed (.json) and figures (.png), named after the data.
        page: Markdown file that shows the tables too, each between `<!-- digits-test -->` and `<!-- end -->`.
    """

    folders: Annotated[tuple[Path, ...], tyro.conf.Positional]
    measure_on: Literal["test", "validation"] = "test"
    out: Path = Path("runs/report")
    page: Path | None = None


def row(groups: Sequence[Group], group: Group) -> list[Cell]:
    """A group's row of the table.

    Args:
        groups: all groups.
        group: one of them.

    Returns:
        A cell for each of `COLUMNS`.
    """
    opponents = [plain_training(groups, group, factor) for factor in (1, 2)]
    loss = sum(run.losses[-1] for run in group.runs.values()) / len(group.runs)
    return [
        Cell(group.label),
        Cell(str(len(group.runs))),
        Cell(f"{group.passes:g}"),
        Cell(f"{loss:.4f}"),
        Cell(format_error(estimate(list(group.errors.values())))),
        *(gain(plain.errors, group.errors) if plain else Cell("") for plain in opponents),
    ]


def draw(path: Path, groups: Sequence[Group], title: str) -> None:
    """Draw the learning curves of all groups.

    Args:
        path: the PNG file; its folder exists.
        groups: what is drawn.
        title: data set and error, as in `digits: test error`.
    """
    runs = {
        group.label: [
            Run(
                losses=run.losses,
                passes=[epoch * group.passes_per_epoch for epoch in run.errors],
                errors=list(run.errors.values()),
            )
            for run in group.runs.values()
        ]
        for group in groups
    }
    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    draw_curves(axes, runs, title)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def report(data: str, runs: Sequence[FinishedRun], options: Options) -> None:
    """Print and write the table of one data set, and draw its curves.

    Args:
        data: its name.
        runs: all runs on it.
        options: from the command line.
    """
    groups = group_runs(runs)
    title = f"{data}: {options.measure_on} error"
    machines = "; ".join(sorted({run.machine for run in runs}))
    notes = f"{EXPLANATION} Shared settings: {shared_settings(groups)}. Trained with {machines}."
    table = ResultTable(title, COLUMNS, [row(groups, group) for group in groups], notes)
    print_table(table)

    stem = options.out / f"{data}-{options.measure_on}"
    stem.parent.mkdir(parents=True, exist_ok=True)
    text = markdown(table)
    stem.with_suffix(".md").write_text(text, encoding="utf-8")
    if options.page is not None:
        show_on_page(options.page, stem.name, text)
    draw(stem.with_suffix(".png"), groups, title)
    errors = [{"label": group.label, "settings": group.settings, "errors": group.errors} for group in groups]
    write_json(stem.with_suffix(".json"), {"environment": machines, "groups": errors})
    print(f"Written: {stem}.md, .png, .json")


def main(options: Options) -> None:
    """Report on every data set among the runs.

    Args:
        options: from the command line.

    Raises:
        FolderError: nothing can be compared.
    """
    runs = [read_run(folder, options.measure_on) for folder in find_finished(options.folders)]
    for data in dict.fromkeys(run.settings["data.name"] for run in runs):
        report(data, [run for run in runs if run.settings["data.name"] == data], options)


if __name__ == "__main__":
    try:
        main(tyro.cli(Options, description=__doc__))
    except FolderError as error:
        sys.exit(f"error: {error}")
