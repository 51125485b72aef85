"""What a study with equal budgets has found so far, as the plan has it (examples/results/PLAN.md).

search, refinement    validation errors of every draw of every arm
test                  once all its runs have finished: errors of every arm, and what the primary contrasts decide
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from experiments.figures import format_error, format_gain
from experiments.paired import (
    Key,
    PairedDifference,
    difference_by_key,
    estimate,
    holm,
    over_images,
    welch_by_key,
)
from experiments.tables import Cell, ResultTable

Line = Mapping[str, Any]
NOTHING = 0.5  # points: an interval within ± of it is that of no effect

FIGURES: dict[str, Callable[[Line], float]] = {
    "test error %": lambda line: line["test_error"],
    "error on corrupted images %": lambda line: float(np.mean(list(line["corruptions"].values()))),
    "error by exact statistics %": lambda line: line["exact_error"],
    "accuracy, random shifts %": lambda line: line["area"]["random"],
    "accuracy, adversarial shifts %": lambda line: line["area"]["adversarial"],
    "training loss": lambda line: line["train_loss"],
    "training error %": lambda line: line["train_error"],
}
PRIMARY = tuple(FIGURES)[:2]


def decision(difference: PairedDifference, p: float) -> str:
    """What the plan concludes from the points by which one pass is below plain training.

    Args:
        difference: with its 95 % interval.
        p: after Holm's procedure over the primary contrasts.
    """
    is_small = difference.low >= -NOTHING and difference.high <= NOTHING
    if p < 0.05 and difference.low > 0:
        return "helps" + ", by less than half a point" * is_small
    if p < 0.05 and difference.high < 0:
        return "harms" + ", by less than half a point" * is_small
    return "does nothing" if is_small else "not shown"


def search_table(study: str, arms: Sequence[str], lines: Sequence[Line]) -> ResultTable:
    """Validation errors of all draws that have begun; with refinement, their means over seeds."""
    errors: dict[tuple[int, str], list[float]] = {}
    for line in lines:
        if line["stage"] in ("search", "refine"):
            errors.setdefault((line["draw"], line["arm"]), []).append(line["validation_error"])
    draws = sorted({draw for draw, _ in errors})
    rows = [
        [
            Cell(str(draw)),
            *(Cell(format_error(estimate(found)) if (found := errors.get((draw, arm))) else "") for arm in arms),
        ]
        for draw in draws
    ]
    notes = "Validation error in percent of each draw; a mean over three seeds, ± standard error, where it was refined."
    return ResultTable(f"{study}: search", ("draw", *arms), rows, notes)


def by_split(lines: Sequence[Line], arm: str, figure: str) -> dict[Key, float]:
    """A figure of an arm's tests."""
    tests = [line for line in lines if (line["stage"], line["arm"]) == ("test", arm)]
    return {(line["split"], line["seed"]): FIGURES[figure](line) for line in tests}


def is_measured(line: Line, figure: str) -> bool:
    """Whether a tested network has a figure."""
    try:
        FIGURES[figure](line)
    except KeyError:
        return False
    return True


def test_tables(study: str, arms: Sequence[str], lines: Sequence[Line]) -> list[ResultTable]:
    """What was tested, and the contrasts of every arm with plain training, of which two are primary."""
    measured = [name for name in FIGURES if all(is_measured(line, name) for line in lines if line["stage"] == "test")]
    figures = [[estimate(list(by_split(lines, arm, name).values())) for name in measured] for arm in arms]
    means = [[Cell(arm), *map(Cell, map(format_error, found))] for arm, found in zip(arms, figures, strict=True)]
    tests = ResultTable(f"{study}: test", ("arm", *measured), means, "Means over splits, ± standard error.")

    found = {
        (arm, name): (by_split(lines, "plain", name), by_split(lines, arm, name))
        for arm in arms
        if arm != "plain"
        for name in measured
    }
    differences = {key: difference_by_key(*both) for key, both in found.items()}
    primary = [("one_pass", name) for name in PRIMARY if name in measured]
    ps = [difference.p if (difference := differences[key]) else math.nan for key in primary]
    adjusted = dict(zip(primary, holm(ps), strict=True))
    rows = []
    for key, difference in differences.items():
        assert difference is not None, "all arms have the same splits"
        without_pairs = welch_by_key(*found[key])
        cells = [key[0], key[1], format_gain(difference), format_gain(without_pairs) if without_pairs else ""]
        cells += [_over_images(lines, key[0]) if key[1] == PRIMARY[0] else ""]
        cells += [f"{adjusted[key]:.2g}", decision(difference, adjusted[key])] if key in adjusted else ["", ""]
        rows.append([Cell(text, bold=key in adjusted) for text in cells])
    columns = ("arm", "figure", "plain − arm", "without pairs", "over splits and test images", "p, Holm", "decision")
    notes = (
        "Student's 95 % interval over splits; positive is a lower figure than plain training's. In bold the "
        "primary contrasts, with the decision of the plan; all others decide nothing."
    )
    return [tests, ResultTable(f"{study}: contrasts", columns, rows, notes)]


def _over_images(lines: Sequence[Line], arm: str) -> str:
    """The interval of a difference in test error that speaks of other test images too."""
    wrong: dict[str, dict[Key, Any]] = {"plain": {}, arm: {}}
    for line in lines:
        if line["stage"] == "test" and line["arm"] in wrong:
            labels = np.zeros(line["test_samples"])
            labels[line["wrong"]] = 1
            wrong[line["arm"]][0, line["split"]] = labels  # of one test set: splits are what seeds are there
    low, high = over_images({key: wrong["plain"][key] - wrong[arm][key] for key in wrong["plain"]})
    return f"[{low:+.2f}, {high:+.2f}]"
