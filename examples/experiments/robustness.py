"""Draw what trained networks withstand, plain and APART: `python -m experiments robustness runs/*`.

Accuracy over the radius of a shift in the running statistics, at random and against the network; error on blurred,
noisy and pale test samples; and which layers give way. Runs that differ in their seed alone are one line. What
`evaluate` has not measured yet is measured first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import getitem
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import tyro
from matplotlib.axes import Axes

from experiments.corruptions import SEVERITIES
from experiments.evaluate import Options as Measurement
from experiments.evaluate import evaluate_all, read_evaluation
from experiments.figures import STYLES
from experiments.groups import Group, by_data, group_runs
from experiments.paired import Values
from experiments.runs import FolderError, find_finished, read_run

SHIFTS = {"random": "All layers shifted at random", "adversarial": "All layers shifted against the network"}


@dataclass(frozen=True)
class Options:
    """What is drawn.

    Attributes:
        folders: run folders, and folders of run folders.
        samples: test samples that are then measured on, at most.
        processes: that measure at the same time, with one thread each.
        out: folder for the figures, `<data>-robustness.png`.
    """

    folders: Annotated[tuple[Path, ...], tyro.conf.Positional]
    samples: int = Measurement.samples
    processes: int = 2
    out: Path = Path("runs/robustness")


class Measured(NamedTuple):
    """What was measured on runs that differ in split and seed alone."""

    label: str
    is_plain: bool
    is_apart: bool
    evaluations: Sequence[Mapping[str, Any]]

    @property
    def corruptions(self) -> list[str]:
        """Names of the corruptions that were measured."""
        return list(self.evaluations[0]["corruptions"])

    def values(self, *keys: str) -> Values:
        """What every run has under these keys of its evaluation, (runs, ...)."""
        return np.array([reduce(getitem, keys, evaluation) for evaluation in self.evaluations])


def measured_groups(groups: Sequence[Group]) -> list[Measured]:
    """What was measured on each group of runs."""
    measured = []
    for group in groups:
        evaluations = [read_evaluation(run.folder) for run in group.runs.values()]
        is_apart = bool(group.settings.get("method.epsilon"))
        measured.append(Measured(group.label, group.is_plain, is_apart, evaluations))
    radii = {tuple(evaluation["radii"]) for group in measured for evaluation in group.evaluations}
    if len(radii) > 1:
        listed = " and ".join(map(str, sorted(radii)))
        raise FolderError(f"the runs were measured at different radii, {listed}: evaluate --again makes them equal")
    return measured


def heat_map_groups(groups: Sequence[Measured]) -> list[Measured]:
    """The groups whose layers are shown: plain training, and what APART has made firmest against adversarial shifts."""
    firmest = sorted(groups, key=lambda group: -group.values("area", "adversarial").mean())
    plain = [group for group in groups if group.is_plain]
    apart = [group for group in firmest if group.is_apart]
    return plain[:1] + apart[:1] or list(groups[:1])


def draw(path: Path, data: str, groups: Sequence[Measured]) -> None:
    """Draw everything into one figure."""
    figure = plt.figure(figsize=(12, 13), layout="constrained")
    curves, errors, layers = figure.subfigures(3, 1, squeeze=False, height_ratios=(1.1, 1, 1))[:, 0]
    figure.suptitle(f"{data}: what trained networks withstand (mean over seeds ± standard error)", fontsize=14)
    shifted = curves.subplots(1, 2, sharey=True)
    draw_shifts(shifted, groups)
    shifted[0].legend(frameon=False, fontsize="small")
    corrupted = errors.subplots(1, len(groups[0].corruptions), sharey=True, squeeze=False)[0]
    draw_corruptions(corrupted, groups)
    _draw_heat_maps(layers.subplots(1, 2, squeeze=False)[0], heat_map_groups(groups))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=75)
    plt.close(figure)


def draw_shifts(axes: Sequence[Axes], groups: Sequence[Measured]) -> None:
    """Draw accuracy over the radius of a shift in the running statistics."""
    for place, (kind, title) in zip(axes, SHIFTS.items(), strict=True):
        place.set_prop_cycle(STYLES)
        for group in groups:
            _draw_band(place, group.evaluations[0]["radii"], group.values(kind), group.label)
        place.set(title=title, xlabel="radius ε of the shift in the running statistics")
    axes[0].set_ylabel("test accuracy (%)")


def draw_corruptions(axes: Sequence[Axes], groups: Sequence[Measured]) -> None:
    """Draw error over the severity of corruptions; severity 0 is the samples as they are."""
    for place, name in zip(axes, groups[0].corruptions, strict=True):
        place.set_prop_cycle(STYLES)
        for group in groups:
            values = np.column_stack([group.values("test_error"), group.values("corruptions", name)])
            _draw_band(place, (0, *SEVERITIES), values, group.label)
        place.set(title=f"Corrupted: {name}", xlabel="severity")
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
        place.figure.colorbar(image, ax=place, label="test accuracy (%)")


def main(arguments: Sequence[str]) -> None:
    """Measure, and draw a figure for each data set."""
    options = tyro.cli(Options, args=arguments, prog="python -m experiments robustness", description=__doc__)
    folders = find_finished(options.folders)
    evaluate_all(folders, Measurement(tuple(folders), samples=options.samples, processes=options.processes))
    for data, runs in by_data(read_run(folder, "test") for folder in folders).items():
        groups = measured_groups(group_runs(runs))
        path = options.out / f"{data}-robustness.png"
        draw(path, data, groups)
        print(f"Figure: {path}")
