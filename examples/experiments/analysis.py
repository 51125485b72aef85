"""What finished runs say: groups that differ in split and seed alone, statistics of pairs, and tables of both.

A seed fixes the initial weights and the batches, so a difference within a seed is free of the spread that two methods
share. Intervals are Student's, over seeds, or over splits of the data where there are several, since seeds on one split
have more in common. Welch's interval needs no pairs; the bootstrap's speaks of other test images too.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import matplotlib
import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.markdown import Markdown
from scipy import stats

from experiments.runs import FinishedRun, FolderError
from experiments.settings import METHODS, OWN_RULES

matplotlib.use("Agg")

Values = npt.NDArray[np.float64]
Key = tuple[int, int]  # split of the data, and seed
ByKey = Mapping[Key, float]
Settings = Mapping[str, Any]  # by `section.name`

NAMES = {
    "plain": "plain",
    "apart": "APART",
    "one_pass": "APART in one pass",
    "apart_sam": "APART-SAM",
    "sam": "SAM",
    "ghost_noise": "ghost noise",
}
ZERO_RADIUS_NAMES = {"apart": "zero radius", "one_pass": "zero radius in one pass"}
SYMBOLS = {"method.epsilon": "ε", "method.rho": "ρ"}
# What a method's bare name stands for; a rule of its own is in OWN_RULES.
ORDINARY = {"method.rule": "sign", "method.label_smoothing": 0.0, "model.dropout": 0.0}
NAMED_ALONE = ("data.name", "data.train_samples", "data.augment")  # in the name of a data set

FILE_WIDTH = 180  # of the printed table where there is no terminal
# Okabe and Ito, without their yellow, which is faint on white: told apart with every kind of colour vision.
COLOURS = ("#0072B2", "#E69F00", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#000000")


class Group(NamedTuple):
    """Runs that differ in split and seed alone."""

    label: str
    settings: Settings
    runs: Mapping[Key, FinishedRun]

    @property
    def epochs(self) -> int:
        """Passes over the training data, whatever a step costs."""
        return int(self.settings["training.epochs"])

    @property
    def passes(self) -> float:
        """Forward-backward passes over the training data: what a run costs."""
        return self.epochs * next(iter(self.runs.values())).passes_per_epoch

    @property
    def is_plain(self) -> bool:
        """Whether it is ordinary training."""
        return bool(self.settings["method.name"] == "plain" and not self.settings["method.label_smoothing"])

    @property
    def errors(self) -> dict[Key, float]:
        """Final error of every run."""
        return {key: run.errors[self.epochs] for key, run in self.runs.items()}

    @property
    def loss(self) -> float:
        """Mean training loss of the last epoch."""
        return sum(run.losses[-1] for run in self.runs.values()) / len(self.runs)


def by_data(runs: Iterable[FinishedRun]) -> dict[str, list[FinishedRun]]:
    """Runs by the name of their data set: `digits`, `cifar10-5000` for a part of it, `cifar10-5000-unaugmented`."""
    found: dict[str, list[FinishedRun]] = {}
    for run in runs:
        name, samples, augment = (run.settings[part] for part in NAMED_ALONE)
        parts = [name, *([str(samples)] if samples else []), *([] if augment else ["unaugmented"])]
        found.setdefault("-".join(parts), []).append(run)
    return found


def group_runs(runs: Iterable[FinishedRun]) -> list[Group]:
    """Put the runs together that differ in split and seed alone."""
    found: dict[str, dict[Key, FinishedRun]] = {}
    for run in sorted(runs, key=_rank):
        members = found.setdefault(json.dumps(run.settings, sort_keys=True), {})
        if run.key in members:
            twins = f"{members[run.key].folder} and {run.folder}"
            raise FolderError(f"{twins} have the same settings, split and seed {run.key}: leave one of them out")
        members[run.key] = run
    settings = [next(iter(members.values())).settings for members in found.values()]
    varied, usual_epochs = varied_settings(settings), base_epochs(settings)
    labels = [label(each, varied, usual_epochs) for each in settings]
    return list(map(Group, labels, settings, found.values()))


def _rank(run: FinishedRun) -> tuple[object, ...]:
    """Where a run stands in the table: by method, epochs, what a bare name stands for, radius and the rest."""
    settings, usual = run.settings, ordinary(run.settings)
    is_unusual = [settings.get(name, usual[name]) != usual[name] for name in ORDINARY]
    radii = (settings.get("method.epsilon", 0), settings.get("method.rho", 0))
    order = (METHODS.index(settings["method.name"]), settings["training.epochs"], is_unusual, *radii)
    return (*order, json.dumps(settings, sort_keys=True), run.key)


def varied_settings(all_settings: Sequence[Settings]) -> list[str]:
    """Which settings have more than one value among those that have them; method and epochs have words of their own."""
    names = dict.fromkeys(name for settings in all_settings for name in settings)
    values = {name: {str(settings[name]) for settings in all_settings if name in settings} for name in names}
    return [name for name in names if len(values[name]) > 1 and name not in ("method.name", "training.epochs")]


def base_epochs(all_settings: Sequence[Settings]) -> int:
    """The length of training that others are multiples of: the shortest of any method but plain training."""
    rivals = [settings for settings in all_settings if settings["method.name"] != "plain"] or all_settings
    return min(int(settings["training.epochs"]) for settings in rivals)


def label(settings: Settings, varied: Sequence[str], usual_epochs: int) -> str:
    """What sets a group apart."""
    method = settings["method.name"]
    parts = [ZERO_RADIUS_NAMES[method] if has_zero_radius(settings) else NAMES[method]]
    usual = ordinary(settings)
    for name in dict.fromkeys((*varied, "method.rule")):
        if name in settings and usual.get(name) != settings[name]:
            parts.append(f"{word(name)} {settings[name]}")
    factor, rest = divmod(settings["training.epochs"], usual_epochs)
    if rest:
        parts.append(f"{settings['training.epochs']} epochs")
    elif factor > 1:
        parts.append(f"{factor}× epochs")
    return ", ".join(parts)


def ordinary(settings: Settings) -> dict[str, Any]:
    """What the bare name of a method stands for; at zero radius, whatever the rule is."""
    usual = ORDINARY | {"method.rule": OWN_RULES.get(settings["method.name"], ORDINARY["method.rule"])}
    idle = ("method.epsilon", "method.rule") if has_zero_radius(settings) else ()
    return usual | {name: settings[name] for name in idle if name in settings}


def has_zero_radius(settings: Settings) -> bool:
    """Whether it is a control: a method of APART that perturbs nothing."""
    return settings["method.name"] in ZERO_RADIUS_NAMES and settings["method.epsilon"] == 0


def machines_of(groups: Sequence[Group]) -> str:
    """What the runs were trained with."""
    return "; ".join(sorted({run.machine for group in groups for run in group.runs.values()}))


def by_text(values: ByKey) -> dict[str, float]:
    """Values by split and seed as JSON has them: `3` for seed 3 of split 0, `1/3` for that of split 1."""
    return {f"{split}/{seed}" if split else f"{seed}": value for (split, seed), value in values.items()}


def by_key(values: Mapping[str, float]) -> dict[Key, float]:
    """What `by_text` made of values, by split and seed again."""
    parts = [(*text.rpartition("/"), value) for text, value in values.items()]
    return {(int(split or 0), int(seed)): value for split, _, seed, value in parts}


def word(setting: str) -> str:
    """A setting in few words: `ε` for method.epsilon, `lr` for training.lr, `model` for model.name."""
    section, _, name = setting.partition(".")
    return SYMBOLS.get(setting) or (section if name == "name" else name.replace("_", " "))


class Estimate(NamedTuple):
    """A mean over seeds, and its standard error, nan for a single one."""

    mean: float
    standard_error: float


class PairedDifference(NamedTuple):
    """The mean of first − second, the ends of its confidence interval, and p that it is zero; nan for a single pair."""

    mean: float
    low: float
    high: float
    p: float = math.nan


def estimate(values: Sequence[float]) -> Estimate:
    """The mean of one value or more."""
    return Estimate(float(np.mean(values)), float(stats.sem(values)) if len(values) > 1 else math.nan)


def paired_difference(first: Sequence[float], second: Sequence[float]) -> PairedDifference:
    """The mean of first − second over one pair or more, with Student's 95 % interval."""
    mean, error = estimate(np.subtract(first, second).tolist())
    half_width = float(stats.t.ppf(0.975, df=len(first) - 1)) * error
    p = float(mean == 0) if error == 0 else 2 * float(stats.t.sf(abs(mean) / error, df=len(first) - 1))
    return PairedDifference(mean, mean - half_width, mean + half_width, p)


def paired_values(first: ByKey, second: ByKey) -> tuple[list[float], list[float]]:
    """Values of the runs that both have: of every seed, or, where there are several splits, the mean of every split."""
    keys = sorted(first.keys() & second.keys())
    splits = sorted({split for split, _ in keys})
    units = [[key] for key in keys] if len(splits) == 1 else [[k for k in keys if k[0] == split] for split in splits]
    both = [[float(np.mean([values[key] for key in unit])) for unit in units] for values in (first, second)]
    return both[0], both[1]


def difference_by_key(first: ByKey, second: ByKey) -> PairedDifference | None:
    """The mean of first − second over the runs that both have; None where they have none in common."""
    both = paired_values(first, second)
    return paired_difference(*both) if both[0] else None


def welch_by_key(first: ByKey, second: ByKey) -> PairedDifference | None:
    """The same with Welch's interval, where pairs share no spread, so do not correlate above 0; None elsewhere."""
    one, other = paired_values(first, second)
    if len(one) < 3 or np.ptp(one) == 0 or np.ptp(other) == 0 or np.corrcoef(one, other)[0, 1] > 0:
        return None
    tested = stats.ttest_ind(one, other, equal_var=False)
    low, high = tested.confidence_interval(0.95)
    return PairedDifference(float(np.mean(one) - np.mean(other)), float(low), float(high), float(tested.pvalue))


def holm(differences: Sequence[PairedDifference | None]) -> list[float]:
    """The p of the differences of a table, by Holm's procedure over its rows; nan where a row is no test."""
    adjusted = [difference.p if difference else math.nan for difference in differences]
    tested = sorted((p, number) for number, p in enumerate(adjusted) if not math.isnan(p))
    largest = 0.0
    for rank, (p, number) in enumerate(tested):
        largest = max(largest, min(1.0, (len(tested) - rank) * p))
        adjusted[number] = largest
    return adjusted


def over_images(differences: Sequence[Values], resamples: int = 2000) -> tuple[float, float]:
    """The 95 % interval of the mean of each split's differences by test image: a bootstrap of splits and images."""
    generator = np.random.default_rng(0)
    table = np.stack(differences)  # (splits, images)
    splits, images = table.shape
    means = np.empty(resamples)
    for number in range(resamples):
        weights = generator.multinomial(splits, np.full(splits, 1 / splits))
        means[number] = (weights @ table / splits)[generator.integers(images, size=images)].mean()
    low, high = np.quantile(means, [0.025, 0.975])
    return 100 * float(low), 100 * float(high)


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
    """By how many points the second errors of each row are below the first, those of plain training; bold by Holm."""
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
