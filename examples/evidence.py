"""Tables of what one pass gains, and what networks withstand: `python examples/evidence.py runs/* --evaluate`.

Methods are compared at equal epochs, and at equal compute: as many forward-backward passes as two-pass training takes.
Where a method was trained at several radii, the one of the lowest validation error is chosen; test data have no part in
it. Only what was chosen is measured by `evaluate.py`. Each data set gets its tables, the numbers of every seed and a
figure. A folder that holds run folders stands for all of them.
"""

from __future__ import annotations

import itertools
import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import tyro
from compare_report import COLOURS, format_error, write_json
from corruptions import CORRUPTIONS
from cycler import Cycler, cycler
from evaluate import EVALUATION, evaluate_all, read_evaluation
from evaluate import Options as Measurement
from groups import (
    ORDINARY,
    Group,
    frame,
    group_runs,
    has_zero_radius,
    label,
    shared_settings,
    varied_settings,
    word,
)
from paired import difference_by_seed, estimate, paired_share
from robustness import SHIFTS, draw_corruptions, draw_shifts, measured_groups
from tables import Cell, ResultTable, gain, markdown, print_table, show_on_page
from training.runs import FolderError, find_finished, read_run

from apart_func import ApartError

Figures = Mapping[str, Mapping[str, Mapping[int, float]]]  # by label of a family, name and seed

CHOSEN = ("method.epsilon", "method.rho", "method.groups", "method.clean_fraction")  # on validation data
RADII = CHOSEN[:2]
DASHES = {(False, False): "-", (False, True): "--", (True, False): ":", (True, True): "-."}  # zero radius, longer
USUAL_CARRY = ORDINARY["method.carry"]
BOTH = ("method", "chosen", "seeds", "passes", "test error %")
MEASURED = ("ECE %", "area, random %", "area, adversarial %", "corruption error %")
CARRY_COLUMNS = (*BOTH, "gain on plain of as many epochs", "share of the gain of two passes")
CHOICE_COLUMNS = ("method", "radius", "seeds", "validation error %", "test error %")
CARRY_EXPLANATION = (
    "The perturbation of the next step is found from the clean groups (no name), from *all* groups, or from a decayed "
    "*average*; *alternating* steps are clean and perturbed; *refreshed* takes two passes every fourth step, which the "
    "passes here do not count."
)
EXPLANATION = (
    "Means over seeds, ± standard error. Of each method the radius of the lowest mean validation error after the last "
    "epoch was chosen, in bold here; test data had no part in it. A gain is by how many points the test error is lower "
    "than plain training's, within seeds, with its 95 % interval. Bold in the tables above are gains whose interval "
    "excludes zero, and figures that differ as clearly from those of the same plain training, for better or worse. "
    "Passes are forward-backward passes over the training data. ECE is the expected calibration error; an area is the "
    "mean accuracy over the radii of a shift in the running statistics; the corruption error is the mean over blur, "
    "noise and contrast in five severities. The share of a gain that is kept is the ratio of two mean gains over plain "
    "training as long as the one pass was; its interval is a bootstrap (BCa) over the seeds, too narrow for few."
)


@dataclass(frozen=True)
class Options:
    """What is compared.

    Attributes:
        folders: run folders, and folders of run folders.
        evaluate: first measure the chosen runs that have not been measured.
        samples: test samples that accuracies under a shift are then measured on, at most.
        workers: processes that then measure at the same time, with one thread each.
        out: folder for tables (.md), the numbers of every seed (.json) and figures (.png), named after the data.
        page: Markdown file that shows the tables too, between `<!-- digits-evidence -->` and `<!-- end -->`.
    """

    folders: Annotated[tuple[Path, ...], tyro.conf.Positional]
    evaluate: tyro.conf.FlagCreatePairsOff[bool] = False
    samples: int = Measurement.samples
    workers: int = Measurement.workers
    out: Path = Path("runs/evidence")
    page: Path | None = None


class Candidate(NamedTuple):
    """Runs that differ in their seed alone.

    Attributes:
        chosen: the settings that are chosen, as in `ε 0.1`.
        test: the runs with their test errors.
        validation: the runs with their validation errors.
    """

    chosen: str
    test: Group
    validation: Group


class Family(NamedTuple):
    """A method, with all the radii that it was trained at.

    Attributes:
        label: its name.
        candidates: by radius, in ascending order.
    """

    label: str
    candidates: Sequence[Candidate]

    @property
    def best(self) -> Candidate:
        """The candidate with the lowest mean validation error over the seeds that all have; of equals the first."""
        seeds = set.intersection(*(set(candidate.validation.runs) for candidate in self.candidates))
        if not seeds:
            raise FolderError(f"{self.label}: no radius can be chosen, since no seed was trained at all of them")

        def mean_error(candidate: Candidate) -> float:
            return float(np.mean([candidate.validation.errors[seed] for seed in sorted(seeds)]))

        return min(self.candidates, key=mean_error)

    @property
    def group(self) -> Group:
        """The chosen runs, with their test errors."""
        return self.best.test

    @property
    def carries_as_usual(self) -> bool:
        """Whether it is no experiment with what one pass carries on."""
        return bool(self.group.settings.get("method.carry", USUAL_CARRY) == USUAL_CARRY)

    def perturbs_by(self, method: str) -> bool:
        """Whether that is its method, and no control of zero radius."""
        settings = self.group.settings
        return bool(settings["method.name"] == method) and not has_zero_radius(settings)


def find_families(test: Sequence[Group], validation: Sequence[Group]) -> list[Family]:
    """Put groups together that differ in nothing but what is chosen; zero radius is a method of its own.

    Args:
        test: groups of one data set, with test errors.
        validation: the same groups, with validation errors.

    Returns:
        The families, plain training first.
    """
    varied = varied_settings([group.settings for group in test])
    told = [name for name in CHOSEN if name in RADII or name in varied]
    found: dict[str, list[Candidate]] = {}
    for group, validated in zip(test, validation, strict=True):
        rest = {name: value for name, value in group.settings.items() if name not in CHOSEN}
        values = [f"{word(name)} {group.settings[name]:g}" for name in told if name in group.settings]
        key = json.dumps([rest, has_zero_radius(group.settings)], sort_keys=True)
        found.setdefault(key, []).append(Candidate(", ".join(values), group, validated))
    told_apart = [name for name in varied if name not in CHOSEN]
    fewest_epochs = min(group.epochs for group in test)
    return [
        Family(label(candidates[0].test.settings, told_apart, fewest_epochs), candidates)
        for candidates in found.values()
    ]


def plain_of(families: Sequence[Family], family: Family, epochs: int) -> Family | None:
    """The plain training of so many epochs that a family is set against; None for itself, or where there is none."""
    for plain in families:
        if plain.group.is_plain and plain.group.epochs == epochs and frame(plain.group) == frame(family.group):
            return None if plain is family else plain
    return None


def two_passes_of(families: Sequence[Family], family: Family) -> Family | None:
    """The two-pass training whose gain a family of one pass may keep: of the same rule, and the shortest there is."""
    for other in sorted(families, key=lambda other: other.group.epochs):
        has_same_rule = other.group.settings.get("method.rule") == family.group.settings["method.rule"]
        if other.perturbs_by("apart") and has_same_rule and frame(other.group) == frame(family.group):
            return other
    return None


def share_cell(families: Sequence[Family], family: Family) -> Cell:
    """What a family of one pass keeps of the gain of two passes, both over plain training as long as its own.

    Args:
        families: all of a data set.
        family: one of them.

    Returns:
        The share with its interval, in bold where that excludes zero; nothing without plain training, two passes, or
        seeds that all have.
    """
    plain, two = plain_of(families, family, family.group.epochs), two_passes_of(families, family)
    if plain is None or two is None:
        return Cell("")
    errors = [each.group.errors for each in (plain, family, two)]
    seeds = sorted(set.intersection(*map(set, errors)))
    if not seeds:
        return Cell("")
    of_plain, of_one, of_two = (np.array([each[seed] for seed in seeds]) for each in errors)
    share = paired_share((of_plain - of_one).tolist(), (of_plain - of_two).tolist())
    if share is None:
        return Cell("not defined")
    return Cell(f"{100 * share.value:.0f} % [{100 * share.low:.0f}, {100 * share.high:.0f}]", share.low > 0)


def what_is_kept(families: Sequence[Family], shown: Sequence[Family]) -> str:
    """Say what one pass keeps of the gain of two passes.

    Args:
        families: all of a data set.
        shown: those in the table above.

    Returns:
        A sentence for each family of one pass.
    """
    sentences = []
    for family in shown:
        share = share_cell(families, family) if family.perturbs_by("one_pass") else Cell("")
        if share.text == "not defined":
            sentences.append(f"What {family.label} keeps is not defined: the gain of two passes may be zero.")
        elif share.text:
            sentences.append(f"{family.label} keeps {share.text} of the gain of two passes.")
    return " ".join(sentences)


def figures_of(group: Group) -> dict[str, dict[int, float]]:
    """What was measured on runs.

    Args:
        group: of runs that differ in their seed alone, all measured.

    Returns:
        Each of `MEASURED`, by seed.
    """
    figures: dict[str, dict[int, float]] = {name: {} for name in MEASURED}
    for seed, run in group.runs.items():
        found = read_evaluation(run.folder)
        errors = [found["corruptions"][name] for name in CORRUPTIONS]
        values = (found["ece"], found["area"]["random"], found["area"]["adversarial"], float(np.mean(errors)))
        for name, value in zip(MEASURED, values, strict=True):
            figures[name][seed] = value
    return figures


def row(families: Sequence[Family], family: Family, epochs: int, figures: Figures) -> list[Cell]:
    """A family's row of the comparison at equal epochs or equal compute.

    Args:
        families: all of a data set.
        family: one of them.
        epochs: of the plain training that it is set against.
        figures: what was measured.

    Returns:
        Cells for `BOTH`, the gain and `MEASURED`.
    """
    plain = plain_of(families, family, epochs)
    cells = [*first_cells(family), gain_cell(plain, family)]
    for name, values in figures[family.label].items():
        of_plain = figures[plain.label][name] if plain and plain.label in figures else {}
        difference = difference_by_seed(of_plain, values)
        is_clear = difference is not None and difference.excludes_zero
        cells.append(Cell(format_error(estimate(list(values.values()))), bold=is_clear))
    return cells


def carry_row(families: Sequence[Family], family: Family) -> list[Cell]:
    """A row of the table of ways to carry a perturbation."""
    plain = plain_of(families, family, family.group.epochs)
    return [*first_cells(family), gain_cell(plain, family), share_cell(families, family)]


def first_cells(family: Family) -> list[Cell]:
    """Cells for `BOTH`."""
    group = family.group
    error = format_error(estimate(list(group.errors.values())))
    texts = (family.label, family.best.chosen, str(len(group.runs)), f"{group.passes:g}", error)
    return [Cell(text) for text in texts]


def gain_cell(plain: Family | None, family: Family) -> Cell:
    """By how many points the error is lower than plain training's."""
    return gain(plain.group.errors, family.group.errors) if plain else Cell("")


def choices(families: Sequence[Family]) -> list[list[Cell]]:
    """What was chosen from.

    Args:
        families: all of a data set.

    Returns:
        For each candidate of each family that has several, method, radius, seeds and both errors.
    """
    rows = []
    for family in families:
        for candidate in family.candidates if len(family.candidates) > 1 else ():
            errors = [candidate.validation.errors, candidate.test.errors]
            texts = [family.label, candidate.chosen, str(len(candidate.test.runs))]
            texts += [format_error(estimate(list(each.values()))) for each in errors]
            rows.append([Cell(text, bold=candidate is family.best) for text in texts])
    return rows


def measure(data: str, families: Sequence[Family], options: Options) -> None:
    """See to it that the chosen runs have been measured.

    Args:
        data: name of the data set.
        families: whose runs.
        options: from the command line.

    Raises:
        FolderError: some have not been, and are not to be now.
    """
    folders = [run.folder for family in families for run in family.group.runs.values()]
    if options.evaluate:
        evaluate_all(folders, Measurement(tuple(folders), samples=options.samples, workers=options.workers))
    missing = [str(folder) for folder in folders if not (folder / EVALUATION).is_file()]
    if missing:
        raise FolderError(
            f"{len(missing)} of {len(folders)} chosen runs on {data} have not been measured (no {EVALUATION}): "
            f"--evaluate does it, and so does\n  python examples/evaluate.py {shlex.join(missing)}"
        )


def draw(path: Path, data: str, groups: Sequence[Group]) -> None:
    """Draw accuracy under shifted statistics, and error on corrupted samples.

    Args:
        path: the PNG file; its folder exists.
        data: name of the data set.
        groups: a line each; all have been measured.
    """
    lines, styles = measured_groups(groups), line_styles(groups)
    figure = plt.figure(figsize=(13, 11), layout="constrained")
    upper, lower, legend = figure.subfigures(3, 1, squeeze=False, height_ratios=(1, 1, 0.25))[:, 0]
    figure.suptitle(f"{data}: what trained networks withstand (mean over seeds ± standard error)", fontsize=14)
    shifted = upper.subplots(1, len(SHIFTS), sharey=True)
    draw_shifts(shifted, lines, styles)
    draw_corruptions(lower.subplots(1, len(CORRUPTIONS), sharey=True), lines, styles)
    legend.legend(handles=list(shifted[0].lines), loc="center", ncols=3, handlelength=3, frameon=False)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def line_styles(groups: Sequence[Group]) -> Cycler[str, Any]:
    """A colour for each method, and a dash for what longer training or zero radius makes of it."""
    methods = [(group.settings["method.name"], group.settings.get("method.rule")) for group in groups]
    colours = dict(zip(dict.fromkeys(methods), itertools.cycle(COLOURS)))
    shortest = min(group.epochs for group in groups)
    dashes = [DASHES[has_zero_radius(group.settings), group.epochs > shortest] for group in groups]
    return cycler(color=[colours[method] for method in methods], linestyle=dashes)


def numbers(families: Sequence[Family], figures: Figures) -> list[dict[str, Any]]:
    """Everything that the tables are made of, by seed.

    Args:
        families: all of a data set.
        figures: what was measured.

    Returns:
        An entry for each candidate of each family.
    """
    return [
        {
            "method": family.label,
            "chosen": candidate.chosen,
            "is_chosen": candidate is family.best,
            "passes": candidate.test.passes,
            "settings": candidate.test.settings,
            "validation error %": candidate.validation.errors,
            "test error %": candidate.test.errors,
            **(figures.get(family.label, {}) if candidate is family.best else {}),
        }
        for family in families
        for candidate in family.candidates
    ]


def equal_epochs(families: Sequence[Family], epochs: int) -> list[Family]:
    """The families that were trained for so many epochs, without experiments in carrying."""
    return [family for family in families if family.carries_as_usual and family.group.epochs == epochs]


def equal_compute(families: Sequence[Family], epochs: int) -> list[Family]:
    """The families that took twice as many passes, without experiments in carrying."""
    return [family for family in families if family.carries_as_usual and family.group.passes == 2 * epochs]


def comparisons(data: str, families: Sequence[Family], epochs: int, figures: Figures) -> list[ResultTable]:
    """The tables at equal epochs and at equal compute, and that of the ways to carry a perturbation.

    Args:
        data: name of the data set.
        families: all of it.
        epochs: of the shortest plain training.
        figures: what was measured.

    Returns:
        The tables; the third only where there is more than one way.
    """
    found = []
    for title, opponent, plain_epochs, members in (
        ("equal epochs", "plain", epochs, equal_epochs(families, epochs)),
        ("equal compute", "plain, 2× epochs", 2 * epochs, equal_compute(families, epochs)),
    ):
        columns = (*BOTH, f"gain on {opponent}", *MEASURED)
        rows = [row(families, family, plain_epochs, figures) for family in members]
        found.append(ResultTable(f"{data}: {title}", columns, rows, what_is_kept(families, members)))
    carried = [family for family in families if family.perturbs_by("one_pass")]
    if any(not family.carries_as_usual for family in carried):
        rows = [carry_row(families, family) for family in carried]
        title = f"{data}: ways to carry the perturbation"
        found.append(ResultTable(title, CARRY_COLUMNS, rows, CARRY_EXPLANATION))
    return found


def report(data: str, test: Sequence[Group], validation: Sequence[Group], options: Options) -> None:
    """Choose, measure, and print and write the tables of one data set.

    Args:
        data: its name.
        test: all groups of runs on it, with test errors.
        validation: the same, with validation errors.
        options: from the command line.

    Raises:
        FolderError: there is no plain training, or chosen runs have not been measured.
    """
    families = find_families(test, validation)
    machines = "; ".join(sorted({run.machine for group in test for run in group.runs.values()}))
    notes = f"{EXPLANATION} Shared settings: {shared_settings(test)}. Trained with {machines}."
    chosen_from = ResultTable(f"{data}: what was chosen from", CHOICE_COLUMNS, choices(families), notes)
    print_table(chosen_from)

    epochs = shortest_plain(data, test)
    compared = [*equal_epochs(families, epochs), *equal_compute(families, epochs)]
    shown = [family for family in families if family in compared]
    measure(data, shown, options)
    figures = {family.label: figures_of(family.group) for family in shown}
    tables = comparisons(data, families, epochs, figures)
    for table in tables:
        print_table(table)

    stem = options.out / f"{data}-evidence"
    stem.parent.mkdir(parents=True, exist_ok=True)
    text = "\n".join(markdown(table) for table in (*tables, chosen_from))
    stem.with_suffix(".md").write_text(text, encoding="utf-8")
    if options.page is not None:
        show_on_page(options.page, stem.name, text)
    draw(stem.with_suffix(".png"), data, [family.group for family in shown])
    write_json(stem.with_suffix(".json"), {"environment": machines, "groups": numbers(families, figures)})
    print(f"Written: {stem}.md, .png, .json")


def shortest_plain(data: str, groups: Sequence[Group]) -> int:
    """The epochs that all methods are compared at."""
    epochs = [group.epochs for group in groups if group.is_plain]
    if not epochs:
        raise FolderError(f"no plain training among the runs on {data}: expected what every method is set against")
    return min(epochs)


def main(options: Options) -> None:
    """Report on every data set among the runs.

    Args:
        options: from the command line.

    Raises:
        FolderError: nothing can be compared.
    """
    folders = find_finished(options.folders)
    test, validation = ([read_run(folder, split) for folder in folders] for split in ("test", "validation"))
    for data in dict.fromkeys(run.settings["data.name"] for run in test):
        on_data = [[run for run in runs if run.settings["data.name"] == data] for runs in (test, validation)]
        report(data, group_runs(on_data[0]), group_runs(on_data[1]), options)


if __name__ == "__main__":
    try:
        main(tyro.cli(Options, description=__doc__))
    except (FolderError, ApartError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("stopped: the same command goes on.")
