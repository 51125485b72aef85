"""Methods compared, with radii chosen on validation data: `python -m experiments evidence runs/* --evaluate`.

Methods are compared at equal epochs, and at equal compute: as many forward-backward passes as two-pass training takes.
Where a method was trained at several radii, the one of the lowest validation error is chosen; test data have no part in
it. Every two methods are then compared directly, with intervals over seeds, and over test images as well. Only what was
chosen is measured by `evaluate`. Each data set gets its tables and the numbers of every seed.
"""

from __future__ import annotations

import itertools
import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import matplotlib.pyplot as plt
import numpy as np
import tyro

from experiments.evaluate import EVALUATION, evaluate_all, read_evaluation
from experiments.evaluate import Options as Measurement
from experiments.figures import DecayCurve, draw_decays, format_error, format_gain
from experiments.groups import (
    DECAY,
    Candidate,
    Family,
    Group,
    base_epochs,
    by_data,
    by_key,
    equal_compute,
    equal_epochs,
    find_families,
    group_runs,
    plain_of,
    shared_settings,
    unconverged,
    validation_error,
)
from experiments.paired import (
    Key,
    Values,
    clear_of_zero,
    difference_by_key,
    estimate,
    holm,
    over_images,
    welch_by_key,
)
from experiments.runs import FolderError, find_finished, read_run
from experiments.tables import Cell, ResultTable, gains, write_results

Figures = Mapping[str, Mapping[str, Mapping[Key, float]]]  # by label of a family, name, split and seed

BOTH = ("method", "chosen", "runs", "passes", "test error %")
OPPONENTS = {"gain on plain": 1, "gain on plain, 2× epochs": 2}  # by column: how often the epochs
MEASURED = (
    "error by exact statistics %",
    "fits %",
    "training loss",
    "ECE %",
    "area, random %",
    "area, adversarial %",
    "corruption error %",
)
CHOICE_COLUMNS = ("method", "chosen from", "runs", "validation error %", "test error %")
PAIR_COLUMNS = ("methods", "runs", "difference in test error, over seeds", "without pairs", "p, Holm")
OVER_IMAGES = "over seeds and test images"
PAIR_EXPLANATION = (
    "By how many points the test error of the first method is lower than that of the second, within seeds: Student's "
    "95 % interval over seeds (over splits, where there are several){}. Without pairs: Welch's interval, where the "
    "errors of both do not correlate within seeds, so that pairs gain nothing. p is that of the pairs, by Holm's "
    "procedure over the rows; in bold where it is below 0.05."
)
IMAGES_EXPLANATION = ", and a bootstrap over seeds and test images (and splits)"
EXPLANATION = (
    "Means over seeds, ± standard error. Of each method's candidates with the most runs (others were dropped in a "
    "search) that of the lowest mean validation error after the last epoch, over all seeds that it has, was "
    "chosen, in bold here; test data had no part in it. A choice at the edge of what was tried is marked: the "
    "best may lie beyond. A gain is by how many points the test error is lower than plain training's, within "
    "seeds, with its 95 % interval. Bold in the tables above are gains that are clear of zero by Holm's procedure "
    "over the rows, and figures that differ as clearly from those of the same plain training, for better or "
    "worse. Passes are forward-backward passes over the training data."
)
MEASURED_EXPLANATION = (
    " Exact statistics are those of the training samples in the place of running ones. What fits is the share of the "
    "training samples that get their label in evaluation mode; the training loss is in this mode too. ECE is the "
    "expected calibration error; an area is the mean accuracy over the radii of a shift in the running statistics; the "
    "corruption error is the mean over all corruptions and severities."
)


@dataclass(frozen=True)
class Options:
    """What is compared.

    Attributes:
        folders: run folders, and folders of run folders.
        evaluate: first measure the chosen runs that have not been measured.
        errors_only: tables of errors alone, for which no run need be measured.
        samples: test samples that accuracies under a shift are then measured on, at most.
        processes: that then measure at the same time, with one thread each.
        out: folder for tables (.md) and the numbers of every seed (.json), named after the data.
        picture: file for a figure of the error over the weight decay, a panel for each data set.
    """

    folders: Annotated[tuple[Path, ...], tyro.conf.Positional]
    evaluate: tyro.conf.FlagCreatePairsOff[bool] = False
    errors_only: tyro.conf.FlagCreatePairsOff[bool] = False
    samples: int = Measurement.samples
    processes: int = Measurement.processes
    out: Path = Path("runs/evidence")
    picture: Path | None = None


def figures_of(group: Group) -> dict[str, dict[Key, float]]:
    """What was measured on runs that differ in split and seed alone: each of `MEASURED`, by split and seed."""
    figures: dict[str, dict[Key, float]] = {name: {} for name in MEASURED}
    for key, run in group.runs.items():
        found = read_evaluation(run.folder)
        corrupted = float(np.mean(list(found["corruptions"].values())))
        fits, areas = 100 - found["train_error"], found["area"]
        values = (found["exact_error"], fits, found["train_loss"], found["ece"], *areas.values(), corrupted)
        for name, value in zip(MEASURED, values, strict=True):
            figures[name][key] = value
    return figures


def wrong_labels(group: Group) -> dict[Key, Values]:
    """Which test images get a wrong label, 0 or 1 for each, by split and seed."""
    found = {}
    for key, run in group.runs.items():
        evaluation = read_evaluation(run.folder)
        found[key] = np.zeros(evaluation["test_samples"])
        found[key][evaluation["wrong"]] = 1
    return found


def pairs(data: str, families: Sequence[Family], errors_only: bool) -> ResultTable:
    """Every two methods, compared directly."""
    found = [
        (first, second, keys)
        for first, second in itertools.combinations(families, 2)
        if len(keys := sorted(first.group.errors.keys() & second.group.errors.keys())) > 1
    ]
    errors = [(second.group.errors, first.group.errors) for first, second, _ in found]
    differences = [difference_by_key(*both) for both in errors]
    adjusted = holm([difference.p if difference else math.nan for difference in differences])
    wrong = {} if errors_only else {family.label: wrong_labels(family.group) for family in families}
    rows = []
    for (first, second, keys), both, difference, p in zip(found, errors, differences, adjusted, strict=True):
        assert difference is not None, "they have runs in common"
        without_pairs = welch_by_key(*both)
        cells = [Cell(f"{first.label} against {second.label}"), Cell(str(len(keys)))]
        cells += [Cell(format_gain(difference), p < 0.05), Cell(format_gain(without_pairs) if without_pairs else "")]
        cells += [Cell("" if math.isnan(p) else f"{p:.2g}")]
        if wrong:
            low, high = over_images({key: wrong[second.label][key] - wrong[first.label][key] for key in keys})
            cells.append(Cell(f"{difference.mean:+.2f} [{low:+.2f}, {high:+.2f}]"))
        rows.append(cells)
    columns = PAIR_COLUMNS if errors_only else (*PAIR_COLUMNS, OVER_IMAGES)
    notes = PAIR_EXPLANATION.format("" if errors_only else IMAGES_EXPLANATION)
    return ResultTable(f"{data}: methods compared directly", columns, rows, notes)


def rows_of(opponents: Sequence[Family | None], members: Sequence[Family], figures: Figures) -> list[list[Cell]]:
    """The rows of families at equal epochs or equal compute, each against plain training of as much."""
    columns = [gain_cells(opponents, members)]
    for name in MEASURED if figures else ():
        values = [figures[family.label][name] for family in members]
        plain = [figures[each.label][name] if each and each.label in figures else {} for each in opponents]
        clear = clear_of_zero([difference_by_key(*both) for both in zip(plain, values, strict=True)])
        means = [format_error(estimate(list(each.values()))) for each in values]
        columns.append([Cell(mean, is_clear) for mean, is_clear in zip(means, clear, strict=True)])
    return [[*first_cells(family), *of_row] for family, *of_row in zip(members, *columns, strict=True)]


def first_cells(family: Family) -> list[Cell]:
    """Cells for `BOTH`."""
    group = family.group
    error = format_error(estimate(list(group.errors.values())))
    texts = (family.label, family.chosen, str(len(group.runs)), f"{group.passes:g}", error)
    return [Cell(text) for text in texts]


def gain_cells(opponents: Sequence[Family | None], members: Sequence[Family]) -> list[Cell]:
    """A column: by how many points the errors are lower than plain training's."""
    pairs = zip(opponents, members, strict=True)
    return gains([(plain and plain.group.errors, family.group.errors) for plain, family in pairs])


def choices(families: Sequence[Family]) -> list[list[Cell]]:
    """What was chosen from: a row for each candidate of each family that has several."""
    rows = []
    for family in families:
        for candidate in family.candidates if len(family.candidates) > 1 else ():
            errors = [candidate.validation.errors, candidate.test.errors]
            texts = [family.label, candidate.chosen, str(len(candidate.test.runs))]
            texts += [format_error(estimate(list(each.values()))) for each in errors]
            rows.append([Cell(text, bold=candidate is family.best) for text in texts])
    return rows


def measure(data: str, families: Sequence[Family], options: Options) -> None:
    """See to it that the chosen runs have been measured."""
    folders = [run.folder for family in families for run in family.group.runs.values()]
    if options.evaluate:
        evaluate_all(folders, Measurement(tuple(folders), samples=options.samples, processes=options.processes))
    missing = [str(folder) for folder in folders if not (folder / EVALUATION).is_file()]
    if missing:
        raise FolderError(
            f"{len(missing)} of {len(folders)} chosen runs on {data} have not been measured (no {EVALUATION}): "
            f"--evaluate does it, and so does\n  python -m experiments evaluate {shlex.join(missing)}"
        )


def numbers(families: Sequence[Family], figures: Figures) -> list[dict[str, Any]]:
    """Everything that the tables are made of, by seed."""
    return [
        {
            "method": family.label,
            "chosen": candidate.chosen,
            "is_chosen": candidate is family.best,
            "passes": candidate.test.passes,
            "settings": candidate.test.settings,
            "at the edge": family.edges if candidate is family.best else {},
            "validation error %": by_key(candidate.validation.errors),
            "test error %": by_key(candidate.test.errors),
            **{name: by_key(values) for name, values in found.items()},
        }
        for family in families
        for candidate in family.candidates
        for found in [figures.get(family.label, {}) if candidate is family.best else {}]
    ]


def comparisons(data: str, families: Sequence[Family], epochs: int, figures: Figures) -> list[ResultTable]:
    """The tables at equal epochs and at equal compute."""
    found = []
    for title, opponent, plain_epochs, members in (
        ("equal epochs", "plain", epochs, at_equal_epochs(families, epochs)),
        ("equal compute", "plain, 2× epochs", 2 * epochs, equal_compute(families, epochs)),
    ):
        columns = (*BOTH, f"gain on {opponent}", *(MEASURED if figures else ()))
        opponents = [plain_of(families, family, plain_epochs) for family in members]
        found.append(ResultTable(f"{data}: {title}", columns, rows_of(opponents, members, figures), ""))
    return found


def at_equal_epochs(families: Sequence[Family], epochs: int) -> list[Family]:
    """The methods that are compared at equal epochs; plain training that stopped earlier is a rival there."""
    earlier = [family for family in families if family.is_plain and family.group.epochs < epochs]
    return [*earlier, *equal_epochs(families, epochs)]


def draw(families_of: Mapping[str, Sequence[Family]], path: Path) -> None:
    """Draw the error of every method over its weight decay, a panel for each data set where it was varied."""
    curves_of = {
        data: {family.label: curve for family in families if (curve := decay_curve(family))}
        for data, families in families_of.items()
    }
    shown = [data for data, curves in curves_of.items() if curves] or list(families_of)
    figure, panels = plt.subplots(1, len(shown), figsize=(4.6 * len(shown), 5.2), layout="constrained", squeeze=False)
    for axes, data in zip(panels[0], shown, strict=True):
        draw_decays(axes, curves_of[data], data)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def decay_curve(family: Family) -> DecayCurve | None:
    """The error over the weight decay, at each the candidate of the lowest validation error; None where it is one."""
    best: dict[float, Candidate] = {}
    for candidate in sorted(family.candidates, key=validation_error):
        best.setdefault(candidate.test.settings[DECAY], candidate)
    if len(best) < 2:
        return None
    decays = sorted(best)
    errors = [estimate(list(best[decay].test.errors.values())) for decay in decays]
    means, standard_errors = [error.mean for error in errors], [error.standard_error for error in errors]
    return DecayCurve(decays, means, standard_errors, decays.index(family.best.test.settings[DECAY]))


def report(data: str, test: Sequence[Group], validation: Sequence[Group], options: Options) -> list[Family]:
    """Choose, measure, and print and write the tables of one data set.

    Returns:
        What is shown.

    Raises:
        FolderError: there is no plain training, or chosen runs have not been measured.
    """
    families = find_families(test, validation)
    machines = "; ".join(sorted({run.machine for group in test for run in group.runs.values()}))
    explanation = EXPLANATION + ("" if options.errors_only else MEASURED_EXPLANATION)
    notes = f"{explanation}{unconverged(test)} Shared settings: {shared_settings(test)}. Trained with {machines}."
    chosen_from = ResultTable(f"{data}: what was chosen from", CHOICE_COLUMNS, choices(families), notes)

    if not any(group.is_plain for group in test):
        raise FolderError(f"no plain training among the runs on {data}: expected what every method is set against")
    epochs = base_epochs([group.settings for group in test])
    compared = [*at_equal_epochs(families, epochs), *equal_compute(families, epochs)]
    shown = [family for family in families if family in compared]
    figures = {}
    if not options.errors_only:
        measure(data, shown, options)
        figures = {family.label: figures_of(family.group) for family in shown}
    tables = [
        *comparisons(data, families, epochs, figures),
        pairs(data, at_equal_epochs(families, epochs), options.errors_only),
        chosen_from,
    ]
    stem = options.out / f"{data}-evidence"
    write_results(stem, tables, {"environment": machines, "groups": numbers(families, figures)})
    print(f"Written: {stem}.md, .json")
    for family in shown:
        for name, edge in family.edges.items():
            print(f"warning: {data}, {family.label}: {name} {edge} is at the edge; the best may lie beyond")
    return shown


def main(arguments: Sequence[str]) -> None:
    """Report on every data set among the runs."""
    options = tyro.cli(Options, args=arguments, prog="python -m experiments evidence", description=__doc__)
    folders = find_finished(options.folders)
    test, validation = (by_data(read_run(folder, split) for folder in folders) for split in ("test", "validation"))
    families_of = {data: report(data, group_runs(test[data]), group_runs(validation[data]), options) for data in test}
    if options.picture is not None:
        draw(families_of, options.picture)
