"""Compare finished runs, method by method: `python -m experiments report runs/*`.

Runs that differ in split and seed alone are one row of the table. Within seeds, every row is set against plain training
of its own settings, against that for twice the epochs, and against plain training of any other weight decay. For each
data set the table is printed and written as Markdown, and the learning curves are drawn. A folder that holds run
folders stands for all of them.
"""

from __future__ import annotations

import json
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import tyro
from cycler import cycler
from matplotlib.ticker import LogLocator

from experiments.methods import OWN_RULES
from experiments.paired import ByKey, Key, estimate
from experiments.runs import METHODS, FinishedRun, FolderError, find_finished, is_fitted, read_run
from experiments.tables import COLOURS, ResultTable, format_error, gains, markdown, show

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
ORDINARY = {
    "method.rule": "sign",
    "method.label_smoothing": 0.0,
    "model.dropout": 0.0,
}
NAMED_ALONE = ("data.name", "data.train_samples", "data.augment")  # in the name of a data set
GUESSED_CLASSES = {"cifar100": 100, "tiny-imagenet": 200, "imagenet": 1000}
DECAY = "training.weight_decay"
STYLES = cycler(linestyle=["-", "--", ":"]) * cycler(color=COLOURS)
MOST_CURVES = 12  # more cannot be told apart
COLUMNS = ("method", "runs", "passes", "time a step", "training loss", "error %")
GAINS = {"gain on plain": 1, "gain on plain, 2× epochs": 2}  # by column: how often the epochs
EXPLANATION = (
    "Means over runs, ± standard error. A gain is by how many points the error is lower, within seeds, with its 95 % "
    "interval (over splits, where there are several), in bold where it is clear of zero by Holm's procedure over the "
    "rows. Passes are forward-backward passes over the training data; the time of a step is this machine's, as a "
    "multiple of plain training's on the same seed (median). The training loss is that of the last epoch on training "
    "batches, without perturbation."
)


@dataclass(frozen=True)
class Options:
    """What is compared."""

    folders: Annotated[tuple[Path, ...], tyro.conf.Positional]  # run folders, and folders of run folders.
    # whose error: settings are chosen on validation data, results stated on test data.
    measure_on: Literal["test", "validation"] = "test"
    # folder for tables (.md), the errors of every seed (.json) and figures (.png), named after the data.
    out: Path = Path("runs/report")


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
    def passes_per_epoch(self) -> float:
        """Forward-backward passes in an epoch."""
        return next(iter(self.runs.values())).passes_per_epoch

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


def plain_training(groups: Sequence[Group], group: Group, factor: int) -> Group | None:
    """The plain training that a group is set against: everything but the method is the same."""
    alike = {plain.epochs: plain for plain in groups if plain.is_plain and _frame(plain) == _frame(group)}
    plain = alike.get(factor * (min(alike) if group.is_plain else group.epochs))
    return None if plain is group else plain


def _frame(group: Group) -> Settings:
    own = ("method.", "training.epochs")
    return {name: value for name, value in group.settings.items() if not name.startswith(own)}


def unconverged(groups: Sequence[Group]) -> str:
    """A sentence on plain training, not cut short, that has not fitted its samples; nothing where all has."""
    usual_epochs = base_epochs([group.settings for group in groups])
    losses = [
        f"{group.loss:.3f} after {group.epochs} epochs"
        for group in groups
        if group.is_plain and group.epochs >= usual_epochs
        if not is_fitted(group.loss, 0.0, GUESSED_CLASSES.get(group.settings["data.name"], 10))
    ]
    if not losses:
        return ""
    return f" **Plain training has not converged here** (training loss {', '.join(losses)}), so perturbations may harm."


def shared_settings(groups: Sequence[Group]) -> str:
    """The settings that are the same in all groups that have them."""
    varied = {*NAMED_ALONE, "method.name", *varied_settings([group.settings for group in groups])}
    settings = {name: value for group in groups for name, value in group.settings.items() if name not in varied}
    settings["training.epochs"] = base_epochs([group.settings for group in groups])
    usual = [name for name, value in settings.items() if value is None or ORDINARY.get(name) == value]
    return ", ".join(f"{word(name)} {value}" for name, value in sorted(settings.items()) if name not in usual)


def machines_of(groups: Sequence[Group]) -> str:
    """What the runs were trained with."""
    return "; ".join(sorted({run.machine for group in groups for run in group.runs.values()}))


def by_text(values: ByKey) -> dict[str, float]:
    """Values by split and seed as JSON has them: `3` for seed 3 of split 0, `1/3` for that of split 1."""
    return {f"{split}/{seed}" if split else f"{seed}": value for (split, seed), value in values.items()}


def word(setting: str) -> str:
    """A setting in few words: `ε` for method.epsilon, `lr` for training.lr, `model` for model.name."""
    section, _, name = setting.partition(".")
    return SYMBOLS.get(setting) or (section if name == "name" else name.replace("_", " "))


def table_of(groups: Sequence[Group], title: str) -> ResultTable:
    """The table of one data set."""
    tuned = other_decays(groups)
    opponents = [[plain_training(groups, group, factor) for group in groups] for factor in GAINS.values()]
    opponents += [[None if plain is group else plain for group in groups] for plain in tuned]
    columns = [
        gains([(plain and plain.errors, group.errors) for plain, group in zip(column, groups, strict=True)])
        for column in opponents
    ]
    rows = [
        [
            group.label,
            str(len(group.runs)),
            f"{group.epochs * group.passes_per_epoch:g}",
            _step_time(group, plain or group),
            f"{group.loss:.4f}",
            format_error(estimate(list(group.errors.values()))),
            *of_group,
        ]
        for group, plain, *of_group in zip(groups, opponents[0], *columns, strict=True)
    ]
    settings = f" Shared settings: {shared_settings(groups)}. Trained with {machines_of(groups)}."
    names = (*COLUMNS, *GAINS, *(f"gain on {plain.label}" for plain in tuned))
    return ResultTable(title, names, rows, EXPLANATION + unconverged(groups) + settings)


def other_decays(groups: Sequence[Group]) -> list[Group]:
    """Plain training, not prolonged, whose weight decay is not that of most rows: tuned, it is what is to be beaten."""
    usual = Counter(group.settings[DECAY] for group in groups).most_common(1)[0][0]
    shortest = base_epochs([group.settings for group in groups])
    return [group for group in groups if group.is_plain and group.epochs == shortest and group.settings[DECAY] != usual]


def _step_time(group: Group, plain: Group) -> str:
    keys = group.runs.keys() & plain.runs.keys()
    ratios = [group.runs[key].step_seconds / plain.runs[key].step_seconds for key in keys]
    return f"{statistics.median(ratios):.2f} ×" if ratios else ""


def draw(path: Path, groups: Sequence[Group], title: str) -> None:
    """Draw mean errors against the passes they have cost, with a band of one standard error."""
    last = {group.label: estimate(list(group.errors.values())).mean for group in groups}
    shown = sorted(last, key=lambda label: last[label])[:MOST_CURVES]
    figure, axes = plt.subplots(figsize=(10, 5), layout="constrained")
    axes.set_prop_cycle(STYLES)
    for group in (each for each in groups if each.label in shown):
        first, *_ = runs = list(group.runs.values())
        passes = [epoch * group.passes_per_epoch for epoch in first.errors]
        errors = np.array([list(run.errors.values()) for run in runs])
        mean = errors.mean(axis=0)
        (line,) = axes.plot(passes, mean, label=group.label, marker="o" if len(passes) < 3 else "")
        if len(errors) > 1:
            error = errors.std(axis=0, ddof=1) / len(errors) ** 0.5
            axes.fill_between(passes, mean - error, mean + error, color=line.get_color(), alpha=0.2, linewidth=0)
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("")
    of_how_many = f", the lowest {len(shown)} of {len(groups)}" if len(shown) < len(groups) else ""
    axes.set(title=f"Learning curves{of_how_many}: mean ± standard error", ylabel=f"{title} (%)")
    axes.set(xlabel="forward-backward passes over the training data")
    axes.legend(frameon=False, fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path, dpi=80)
    plt.close(figure)


def report(data: str, runs: Sequence[FinishedRun], measure_on: str, stem: Path) -> None:
    """Print and write the table of one data set, and draw its curves."""
    groups = group_runs(runs)
    title = f"{data}: {measure_on} error"
    table = table_of(groups, title)
    errors = [{"label": each.label, "settings": each.settings, "errors": by_text(each.errors)} for each in groups]
    show(markdown(table))
    stem.parent.mkdir(parents=True, exist_ok=True)
    stem.with_suffix(".md").write_text(markdown(table), encoding="utf-8")
    content = json.dumps({"notes": table.notes, "groups": errors}, indent=2, ensure_ascii=False, default=str)
    stem.with_suffix(".json").write_text(content + "\n", encoding="utf-8")
    draw(stem.with_suffix(".png"), groups, title)
    print(f"Written: {stem}.md, .png, .json")


def main(arguments: Sequence[str]) -> None:
    """Report on every data set among the runs."""
    options = tyro.cli(Options, args=arguments, prog="python -m experiments report", description=__doc__)
    found = [read_run(folder, options.measure_on) for folder in find_finished(options.folders)]
    for data, runs in by_data(found).items():
        report(data, runs, options.measure_on, options.out / f"{data}-{options.measure_on}")
