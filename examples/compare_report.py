"""What `compare.py` shows at its end: a table, the same as JSON, and a figure.

Every method is set against plain training, seed by seed. A positive difference means fewer errors than plain.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import numpy.typing as npt
from cycler import cycler
from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator
from paired import Estimate, PairedDifference, estimate, paired_difference
from rich.console import Console
from rich.table import Table

matplotlib.use("Agg")
import matplotlib.pyplot as plt

# Okabe and Ito, without their yellow, which is faint on white: told apart with every kind of colour vision.
COLOURS = ("#0072B2", "#E69F00", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#000000")
MARKERS = ("o", "^", "s")


@dataclass
class Run:
    """One training run.

    Attributes:
        losses: mean training loss of every epoch, without perturbation.
        passes: forward-backward passes over the training data, at each point of the learning curve.
        errors: error in percent at these points; the last is the result.
        step_seconds: time of every step.
    """

    losses: list[float] = field(default_factory=list)
    passes: list[float] = field(default_factory=list)
    errors: list[float] = field(default_factory=list)
    step_seconds: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Row:
    """One method, over all seeds.

    Attributes:
        method: its name.
        training_loss: mean over seeds of the last epoch's loss; far from zero, training has not converged.
        error: final error in percent.
        gain_over_plain: plain − this, within seeds, in points; None for plain training itself.
        step_milliseconds: median over seeds of the median time of a step.
        step_ratio: median over seeds of the median time of a step divided by plain training's on the same seed.
        errors: final error of every seed.
    """

    method: str
    training_loss: float
    error: Estimate
    gain_over_plain: PairedDifference | None
    step_milliseconds: float
    step_ratio: float
    errors: list[float]


def summarise(runs: Mapping[str, Sequence[Run]], plain: str) -> list[Row]:
    """Set every method against plain training.

    Args:
        runs: for every method its runs, all in the same order of seeds.
        plain: the key of plain training.

    Returns:
        A row for every method, in the order of `runs`.
    """
    plain_steps = _step_times(runs[plain])
    rows = []
    for method, trained in runs.items():
        steps = _step_times(trained)
        row = Row(
            method=method,
            training_loss=float(np.mean([run.losses[-1] for run in trained])),
            error=estimate(_final_errors(trained)),
            gain_over_plain=None if method == plain else gain(trained, runs[plain]),
            step_milliseconds=1000 * float(np.median(steps)),
            step_ratio=float(np.median(steps / plain_steps)),
            errors=_final_errors(trained),
        )
        rows.append(row)
    return rows


def gain(runs: Sequence[Run], others: Sequence[Run]) -> PairedDifference:
    """By how many points the error of `runs` lies below that of `others`, within seeds.

    Args:
        runs: of one method.
        others: of another, in the same order of seeds.

    Returns:
        The mean difference and its 95 % interval.
    """
    return paired_difference(_final_errors(others), _final_errors(runs))


def print_table(rows: Sequence[Row], title: str, caption: str) -> None:
    """Print the table.

    Args:
        rows: one for every method.
        title: what was measured.
        caption: on what, and how times were taken.
    """
    table = Table("method", title=title, caption=caption, title_justify="left", caption_justify="left")
    for column in ("loss", "error %", "plain − method [95 %]", "time a step"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        difference = "" if row.gain_over_plain is None else format_gain(row.gain_over_plain)
        error = format_error(row.error)
        table.add_row(row.method, f"{row.training_loss:.3f}", error, difference, f"{row.step_ratio:.2f} ×")
    Console().print(table)


def verdict(method: str, other: str, difference: PairedDifference) -> str:
    """Say in a sentence what the interval allows to say.

    Args:
        method: the method that was tried.
        other: what it was compared with.
        difference: other − method in error.

    Returns:
        The sentence.
    """
    outcome = "no difference shown: the interval includes zero"
    if difference.excludes_zero:
        outcome = f"{'fewer' if difference.mean > 0 else 'more'} errors: the interval excludes zero"
    return f"{method} against {other}: {format_gain(difference)} points, {outcome}."


def format_gain(difference: PairedDifference) -> str:
    """A difference and its interval, as in `+1.26 [+0.91, +1.61]`; a single pair has no interval."""
    if math.isnan(difference.low):
        return f"{difference.mean:+.2f}"
    return f"{difference.mean:+.2f} [{difference.low:+.2f}, {difference.high:+.2f}]"


def format_error(error: Estimate) -> str:
    """An error and its standard error, as in `6.40 ± 0.28`; a single run has no standard error."""
    return f"{error.mean:.2f}" + ("" if math.isnan(error.standard_error) else f" ± {error.standard_error:.2f}")


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a mapping of plain values and paths as JSON.

    Args:
        path: the file; missing folders are made.
        content: what it shall hold.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False, default=str) + "\n", encoding="utf-8")


def draw(path: Path, runs: Mapping[str, Sequence[Run]], plain: str, error_name: str) -> None:
    """Draw the learning curves and the error of each seed pair.

    Args:
        path: the PNG file; missing folders are made.
        runs: for every method its runs, all in the same order of seeds.
        plain: the key of plain training, which the others are paired with.
        error_name: what the error was measured on, as in `test error`.
    """
    figure, (curves, pairs) = plt.subplots(1, 2, figsize=(10, 4.2), layout="constrained")
    draw_curves(curves, runs, error_name)
    _draw_pairs(pairs, runs, plain, error_name)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def draw_curves(axes: Axes, runs: Mapping[str, Sequence[Run]], error_name: str) -> None:
    """Draw the mean error of each method against the passes it has cost, with a band of one standard error.

    Args:
        axes: where to.
        runs: for every method its runs, measured at the same points of training.
        error_name: what the error was measured on, as in `test error`.
    """
    axes.set_prop_cycle(cycler(linestyle=["-", "--", ":"]) * cycler(color=COLOURS))
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


def _draw_pairs(axes: Axes, runs: Mapping[str, Sequence[Run]], plain: str, error_name: str) -> None:
    """Final error of each method against plain training's on the same seed."""
    plain_errors = _final_errors(runs[plain])
    for colour, marker, (method, trained) in zip(COLOURS, MARKERS, runs.items(), strict=False):
        if method != plain:
            axes.scatter(plain_errors, _final_errors(trained), color=colour, marker=marker, alpha=0.8, label=method)
    axes.axline((plain_errors[0], plain_errors[0]), slope=1, color="grey", linewidth=1, label="same error")
    axes.set_aspect("equal", adjustable="datalim")
    axes.set(
        title="Each seed: below the line is better than plain",
        xlabel=f"{error_name} of plain training (%)",
        ylabel=f"{error_name} of the method (%)",
    )
    axes.legend(frameon=False)


def _final_errors(runs: Sequence[Run]) -> list[float]:
    """The last error of every run."""
    return [run.errors[-1] for run in runs]


def _step_times(runs: Sequence[Run]) -> npt.NDArray[np.float64]:
    """The median time of a step of every run; a median, since other work on the machine disturbs single steps."""
    return np.array([np.median(run.step_seconds) for run in runs])
