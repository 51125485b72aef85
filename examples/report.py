"""Compare finished runs of `train.py`, method by method: `python examples/report.py runs/*`.

Runs that differ in their seed alone are one row of the table. Every row is set against plain training, and against
plain training for twice the epochs, within seeds. For each data set the table is printed and written as Markdown, and
the learning curves are drawn. A folder that holds run folders stands for all of them.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import matplotlib.pyplot as plt
import tyro
from compare_report import Run, draw_curves, format_error, format_gain, write_json
from paired import estimate, paired_difference
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text
from training.runs import METHODS, FinishedRun, FolderError, find_finished, passes_per_epoch, read_run

NAMES = {"plain": "plain", "apart": "APART", "one_pass": "APART in one pass", "sam": "SAM", "apart_sam": "APART-SAM"}
SYMBOLS = {"method.epsilon": "ε", "method.rho": "ρ"}
COLUMNS = ("method", "seeds", "passes", "training loss", "error %", "gain on plain", "gain on plain, 2× epochs")
FILE_WIDTH = 120  # of the printed table where there is no terminal
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


class Group(NamedTuple):
    """Runs that differ in their seed alone.

    Attributes:
        label: what sets them apart from the other groups.
        settings: what they share, as `section.name`.
        runs: by seed, in ascending order.
    """

    label: str
    settings: Mapping[str, Any]
    runs: Mapping[int, FinishedRun]

    @property
    def epochs(self) -> int:
        """Passes over the training data, whatever a step costs."""
        return int(self.settings["training.epochs"])

    @property
    def passes_per_epoch(self) -> float:
        """Forward-backward passes in an epoch."""
        return passes_per_epoch(self.settings)

    @property
    def is_plain(self) -> bool:
        """Whether it is ordinary training."""
        return bool(self.settings["method.name"] == "plain")

    def error(self, seed: int) -> float:
        """Final error of a seed."""
        return self.runs[seed].errors[self.epochs]


class Cell(NamedTuple):
    """A cell of the table.

    Attributes:
        text: what it says.
        bold: whether it stands out.
    """

    text: str
    bold: bool = False


def group_runs(runs: Iterable[FinishedRun]) -> list[Group]:
    """Put the runs together that differ in their seed alone.

    Args:
        runs: of one data set.

    Returns:
        The groups with their labels, plain training first.

    Raises:
        FolderError: two runs are the same in everything.
    """
    found: dict[str, dict[int, FinishedRun]] = {}
    for run in sorted(runs, key=_rank):
        members = found.setdefault(json.dumps(run.settings, sort_keys=True), {})
        if run.seed in members:
            twins = f"{members[run.seed].folder} and {run.folder}"
            raise FolderError(f"{twins} have the same settings and seed {run.seed}: leave one of them out")
        members[run.seed] = run
    all_settings = [next(iter(members.values())).settings for members in found.values()]
    varied = varied_settings(all_settings)
    fewest_epochs = min(settings["training.epochs"] for settings in all_settings)
    return [
        Group(label(settings, varied, fewest_epochs), settings, members)
        for settings, members in zip(all_settings, found.values(), strict=True)
    ]


def _rank(run: FinishedRun) -> tuple[object, ...]:
    """Where a run stands in the table: by method, epochs, radius and the rest."""
    settings = run.settings
    method = METHODS.index(settings["method.name"])
    radii = (settings.get("method.epsilon", 0), settings.get("method.rho", 0))
    return (method, settings["training.epochs"], *radii, json.dumps(settings, sort_keys=True), run.seed)


def varied_settings(all_settings: Sequence[Mapping[str, Any]]) -> list[str]:
    """Which settings have more than one value among those that have them; method and epochs have words of their own."""
    names = dict.fromkeys(name for settings in all_settings for name in settings)
    values = {name: {str(settings[name]) for settings in all_settings if name in settings} for name in names}
    return [name for name in names if len(values[name]) > 1 and name not in ("method.name", "training.epochs")]


def label(settings: Mapping[str, Any], varied: Sequence[str], fewest_epochs: int) -> str:
    """What sets a group apart.

    Args:
        settings: of the group.
        varied: which of them are not the same in all groups.
        fewest_epochs: of any group.

    Returns:
        As in `APART, ε 0.1, 2× epochs`.
    """
    zero_radius = settings["method.name"] == "apart" and settings["method.epsilon"] == 0
    parts = ["zero radius" if zero_radius else NAMES[settings["method.name"]]]
    for name in varied:
        if name in settings and not (zero_radius and name == "method.epsilon"):
            parts.append(f"{_word(name)} {settings[name]}")
    factor, rest = divmod(settings["training.epochs"], fewest_epochs)
    if rest:
        parts.append(f"{settings['training.epochs']} epochs")
    elif factor > 1:
        parts.append(f"{factor}× epochs")
    return ", ".join(parts)


def plain_training(groups: Sequence[Group], group: Group, factor: int) -> Group | None:
    """The plain training that a group is set against: everything but the method is the same.

    Args:
        groups: all groups.
        group: one of them.
        factor: its epochs, as a multiple of the group's. If that is plain itself, of the shortest plain training's.

    Returns:
        Another group, or None where there is none.
    """
    alike = {plain.epochs: plain for plain in groups if plain.is_plain and _frame(plain) == _frame(group)}
    epochs = min(alike) if group.is_plain else group.epochs
    plain = alike.get(factor * epochs)
    return None if plain is group else plain


def _frame(group: Group) -> dict[str, Any]:
    """All of a group's settings that are neither the method's nor the length of training."""
    return {
        name: value
        for name, value in group.settings.items()
        if not name.startswith("method.") and name != "training.epochs"
    }


def row(groups: Sequence[Group], group: Group) -> list[Cell]:
    """A group's row of the table.

    Args:
        groups: all groups.
        group: one of them.

    Returns:
        A cell for each of `COLUMNS`.
    """
    loss = sum(run.losses[-1] for run in group.runs.values()) / len(group.runs)
    return [
        Cell(group.label),
        Cell(str(len(group.runs))),
        Cell(f"{group.epochs * group.passes_per_epoch:g}"),
        Cell(f"{loss:.4f}"),
        Cell(format_error(estimate([group.error(seed) for seed in group.runs]))),
        *(gain(plain_training(groups, group, factor), group) for factor in (1, 2)),
    ]


def gain(plain: Group | None, group: Group) -> Cell:
    """By how many points a group's error lies below that of plain training, over the seeds that both have.

    Args:
        plain: plain training.
        group: what is compared with it.

    Returns:
        The difference and its interval, and the number of pairs where it is not that of the group's seeds.
    """
    seeds = [seed for seed in group.runs if plain is not None and seed in plain.runs]
    if plain is None or not seeds:
        return Cell("")
    difference = paired_difference([plain.error(seed) for seed in seeds], [group.error(seed) for seed in seeds])
    pairs = "" if len(seeds) == len(group.runs) else f" ({len(seeds)} seeds)"
    return Cell(format_gain(difference) + pairs, bold=difference.excludes_zero)


def print_table(title: str, rows: Sequence[Sequence[Cell]], notes: str) -> None:
    """Print the table.

    Args:
        title: above it.
        rows: its cells.
        notes: below it.
    """
    console = Console()
    if not console.is_terminal:
        console.width = FILE_WIDTH
    table = Table(title=title, caption=notes, title_justify="left", caption_justify="left", box=SIMPLE_HEAD)
    for number, column in enumerate(COLUMNS):
        table.add_column(column, justify="right" if number else "left", overflow="fold")
    for cells in rows:
        table.add_row(*(Text(cell.text, style="bold" if cell.bold else "") for cell in cells))
    console.print(table)


def markdown(title: str, rows: Sequence[Sequence[Cell]], notes: str) -> str:
    """The table in Markdown.

    Args:
        title: above it.
        rows: its cells.
        notes: below it.

    Returns:
        Text that ends with a line feed.
    """
    body = [[f"**{cell.text}**" if cell.bold else cell.text for cell in cells] for cells in rows]
    lines = [COLUMNS, ["---", *["---:"] * (len(COLUMNS) - 1)], *body]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return f"**{title}**\n\n{table}\n\n{notes}\n"


def show_on_page(page: Path, name: str, table: str) -> None:
    """Replace a table on a page.

    Args:
        page: Markdown file.
        name: of the table.
        table: its text.

    Raises:
        FolderError: the page has no place for it.
    """
    text = page.read_text(encoding="utf-8") if page.exists() else ""
    place = re.compile(rf"(?<=<!-- {re.escape(name)} -->\n).*?(?=<!-- end -->)", re.DOTALL)
    if not place.search(text):
        raise FolderError(f"{page} has no place for the table: expected the lines <!-- {name} --> and <!-- end -->")
    page.write_text(place.sub(lambda _: f"\n{table}\n", text), encoding="utf-8")


def shared_settings(groups: Sequence[Group]) -> str:
    """The settings that are the same in all groups that have them.

    Args:
        groups: all groups.

    Returns:
        As in `model small_resnet, lr 0.1`. The epochs are the fewest, which labels count in.
    """
    varied = {"data.name", "method.name", *varied_settings([group.settings for group in groups])}
    settings = {name: value for group in groups for name, value in group.settings.items() if name not in varied}
    settings["training.epochs"] = min(group.epochs for group in groups)
    return ", ".join(f"{_word(name)} {value}" for name, value in sorted(settings.items()) if value is not None)


def _word(setting: str) -> str:
    """A setting in few words: `lr` for training.lr, `model` for model.name."""
    section, _, name = setting.partition(".")
    return SYMBOLS.get(setting) or (section if name == "name" else name)


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
    rows = [row(groups, group) for group in groups]
    machines = "; ".join(sorted({run.machine for run in runs}))
    notes = f"{EXPLANATION} Shared settings: {shared_settings(groups)}. Trained with {machines}."
    print_table(title, rows, notes)

    stem = options.out / f"{data}-{options.measure_on}"
    stem.parent.mkdir(parents=True, exist_ok=True)
    text = markdown(title, rows, notes)
    stem.with_suffix(".md").write_text(text, encoding="utf-8")
    if options.page is not None:
        show_on_page(options.page, stem.name, text)
    draw(stem.with_suffix(".png"), groups, title)
    errors = [
        {"label": group.label, "settings": group.settings, "errors": {seed: group.error(seed) for seed in group.runs}}
        for group in groups
    ]
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
