"""The drawings of results: `FIGURES["step_cost"](content, path)` writes a PNG file."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import ceil
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from common import Row
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from steps import step_name

# Okabe and Ito: told apart with every kind of colour vision
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#56B4E9", "#CC79A7")
MARKERS = ("o", "^", "s", "D", "v", "P")
METHOD_COLOURS = {"plain": "#999999", "SAM": "#009E73", "APART": "#D55E00", "one": "#0072B2"}
PANELS = 4  # side by side


def draw_steps(content: Mapping[str, Any], path: Path) -> None:
    """Draw every step's time as a multiple of the plain step, a panel for each network.

    Args:
        content: what step_cost.py recorded.
        path: the PNG file.
    """
    panels: dict[str, list[Row]] = {}
    for row in content["rows"]:
        if "plain" in row["wall"]["relative_to"]:
            panels.setdefault(f"{row['model']}, {row['samples']}, memory {row['allocator']}", []).insert(0, row)
    figure, axes = _panels(len(panels), height=4)
    for panel, (title, rows) in zip(axes, panels.items(), strict=True):
        ratios = [row["wall"]["relative_to"]["plain"] for row in rows]
        panel.barh(
            [step_name(row) for row in rows],
            [ratio["median"] for ratio in ratios],
            xerr=[ratio["iqr"] / 2 for ratio in ratios],
            color=[METHOD_COLOURS[row["method"].replace("-", " ").split()[0]] for row in rows],
            capsize=2,
        )
        panel.axvline(2, color="black", linewidth=0.8, linestyle=":")  # two plain steps
        panel.set_title(title, fontsize="medium")
        panel.set_xlabel("time / plain step, eager")
    _save(figure, path)


def draw_growth(content: Mapping[str, Any], path: Path) -> None:
    """Draw time against size, a panel for each axis.

    Args:
        content: what scaling.py recorded.
        path: the PNG file.
    """
    panels: dict[str, list[Row]] = {}
    for row in content["rows"]:
        panels.setdefault(row["axis"], []).append(row)
    figure, axes = _panels(len(panels), height=3.6)
    for panel, (axis, rows) in zip(axes, panels.items(), strict=True):
        for colour, marker, step in zip(COLOURS, MARKERS, dict.fromkeys(row["step"] for row in rows), strict=False):
            line = [row for row in rows if row["step"] == step]
            seconds = [row["wall"]["seconds"] for row in line]
            panel.errorbar(
                [row["size"] for row in line],
                [1000 * each["median"] for each in seconds],
                yerr=[500 * each["iqr"] for each in seconds],
                color=colour,
                marker=marker,
                capsize=3,
                label=step,
            )
        sizes = sorted({row["size"] for row in rows})
        panel.set_xscale("log", base=2)
        panel.set_xticks(sizes, [str(size) for size in sizes], minor=False)
        panel.set_yscale("log")
        panel.set(xlabel=axis, ylabel="time of a step (ms), median and IQR" if panel is axes[0] else "")
        panel.legend(frameon=False, fontsize="small")
    _save(figure, path)


def _panels(number: int, height: float) -> tuple[Figure, Sequence[Axes]]:
    lines, columns = ceil(number / PANELS), min(number, PANELS)
    size = (4.4 * columns, height * lines)
    figure, axes = plt.subplots(lines, columns, figsize=size, layout="constrained", squeeze=False)
    for unused in axes.flat[number:]:
        unused.remove()
    return figure, list(axes.flat[:number])


def _save(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)


FIGURES: dict[str, Callable[[Mapping[str, Any], Path], None]] = {"step_cost": draw_steps, "scaling": draw_growth}
