"""What tables and pictures of results share: how numbers are written, colours, and learning curves."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from cycler import cycler
from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator

from experiments.paired import Estimate, PairedDifference

matplotlib.use("Agg")

# Okabe and Ito, without their yellow, which is faint on white: told apart with every kind of colour vision.
COLOURS = ("#0072B2", "#E69F00", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#000000")
STYLES = cycler(linestyle=["-", "--", ":"]) * cycler(color=COLOURS)


class Curve(NamedTuple):
    """How training went.

    Attributes:
        passes: forward-backward passes over the training data, at each point where the error was measured.
        errors: error in percent at these points.
    """

    passes: Sequence[float]
    errors: Sequence[float]


def format_gain(difference: PairedDifference) -> str:
    """A difference and its interval, as in `+1.26 [+0.91, +1.61]`; a single pair has no interval."""
    if math.isnan(difference.low):
        return f"{difference.mean:+.2f}"
    return f"{difference.mean:+.2f} [{difference.low:+.2f}, {difference.high:+.2f}]"


def format_error(error: Estimate) -> str:
    """An error and its standard error, as in `6.40 ± 0.28`; a single run has no standard error."""
    return f"{error.mean:.2f}" + ("" if math.isnan(error.standard_error) else f" ± {error.standard_error:.2f}")


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a mapping of plain values and paths as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False, default=str) + "\n", encoding="utf-8")


def draw_curves(axes: Axes, runs: Mapping[str, Sequence[Curve]], error_name: str) -> None:
    """Draw the mean error of each method against the passes it has cost, with a band of one standard error."""
    axes.set_prop_cycle(STYLES)
    for method, trained in runs.items():
        passes, errors = trained[0].passes, np.array([run.errors for run in trained])
        mean = errors.mean(axis=0)
        (line,) = axes.plot(passes, mean, label=method)
        if len(errors) > 1:
            standard_error = errors.std(axis=0, ddof=1) / len(errors) ** 0.5
            band = (mean - standard_error, mean + standard_error)
            axes.fill_between(passes, *band, color=line.get_color(), alpha=0.2, linewidth=0)
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("")
    axes.set(
        title="Learning curves: mean ± standard error",
        xlabel="forward-backward passes over the training data",
        ylabel=f"{error_name} (%)",
    )
    axes.legend(frameon=False)


class DecayCurve(NamedTuple):
    """The error of a method over its weight decay.

    Attributes:
        decays: at which it was trained, in ascending order.
        errors: mean error in percent at each.
        standard_errors: of these means; not a number for a single run.
        chosen: which of the decays was chosen.
    """

    decays: Sequence[float]
    errors: Sequence[float]
    standard_errors: Sequence[float]
    chosen: int


def draw_decays(axes: Axes, curves: Mapping[str, DecayCurve], title: str) -> None:
    """Draw errors over the weight decay, with a circle where validation data chose it; what diverges leaves the top."""
    for (label, curve), colour in zip(curves.items(), itertools.cycle(COLOURS), strict=False):
        axes.errorbar(curve.decays, curve.errors, curve.standard_errors, label=label, color=colour, capsize=2)
        chosen = (curve.decays[curve.chosen], curve.errors[curve.chosen])
        axes.plot(*chosen, "o", markersize=9, markerfacecolor="none", color=colour)
    axes.set(title=title, xlabel="weight decay", ylabel="test error (%)", xscale="log")
    decays = sorted({decay for curve in curves.values() for decay in curve.decays})
    axes.set_xticks(decays, [f"{decay:g}" for decay in decays])
    axes.set_xticks([], minor=True)
    if curves:
        axes.set_ylim(bottom=0, top=2 * max(curve.errors[curve.chosen] for curve in curves.values()))
    axes.legend(frameon=False, fontsize="small", loc="upper center", bbox_to_anchor=(0.5, -0.13))
