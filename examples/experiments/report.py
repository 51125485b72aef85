"""The pages of results: a `report` on finished runs, the `evidence` that validation data choose, and its `appendix`.

A report is a table and learning curves. Evidence is the numbers of every seed, a file for each data set, and the
appendix is one page with the tables of them all.
"""

from __future__ import annotations

import itertools
import json
import shlex
import statistics
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, TypeVar

import matplotlib.pyplot as plt
import numpy as np
import tyro
from cycler import cycler
from matplotlib.ticker import LogLocator

from experiments import analysis
from experiments.analysis import Group, ResultTable, bold, estimate, format_error, format_gain, markdown, show, word
from experiments.evaluate import EVALUATION, evaluate_all, read_evaluation
from experiments.evaluate import Options as Measurement
from experiments.runs import FinishedRun, FolderError, find_finished, is_fitted, read_run

Folders = Annotated[tuple[Path, ...], tyro.conf.Positional]
Entry = TypeVar("Entry", bound=Mapping[str, Any])  # a candidate of a method, as evidence writes it

GUESSED_CLASSES = {"cifar100": 100, "tiny-imagenet": 200, "imagenet": 1000}
DECAY = "training.weight_decay"
STYLES = cycler(linestyle=["-", "--", ":"]) * cycler(color=analysis.COLOURS)
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

RADII = ("method.epsilon", "method.rho")  # are told even where there is one
ERRORS = ("validation error %", "test error %")
EVIDENCE_COLUMNS = ("method", "chosen", "runs", "passes", *ERRORS, "gain", "without pairs", "p, Holm")
ABOUT = ("method", "chosen", "is_chosen", "at the edge", "passes", "settings", *ERRORS)  # what else is measured is not
# What is chosen on validation data.
OWN = ("epsilon", "rho", "groups", "clean_fraction", "ghost_size", "label_smoothing")
CHOSEN = (*(f"method.{name}" for name in OWN), DECAY)
TITLE = """# Results in detail

What [the page of results](../RESULTS.md) is drawn from: a section for each set of numbers beside this page, written by
`python -m experiments appendix results`. [commands.sh](commands.sh) has the commands that trained the networks.

Means over runs, ± standard error. Of each method's candidates with the most runs (others were dropped in a search)
that of the lowest mean validation error over all of them was chosen; test images had no part in it. (At the edge: the
smallest or largest value that was tried, so that the best may lie beyond.) *Gain*: by how many points the test error
is lower than that of the plain training that validation chose, of whatever decay, smoothing and length, within seeds;
Student's 95 % interval over seeds, or over splits where there are several. In bold where p by Holm's procedure over
the rows of a table is below 0.05. *Without pairs*: Welch's interval, where seeds do not correlate above zero. Passes
are forward-backward passes over the training data. One run has no interval and shows nothing.
"""


# The report.


@dataclass(frozen=True)
class ReportOptions:
    """Compare finished runs, method by method: `python -m experiments report runs/*`.

    Runs that differ in split and seed alone are one row of the table. Within seeds, every row is set against plain
    training of its own settings, against that for twice the epochs, and against plain training of any other weight
    decay. For each data set the table is printed and written as Markdown, and the learning curves are drawn. A folder
    that holds run folders stands for all of them.
    """

    folders: Folders  # run folders, and folders of run folders.
    # whose error: settings are chosen on validation data, results stated on test data.
    measure_on: Literal["test", "validation"] = "test"
    # folder for tables (.md), the errors of every seed (.json) and figures (.png), named after the data.
    out: Path = Path("runs/report")


def report_main(arguments: Sequence[str]) -> None:
    """Report on every data set among the runs."""
    options = tyro.cli(ReportOptions, args=arguments, prog="python -m experiments report")
    found = [read_run(folder, options.measure_on) for folder in find_finished(options.folders)]
    for data, runs in analysis.by_data(found).items():
        report(data, runs, options.measure_on, options.out / f"{data}-{options.measure_on}")


def report(data: str, runs: Sequence[FinishedRun], measure_on: str, stem: Path) -> None:
    """Print and write the table of one data set, and draw its curves."""
    groups = analysis.group_runs(runs)
    title = f"{data}: {measure_on} error"
    table = table_of(groups, title)
    errors = [
        {"label": each.label, "settings": each.settings, "errors": analysis.by_text(each.errors)} for each in groups
    ]
    show(markdown(table))
    _write_json(stem.with_suffix(".json"), {"notes": table.notes, "groups": errors})
    stem.with_suffix(".md").write_text(markdown(table), encoding="utf-8")
    draw_curves(stem.with_suffix(".png"), groups, title)
    print(f"Written: {stem}.md, .png, .json")


def _write_json(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(content, indent=2, ensure_ascii=False, default=str)
    path.write_text(text + "\n", encoding="utf-8")


def table_of(groups: Sequence[Group], title: str) -> ResultTable:
    """The table of one data set."""
    tuned = other_decays(groups)
    opponents = [[plain_training(groups, group, factor) for group in groups] for factor in GAINS.values()]
    opponents += [[None if plain is group else plain for group in groups] for plain in tuned]
    columns = [
        analysis.gains([(plain and plain.errors, group.errors) for plain, group in zip(column, groups, strict=True)])
        for column in opponents
    ]
    rows = [
        [
            group.label,
            str(len(group.runs)),
            f"{group.passes:g}",
            _step_time(group, plain or group),
            f"{group.loss:.4f}",
            format_error(estimate(list(group.errors.values()))),
            *of_group,
        ]
        for group, plain, *of_group in zip(groups, opponents[0], *columns, strict=True)
    ]
    settings = f" Shared settings: {shared_settings(groups)}. Trained with {analysis.machines_of(groups)}."
    names = (*COLUMNS, *GAINS, *(f"gain on {plain.label}" for plain in tuned))
    return ResultTable(title, names, rows, EXPLANATION + unconverged(groups) + settings)


def plain_training(groups: Sequence[Group], group: Group, factor: int) -> Group | None:
    """The plain training that a group is set against: everything but the method is the same."""
    alike = {plain.epochs: plain for plain in groups if plain.is_plain and _frame(plain) == _frame(group)}
    plain = alike.get(factor * (min(alike) if group.is_plain else group.epochs))
    return None if plain is group else plain


def _frame(group: Group) -> dict[str, Any]:
    own = ("method.", "training.epochs")
    return {name: value for name, value in group.settings.items() if not name.startswith(own)}


def other_decays(groups: Sequence[Group]) -> list[Group]:
    """Plain training, not prolonged, whose weight decay is not that of most rows: tuned, it is what is to be beaten."""
    usual = Counter(group.settings[DECAY] for group in groups).most_common(1)[0][0]
    shortest = analysis.base_epochs([group.settings for group in groups])
    return [group for group in groups if group.is_plain and group.epochs == shortest and group.settings[DECAY] != usual]


def _step_time(group: Group, plain: Group) -> str:
    keys = group.runs.keys() & plain.runs.keys()
    ratios = [group.runs[key].step_seconds / plain.runs[key].step_seconds for key in keys]
    return f"{statistics.median(ratios):.2f} ×" if ratios else ""


def unconverged(groups: Sequence[Group]) -> str:
    """A sentence on plain training, not cut short, that has not fitted its samples; nothing where all has."""
    usual_epochs = analysis.base_epochs([group.settings for group in groups])
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
    all_settings = [group.settings for group in groups]
    varied = {*analysis.NAMED_ALONE, "method.name", *analysis.varied_settings(all_settings)}
    settings = {name: value for each in all_settings for name, value in each.items() if name not in varied}
    settings["training.epochs"] = analysis.base_epochs(all_settings)
    usual = [name for name, value in settings.items() if value is None or analysis.ORDINARY.get(name) == value]
    return ", ".join(f"{word(name)} {value}" for name, value in sorted(settings.items()) if name not in usual)


def draw_curves(path: Path, groups: Sequence[Group], title: str) -> None:
    """Draw mean errors against the passes they have cost, with a band of one standard error."""
    last = {group.label: estimate(list(group.errors.values())).mean for group in groups}
    shown = sorted(last, key=lambda label: last[label])[:MOST_CURVES]
    figure, axes = plt.subplots(figsize=(10, 5), layout="constrained")
    axes.set_prop_cycle(STYLES)
    for group in (each for each in groups if each.label in shown):
        first, *_ = runs = list(group.runs.values())
        passes = [epoch * first.passes_per_epoch for epoch in first.errors]
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


# The evidence.


@dataclass(frozen=True)
class EvidenceOptions:
    """Methods with what validation data choose: `python -m experiments evidence runs/* --evaluate`.

    Where a method was trained at several radii, sizes or weight decays, that of the lowest validation error is chosen;
    test data have no part in it. Only what was chosen is measured by `evaluate`. The numbers of every seed are written,
    a file for each data set, and `appendix` makes the tables of them.
    """

    folders: Folders  # run folders, and folders of run folders.
    evaluate: tyro.conf.FlagCreatePairsOff[bool] = False  # first measure the chosen runs that have not been measured.
    errors_only: tyro.conf.FlagCreatePairsOff[bool] = False  # errors alone, for which no run need be measured.
    samples: int = Measurement.samples  # test samples that accuracies under a shift are then measured on, at most.
    processes: int = Measurement.processes  # that then measure at the same time, with one thread each.
    out: Path = Path("runs/evidence")  # folder for the numbers of every seed, a file named after each data set.


def evidence_main(arguments: Sequence[str]) -> None:
    """Choose, measure and write, for every data set among the runs."""
    options = tyro.cli(EvidenceOptions, args=arguments, prog="python -m experiments evidence")
    folders = find_finished(options.folders)
    test, validation = (
        analysis.by_data(read_run(folder, split) for folder in folders) for split in ("test", "validation")
    )
    for data in test:
        write_evidence(data, analysis.group_runs(test[data]), analysis.group_runs(validation[data]), options)


def write_evidence(data: str, test: Sequence[Group], validation: Sequence[Group], options: EvidenceOptions) -> None:
    """Choose, measure, write the numbers of one data set, and print their tables."""
    if not any(group.is_plain for group in test):
        raise FolderError(f"no plain training among the runs on {data}: expected what every method is set against")
    families = candidates_of(test, validation)
    chosen = [choose(family) for family in families]
    if not options.errors_only:
        measure(data, chosen, options)
    entries = [each.entry for family in families for each in family]
    path = options.out / f"{data}-evidence.json"
    _write_json(path, {"environment": analysis.machines_of(test), "groups": entries})
    show(section(path))
    print(f"Written: {path}")
    for entry in (each.entry for each in chosen):
        for name, edge in entry["at the edge"].items():
            print(f"warning: {data}, {entry['method']}: {name} {edge} is at the edge; the best may lie beyond")


class Candidate(NamedTuple):
    """Runs that validation data may choose: what is written of them, and the runs."""

    entry: dict[str, Any]
    group: Group


def candidates_of(test: Sequence[Group], validation: Sequence[Group]) -> list[list[Candidate]]:
    """Groups by method: they differ in what is chosen alone. Zero radius and label smoothing make one of their own."""
    all_settings = [group.settings for group in test]
    varied, usual_epochs = analysis.varied_settings(all_settings), analysis.base_epochs(all_settings)
    told_apart = [name for name in varied if name not in CHOSEN]
    families: dict[str, list[Candidate]] = {}
    for group, validated in zip(test, validation, strict=True):
        settings = group.settings
        smoothed = bool(settings["method.label_smoothing"])
        rest = {name: value for name, value in settings.items() if name not in CHOSEN}
        key = json.dumps([rest, smoothed, analysis.has_zero_radius(settings)], sort_keys=True)
        told = [name for name in CHOSEN if name in settings and (name in RADII or name in varied)]
        told = [name for name in told if smoothed or name != "method.label_smoothing"]
        entry = {
            "method": analysis.label(settings, told_apart, usual_epochs) + ", label smoothing" * smoothed,
            "chosen": ", ".join(f"{word(name)} {settings[name]:g}" for name in told),
            "is_chosen": False,
            "passes": group.passes,
            "settings": settings,
            "at the edge": {},
            "validation error %": analysis.by_text(validated.errors),
            "test error %": analysis.by_text(group.errors),
        }
        families.setdefault(key, []).append(Candidate(entry, group))
    return list(families.values())


def choose(family: Sequence[Candidate]) -> Candidate:
    """Mark the candidate that validation data choose."""
    entries = [each.entry for each in family]
    best = chosen_of(entries)
    best |= {"is_chosen": True, "at the edge": edges_of(best["settings"], [each["settings"] for each in entries])}
    return next(each for each in family if each.entry is best)


def chosen_of(entries: Sequence[Entry]) -> Entry:
    """Of the candidates with the most runs (others were dropped), the first of the lowest mean validation error."""
    most = max(len(entry["validation error %"]) for entry in entries)
    return min((entry for entry in entries if len(entry["validation error %"]) == most), key=validation_error)


def validation_error(entry: Mapping[str, Any]) -> float:
    """The mean over all runs."""
    return float(np.mean(list(entry["validation error %"].values())))


def edges_of(chosen: Mapping[str, Any], candidates: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Which chosen settings are the smallest or largest that were tried, 0 aside: the best may lie beyond them."""
    found = {}
    for name in CHOSEN:
        values = sorted({settings[name] for settings in candidates if name in settings})
        value = chosen.get(name)
        if len(values) > 1 and (value == values[-1] or value == values[0] != 0):
            found[word(name)] = f"{value:g} of {values[0]:g} to {values[-1]:g}"
    return found


def measure(data: str, chosen: Sequence[Candidate], options: EvidenceOptions) -> None:
    """See to it that the chosen runs have been measured, and add what was found."""
    folders = [run.folder for each in chosen for run in each.group.runs.values()]
    if options.evaluate:
        evaluate_all(folders, Measurement(tuple(folders), samples=options.samples, processes=options.processes))
    missing = [str(folder) for folder in folders if not (folder / EVALUATION).is_file()]
    if missing:
        raise FolderError(
            f"{len(missing)} of {len(folders)} chosen runs on {data} have not been measured (no {EVALUATION}): "
            f"--evaluate does it, and so does\n  python -m experiments evaluate {shlex.join(missing)}"
        )
    for each in chosen:
        each.entry.update(measured(each.group))


def measured(group: Group) -> dict[str, dict[str, float]]:
    """What `evaluate` has found, by name, and by split and seed."""
    found = {key: read_evaluation(run.folder) for key, run in group.runs.items()}
    figures: dict[str, Callable[[Any], float]] = {
        "error by exact statistics %": lambda of: of["exact_error"],
        "fits %": lambda of: 100 - of["train_error"],
        "training loss": lambda of: of["train_loss"],
        "ECE %": lambda of: of["ece"],
        "area, random %": lambda of: of["area"]["random"],
        "area, adversarial %": lambda of: of["area"]["adversarial"],
        "corruption error %": lambda of: float(np.mean(list(of["corruptions"].values()))),
    }
    return {name: analysis.by_text({key: figure(of) for key, of in found.items()}) for name, figure in figures.items()}


# The appendix.


@dataclass(frozen=True)
class AppendixOptions:
    """Results in detail, from the numbers of every seed: `python -m experiments appendix results`.

    It writes results/README.md. Each `*-evidence.json` of the folder, which `evidence` wrote, becomes a section: every
    method with what validation data chose, against the plain training that they chose; and what was chosen from. Each
    `*-budget.md` is one as it is.
    """

    folder: Annotated[Path, tyro.conf.Positional]  # where the numbers are, and README.md is to be.
    picture: str | None = None  # the set of numbers of which decays.png is drawn: the error over the weight decay.


def appendix_main(arguments: Sequence[str]) -> None:
    """Write the appendix of a folder of results."""
    options = tyro.cli(AppendixOptions, args=arguments, prog="python -m experiments appendix")
    folder = options.folder
    sections = [section(path) for path in sorted(folder.glob("*-evidence.json"))]
    for path in sorted(folder.glob("*-budget.md")):
        sections.append(f"## {path.stem}\n\n{path.read_text(encoding='utf-8').strip()}")
    (folder / "README.md").write_text("\n\n".join([TITLE.strip(), *sections]) + "\n", encoding="utf-8")
    if options.picture is not None:
        content = json.loads((folder / f"{options.picture}-evidence.json").read_text(encoding="utf-8"))
        draw_decays(folder / "decays.png", content["groups"])
    print(f"Written: {folder / 'README.md'}")


def section(path: Path) -> str:
    """The section of one file of numbers."""
    content = json.loads(path.read_text(encoding="utf-8"))
    entries, name = content["groups"], path.stem.removesuffix("-evidence")
    settings = f"Settings: {settings_of_all(entries)}. Trained with {content['environment']}."
    parts = [f"## {name}", settings, *map(markdown, tables_of(name, entries)), chosen_from(entries)]
    return "\n\n".join(part.strip() for part in parts if part)


def tables_of(name: str, entries: Sequence[Mapping[str, Any]]) -> list[ResultTable]:
    """The tables of a set: errors, and what else was measured, if anything was."""
    methods = by_method(entries)
    chosen = {method: chosen_of(found) for method, found in methods.items()}
    plain = chosen_of([entry for method, entry in chosen.items() if method.startswith("plain")])
    pairs = [[analysis.by_key(each["test error %"]) for each in (plain, entry)] for entry in chosen.values()]
    differences = [
        None if entry is plain else analysis.difference_by_key(*two)
        for entry, two in zip(chosen.values(), pairs, strict=True)
    ]
    adjusted = analysis.holm(differences)
    rows = []
    for entry, difference, two, p in zip(chosen.values(), differences, pairs, adjusted, strict=True):
        edges = edges_of(entry["settings"], [each["settings"] for each in methods[entry["method"]]])
        at_edge = f" (at the edge: {', '.join(edges)})" if edges else ""
        cells = [entry["method"], entry["chosen"] + at_edge, str(len(two[1])), f"{entry['passes']:g}"]
        cells += [mean_of(entry, figure) for figure in ERRORS]
        cells += [bold(format_gain(difference), p < 0.05)]
        cells += [format_gain(analysis.welch_by_key(*two) if difference else None)]
        rows.append([*cells, "" if np.isnan(p) else f"{p:.2g}"])
    tables = [ResultTable(f"{name}: test error", EVIDENCE_COLUMNS, rows)]
    if figures := [figure for figure in plain if figure not in ABOUT]:
        rows = [[method, *(mean_of(entry, figure) for figure in figures)] for method, entry in chosen.items()]
        tables.append(ResultTable(f"{name}: what the chosen networks withstand", ("method", *figures), rows))
    return tables


def by_method(entries: Sequence[Entry]) -> dict[str, list[Entry]]:
    """The candidates of every method."""
    methods: dict[str, list[Entry]] = {}
    for entry in entries:
        methods.setdefault(entry["method"], []).append(entry)
    return methods


def mean_of(entry: Mapping[str, Any], figure: str) -> str:
    """A figure's mean and standard error."""
    return format_error(estimate(list(entry[figure].values()))) if entry.get(figure) else ""


def chosen_from(entries: Sequence[Mapping[str, Any]]) -> str:
    """What was chosen from, a line for each method: validation error and runs."""
    lines = []
    for method, found in by_method(entries).items():
        texts = [f"{e['chosen']}: {mean_of(e, ERRORS[0])} ({len(e[ERRORS[0]])})" for e in found]
        lines += [f"- {method}: {'; '.join(texts)}"] if len(texts) > 1 else []
    return "\n".join(["Chosen from, by validation error % (runs):", "", *lines]) if lines else ""


def settings_of_all(entries: Sequence[Mapping[str, Any]]) -> str:
    """The settings that all have."""
    first, *others = [entry["settings"] for entry in entries]
    names = [name for name, value in first.items() if not name.startswith("method.") and value is not None]
    same = [name for name in names if all(str(other.get(name)) == str(first[name]) for other in others)]
    return ", ".join(f"{word(name)} {first[name]}" for name in same)


def draw_decays(path: Path, entries: Sequence[Mapping[str, Any]]) -> None:
    """Draw errors over the weight decay, with a circle where validation data chose it; what diverges leaves the top."""
    curves = {method: curve for method, found in by_method(entries).items() if len(curve := over_decays(found)) > 1}
    chosen = {method: chosen_of(found)["settings"][DECAY] for method, found in by_method(entries).items()}
    decays = sorted({decay for curve in curves.values() for decay in curve})
    figure, axes = plt.subplots(figsize=(4.6, 5.2), layout="constrained")
    for (method, curve), colour in zip(curves.items(), itertools.cycle(analysis.COLOURS), strict=False):
        means, errors = zip(*curve.values(), strict=True)
        axes.errorbar(list(curve), means, errors, label=method, color=colour, capsize=2)
        at = chosen[method]
        axes.plot(at, curve[at].mean, "o", markersize=9, markerfacecolor="none", color=colour)
    title = entries[0]["settings"]["data.name"]
    axes.set(title=title, xlabel="weight decay", ylabel="test error (%)", xscale="log")
    axes.set_xticks(decays, [f"{decay:g}" for decay in decays])
    axes.set_xticks([], minor=True)
    axes.set_ylim(bottom=0, top=2 * max(curve[chosen[method]].mean for method, curve in curves.items()))
    axes.legend(frameon=False, fontsize="small", loc="upper center", bbox_to_anchor=(0.5, -0.13))
    figure.savefig(path, dpi=110)
    plt.close(figure)


def over_decays(entries: Sequence[Mapping[str, Any]]) -> dict[float, analysis.Estimate]:
    """The test error of a method over its weight decay: at each, that of the candidate of lowest validation error."""
    best: dict[float, Mapping[str, Any]] = {}
    for entry in sorted(entries, key=validation_error):
        best.setdefault(entry["settings"][DECAY], entry)
    return {decay: estimate(list(best[decay]["test error %"].values())) for decay in sorted(best)}
