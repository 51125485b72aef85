"""Draw what trained networks withstand, plain and APART: `python examples/robustness.py runs/*`.

Accuracy over the radius of a shift in the running statistics, at random and against the network; error on blurred,
noisy and pale test samples; and which layers give way. Runs that differ in their seed alone are one line. What
`evaluate.py` has not measured yet is measured first. Without folders, a few plain and APART networks are trained on
digits, which takes about a minute.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import getitem
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import numpy.typing as npt
import sweep
import tyro
from compare_report import COLOURS, format_error
from corruptions import CORRUPTIONS, SEVERITIES
from cycler import Cycler, cycler
from evaluate import Options as Measurement
from evaluate import evaluate_all, read_evaluation
from groups import Group, group_runs
from matplotlib.axes import Axes
from paired import estimate
from tables import Cell, ResultTable, print_table
from training.runs import FolderError, find_finished, read_run

from apart_func import ApartError

Values = npt.NDArray[np.float64]
SHIFTS = {"random": "All layers shifted at random", "adversarial": "All layers shifted against the network"}
STYLES = cycler(linestyle=["-", "--", ":"]) * cycler(color=COLOURS)


@dataclass(frozen=True)
class Options:
    """What is drawn.

    Attributes:
        folders: run folders, and folders of run folders. None at all trains networks on digits.
        seeds: networks of each method that are then trained.
        epochs: their passes over the training samples.
        workers: processes that train and measure at the same time, with one thread each.
        out: folder for the figures, `<data>-robustness.png`, and for networks that are trained here.
    """

    folders: Annotated[tuple[Path, ...], tyro.conf.Positional] = ()
    seeds: int = 3
    epochs: int = 120
    workers: int = 2
    out: Path = Path("runs/robustness")


class Measured(NamedTuple):
    """What was measured on runs that differ in their seed alone.

    Attributes:
        label: what sets them apart from the others.
        is_plain: whether it is ordinary training.
        is_apart: whether statistics were perturbed in training.
        evaluations: by seed, of `evaluate.py`.
    """

    label: str
    is_plain: bool
    is_apart: bool
    evaluations: Sequence[Mapping[str, Any]]

    def values(self, *keys: str) -> Values:
        """What every run has under these keys of its evaluation, (runs, ...)."""
        return np.array([reduce(getitem, keys, evaluation) for evaluation in self.evaluations])


def train_on_digits(options: Options) -> Path:
    """Train plain and APART networks, or what is left of them.

    Args:
        options: how many, and where to.

    Returns:
        The folder of their run folders.
    """
    out = options.out / "networks"
    grid = sweep.Grid(seeds=options.seeds, factors=(1,), workers=options.workers, out=out)
    sweep.main(grid, ["--data", "digits", "--epochs", str(options.epochs)])
    return out


def measured_groups(groups: Sequence[Group]) -> list[Measured]:
    """What was measured on each group of runs.

    Args:
        groups: of one data set.

    Returns:
        The same groups, with their evaluations.

    Raises:
        FolderError: runs were measured at different radii.
    """
    measured = [
        Measured(
            group.label,
            group.is_plain,
            bool(group.settings.get("method.epsilon")),
            [read_evaluation(run.folder) for run in group.runs.values()],
        )
        for group in groups
    ]
    radii = {tuple(evaluation["radii"]) for group in measured for evaluation in group.evaluations}
    if len(radii) > 1:
        listed = " and ".join(map(str, sorted(radii)))
        raise FolderError(f"the runs were measured at different radii, {listed}: evaluate.py --again makes them equal")
    return measured


def heat_map_groups(groups: Sequence[Measured]) -> list[Measured]:
    """The groups whose layers are shown: plain training, and what APART has made firmest against adversarial shifts."""
    firmest = sorted(groups, key=lambda group: -group.values("area", "adversarial").mean())
    plain = [group for group in groups if group.is_plain]
    apart = [group for group in firmest if group.is_apart]
    return plain[:1] + apart[:1] or list(groups[:1])


def print_means(data: str, groups: Sequence[Measured]) -> None:
    """Print, for every group, the areas under its curves and its mean errors.

    Args:
        data: name of the data set.
        groups: what was measured.
    """
    figures = {
        "test error": ["test_error"],
        "ECE": ["ece"],
        "area, random": ["area", "random"],
        "area, adversarial": ["area", "adversarial"],
        **{f"error, {name}": ["corruptions", name] for name in CORRUPTIONS},
    }
    rows = []
    for group in groups:
        seeds = len(group.evaluations)
        of_seeds = [group.values(*keys).reshape(seeds, -1).mean(axis=1) for keys in figures.values()]
        texts = (group.label, str(seeds), *(format_error(estimate(list(values))) for values in of_seeds))
        rows.append([Cell(text) for text in texts])
    notes = "In percent, means over seeds ± standard error; areas are mean accuracies over the radii."
    print_table(ResultTable(f"{data}: robustness", ("method", "seeds", *figures), rows, notes))


def draw(path: Path, data: str, groups: Sequence[Measured]) -> None:
    """Draw everything into one figure.

    Args:
        path: the PNG file; missing folders are made.
        data: name of the data set.
        groups: what was measured.
    """
    figure = plt.figure(figsize=(12, 13), layout="constrained")
    curves, errors, layers = figure.subfigures(3, 1, squeeze=False, height_ratios=(1.1, 1, 1))[:, 0]
    figure.suptitle(f"{data}: what trained networks withstand (mean over seeds ± standard error)", fontsize=14)
    shifted = curves.subplots(1, 2, sharey=True)
    draw_shifts(shifted, groups)
    for axes, kind in zip(shifted, SHIFTS, strict=True):
        areas = [f"{group.label}: area {group.values('area', kind).mean():.1f} %" for group in groups]
        axes.legend(axes.lines, areas, frameon=False, fontsize="small")
    corrupted = errors.subplots(1, len(CORRUPTIONS), sharey=True)
    draw_corruptions(corrupted, groups)
    corrupted[0].legend(frameon=False, fontsize="small")
    _draw_heat_maps(layers.subplots(1, 2, squeeze=False)[0], heat_map_groups(groups))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def draw_shifts(axes: Sequence[Axes], groups: Sequence[Measured], styles: Cycler[str, Any] = STYLES) -> None:
    """Draw accuracy over the radius of a shift in the running statistics.

    Args:
        axes: one for each of `SHIFTS`.
        groups: a line each.
        styles: of the lines.
    """
    for place, (kind, title) in zip(axes, SHIFTS.items(), strict=True):
        place.set_prop_cycle(styles)
        for group in groups:
            _draw_band(place, group.evaluations[0]["radii"], group.values(kind), group.label)
        place.set(title=title, xlabel="radius ε of the shift in the running statistics")
    axes[0].set_ylabel("test accuracy (%)")


def draw_corruptions(axes: Sequence[Axes], groups: Sequence[Measured], styles: Cycler[str, Any] = STYLES) -> None:
    """Draw error over the severity of corruptions; severity 0 is the samples as they are.

    Args:
        axes: one for each of `CORRUPTIONS`.
        groups: a line each.
        styles: of the lines.
    """
    for place, name in zip(axes, CORRUPTIONS, strict=True):
        place.set_prop_cycle(styles)
        for group in groups:
            values = np.column_stack([group.values("test_error"), group.values("corruptions", name)])
            _draw_band(place, (0, *SEVERITIES), values, group.label)
        place.set(title=f"Corrupted test samples: {name}", xlabel="severity")
    axes[0].set_ylabel("test error (%)")


def _draw_band(axes: Axes, x: Sequence[float], values: Values, label: str) -> None:
    """The mean of (runs, points) with a band of one standard error."""
    mean = values.mean(axis=0)
    (line,) = axes.plot(x, mean, marker=".", label=label)
    if len(values) > 1:
        width = values.std(axis=0, ddof=1) / len(values) ** 0.5
        axes.fill_between(x, mean - width, mean + width, color=line.get_color(), alpha=0.2, linewidth=0)


def _draw_heat_maps(axes: Sequence[Axes], groups: Sequence[Measured]) -> None:
    """Accuracy for each layer that is shifted alone, over the radius."""
    for place in axes[len(groups) :]:
        place.set_axis_off()
    for place, group in zip(axes, groups, strict=False):
        names = list(group.evaluations[0]["layers"])
        accuracies = np.array([group.values("layers", name).mean(axis=0) for name in names])
        image = place.imshow(accuracies, vmin=0, vmax=100, cmap="viridis", aspect="auto")
        place.set_xticks(range(accuracies.shape[1]), [f"{radius:g}" for radius in group.evaluations[0]["radii"]])
        place.set_yticks(range(len(names)), names, fontsize=8)
        place.set(title=f"{group.label}: single layers shifted", xlabel="radius ε")
        if len(names) <= 20:
            for (row, column), accuracy in np.ndenumerate(accuracies):
                colour = "black" if accuracy > 60 else "white"
                place.text(column, row, f"{accuracy:.0f}", ha="center", va="center", color=colour, fontsize=8)
        place.figure.colorbar(image, ax=place, label="test accuracy (%)")


def main(options: Options) -> None:
    """Train where there is nothing to draw, measure, and draw a figure for each data set.

    Args:
        options: from the command line.

    Raises:
        FolderError: there is nothing to draw, or a run cannot be measured.
    """
    folders = find_finished(options.folders or [train_on_digits(options)])
    evaluate_all(folders, Measurement(tuple(folders), workers=options.workers))
    runs = [read_run(folder, "test") for folder in folders]
    for data in dict.fromkeys(run.settings["data.name"] for run in runs):
        groups = measured_groups(group_runs(run for run in runs if run.settings["data.name"] == data))
        print_means(data, groups)
        path = options.out / f"{data}-robustness.png"
        draw(path, data, groups)
        print(f"Figure: {path}")


if __name__ == "__main__":
    try:
        main(tyro.cli(Options, description=__doc__))
    except (FolderError, ApartError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("stopped: the same command goes on.")
