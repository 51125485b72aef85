"""How results are written and drawn: numbers with intervals, tables in terminal and Markdown, and pictures."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import matplotlib
import numpy as np
from cycler import cycler
from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator
from rich.console import Console
from rich.markdown import Markdown

from experiments.paired import ByKey, Estimate, PairedDifference, difference_by_key, holm

matplotlib.use("Agg")

FILE_WIDTH = 180  # of the printed table where there is no terminal
# Okabe and Ito, without their yellow, which is faint on white: told apart with every kind of colour vision.
COLOURS = ("#0072B2", "#E69F00", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#000000")
STYLES = cycler(linestyle=["-", "--", ":"]) * cycler(color=COLOURS)
MOST_CURVES = 12  # more cannot be told apart


class ResultTable(NamedTuple):
    """What is printed, and written as Markdown; the first column is that of the rows' labels."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: str = ""


def format_gain(difference: PairedDifference | None) -> str:
    """A difference and its interval, as in `+1.26 [+0.91, +1.61]`; a single pair has no interval."""
    if difference is None:
        return ""
    interval = "" if math.isnan(difference.low) else f" [{difference.low:+.2f}, {difference.high:+.2f}]"
    return f"{difference.mean:+.2f}{interval}"


def format_error(error: Estimate) -> str:
    """An error and its standard error, as in `6.40 ± 0.28`; a single run has no standard error."""
    return f"{error.mean:.2f}" + ("" if math.isnan(error.standard_error) else f" ± {error.standard_error:.2f}")


def bold(text: str, is_bold: bool = True) -> str:
    """Text in Markdown, bold if it is to be."""
    return f"**{text}**" if text and is_bold else text


def gains(rows: Sequence[tuple[ByKey | None, ByKey]]) -> list[str]:
    """A column: by how many points the error of a row lies below that of plain training, over the runs that both have.

    Args:
        rows: of each, the errors of plain training, if there is one to set it against, and its own.

    Returns:
        Differences and intervals, with the number of pairs where it is not that of the seeds; bold where p is below
        0.05 by Holm's procedure over the rows.
    """
    differences = [difference_by_key(plain, own) if plain else None for plain, own in rows]
    cells = []
    for (plain, own), difference, p in zip(rows, differences, holm(differences), strict=True):
        pairs = len((plain or {}).keys() & own.keys())
        missing = "" if pairs in (0, len(own)) else f" ({pairs} run{'s' * (pairs > 1)})"
        cells.append(bold(format_gain(difference) + missing, p < 0.05))
    return cells


def show(text: str) -> None:
    """Print Markdown, its tables as tables."""
    console = Console()
    if not console.is_terminal:
        console.width = FILE_WIDTH
    console.print(Markdown(text))


def markdown(results: ResultTable) -> str:
    """A table in Markdown."""
    lines = [results.columns, ["---", *["---:"] * (len(results.columns) - 1)], *results.rows]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return "\n\n".join(part for part in (f"**{results.title}**", table, results.notes) if part) + "\n"


class Curve(NamedTuple):
    """How a run went: errors in percent, and the passes over the training data after which each was measured."""

    passes: Sequence[float]
    errors: Sequence[float]


def draw_curves(axes: Axes, runs: Mapping[str, Sequence[Curve]], error_name: str) -> None:
    """Draw the mean error of each method against the passes it has cost, with a band of one standard error."""
    axes.set_prop_cycle(STYLES)
    last = {method: float(np.mean([run.errors[-1] for run in trained])) for method, trained in runs.items()}
    shown = sorted(last, key=lambda method: last[method])[:MOST_CURVES]
    for method, trained in runs.items() if len(runs) <= MOST_CURVES else ((name, runs[name]) for name in shown):
        passes, errors = trained[0].passes, np.array([run.errors for run in trained])
        mean = errors.mean(axis=0)
        (line,) = axes.plot(passes, mean, label=method, marker="o" if len(passes) < 3 else "")
        if len(errors) > 1:
            error = errors.std(axis=0, ddof=1) / len(errors) ** 0.5
            axes.fill_between(passes, mean - error, mean + error, color=line.get_color(), alpha=0.2, linewidth=0)
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("")
    of_how_many = f", the lowest {len(shown)} of {len(runs)}" if len(runs) > MOST_CURVES else ""
    axes.set(
        title=f"Learning curves{of_how_many}: mean ± standard error",
        xlabel="forward-backward passes over the training data",
        ylabel=f"{error_name} (%)",
    )
    axes.legend(frameon=False, fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))


class DecayCurve(NamedTuple):
    """The error of a method over its weight decay: decays in ascending order, errors there, and which was chosen."""

    decays: Sequence[float]
    errors: Sequence[Estimate]
    chosen: int


def draw_decays(axes: Axes, curves: Mapping[str, DecayCurve], title: str) -> None:
    """Draw errors over the weight decay, with a circle where validation data chose it; what diverges leaves the top."""
    for (label, curve), colour in zip(curves.items(), itertools.cycle(COLOURS), strict=False):
        means, errors = zip(*curve.errors, strict=True)
        axes.errorbar(curve.decays, means, errors, label=label, color=colour, capsize=2)
        chosen = (curve.decays[curve.chosen], means[curve.chosen])
        axes.plot(*chosen, "o", markersize=9, markerfacecolor="none", color=colour)
    axes.set(title=title, xlabel="weight decay", ylabel="test error (%)", xscale="log")
    decays = sorted({decay for curve in curves.values() for decay in curve.decays})
    axes.set_xticks(decays, [f"{decay:g}" for decay in decays])
    axes.set_xticks([], minor=True)
    axes.set_ylim(bottom=0, top=2 * max(curve.errors[curve.chosen].mean for curve in curves.values()))
    axes.legend(frameon=False, fontsize="small", loc="upper center", bbox_to_anchor=(0.5, -0.13))
