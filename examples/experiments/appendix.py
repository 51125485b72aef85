"""Results in detail, from the numbers of every seed: `python -m experiments appendix results` writes results/README.md.

Each `*-evidence.json` of the folder, which `evidence` wrote, becomes a section: every method with what validation data
chose, against the plain training that they chose; and what was chosen from. Each `*-budget.md` is one as it is.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

import matplotlib.pyplot as plt
import numpy as np
import tyro

from experiments.paired import Estimate, Key, difference_by_key, estimate, holm, welch_by_key
from experiments.report import DECAY, word
from experiments.tables import COLOURS, ResultTable, bold, format_error, format_gain, markdown

Entry = TypeVar("Entry", bound=Mapping[str, Any])

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
ERRORS = ("validation error %", "test error %")
COLUMNS = ("method", "chosen", "runs", "passes", *ERRORS, "gain", "without pairs", "p, Holm")
ABOUT = ("method", "chosen", "is_chosen", "at the edge", "passes", "settings", *ERRORS)  # what else is measured is not
# What is chosen on validation data.
OWN = ("epsilon", "rho", "groups", "clean_fraction", "ghost_size", "label_smoothing")
CHOSEN = (*(f"method.{name}" for name in OWN), DECAY)


@dataclass(frozen=True)
class Options:
    """What is written."""

    folder: Annotated[Path, tyro.conf.Positional]  # where the numbers are, and README.md is to be.
    picture: str | None = None  # the set of numbers of which decays.png is drawn: the error over the weight decay.


def values_of(entry: Mapping[str, Any], figure: str) -> dict[Key, float]:
    """A figure of every run, by split and seed: the key `1/3` is that of seed 3 of split 1."""
    keys = {key: tuple(map(int, key.split("/"))) for key in entry[figure]}
    return {(0, *parts)[-2:]: entry[figure][key] for key, parts in keys.items()}  # type: ignore[misc]  # of one number or two, always two are left


def mean_of(entry: Mapping[str, Any], figure: str) -> str:
    """A figure's mean and standard error."""
    return format_error(estimate(list(entry[figure].values()))) if entry.get(figure) else ""


def validation_error(entry: Mapping[str, Any]) -> float:
    """The mean over all runs."""
    return float(np.mean(list(entry["validation error %"].values())))


def chosen_of(entries: Sequence[Entry]) -> Entry:
    """Of the candidates with the most runs (others were dropped), the first of the lowest mean validation error."""
    most = max(len(entry["validation error %"]) for entry in entries)
    return min((entry for entry in entries if len(entry["validation error %"]) == most), key=validation_error)


def edges_of(chosen: Mapping[str, Any], candidates: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Which chosen settings are the smallest or largest that were tried, 0 aside: the best may lie beyond them."""
    found = {}
    for name in CHOSEN:
        values = sorted({settings[name] for settings in candidates if name in settings})
        value = chosen.get(name)
        if len(values) > 1 and (value == values[-1] or value == values[0] != 0):
            found[word(name)] = f"{value:g} of {values[0]:g} to {values[-1]:g}"
    return found


def by_method(entries: Sequence[Entry]) -> dict[str, list[Entry]]:
    """The candidates of every method."""
    methods: dict[str, list[Entry]] = {}
    for entry in entries:
        methods.setdefault(entry["method"], []).append(entry)
    return methods


def tables_of(name: str, entries: Sequence[Mapping[str, Any]]) -> list[ResultTable]:
    """The tables of a set: errors, and what else was measured, if anything was."""
    methods = by_method(entries)
    chosen = {method: chosen_of(found) for method, found in methods.items()}
    plain = chosen_of([entry for method, entry in chosen.items() if method.startswith("plain")])
    pairs = [(values_of(plain, "test error %"), values_of(entry, "test error %")) for entry in chosen.values()]
    rivals = [entry is not plain for entry in chosen.values()]
    differences = [difference_by_key(*both) if rival else None for rival, both in zip(rivals, pairs, strict=True)]
    rows = []
    for entry, difference, both, p in zip(chosen.values(), differences, pairs, holm(differences), strict=True):
        edges = edges_of(entry["settings"], [each["settings"] for each in methods[entry["method"]]])
        at_edge = f" (at the edge: {', '.join(edges)})" if edges else ""
        cells = [entry["method"], entry["chosen"] + at_edge, str(len(both[1])), f"{entry['passes']:g}"]
        cells += [mean_of(entry, figure) for figure in ERRORS]
        cells += [bold(format_gain(difference), p < 0.05), format_gain(welch_by_key(*both) if difference else None)]
        rows.append([*cells, "" if np.isnan(p) else f"{p:.2g}"])
    tables = [ResultTable(f"{name}: test error", COLUMNS, rows)]
    if figures := [figure for figure in plain if figure not in ABOUT]:
        rows = [[method, *(mean_of(entry, figure) for figure in figures)] for method, entry in chosen.items()]
        tables.append(ResultTable(f"{name}: what the chosen networks withstand", ("method", *figures), rows))
    return tables


def chosen_from(entries: Sequence[Mapping[str, Any]]) -> str:
    """What was chosen from, a line for each method: validation error and runs."""
    lines = []
    for method, found in by_method(entries).items():
        texts = [f"{e['chosen']}: {mean_of(e, ERRORS[0])} ({len(e[ERRORS[0]])})" for e in found]
        lines += [f"- {method}: {'; '.join(texts)}"] if len(texts) > 1 else []
    return "\n".join(["Chosen from, by validation error % (runs):", "", *lines]) if lines else ""


def shared_settings_of(entries: Sequence[Mapping[str, Any]]) -> str:
    """The settings that all have."""
    first, *others = [entry["settings"] for entry in entries]
    names = [name for name, value in first.items() if not name.startswith("method.") and value is not None]
    same = [name for name in names if all(str(other.get(name)) == str(first[name]) for other in others)]
    return ", ".join(f"{word(name)} {first[name]}" for name in same)


def section(path: Path) -> str:
    """The section of one file of numbers."""
    content = json.loads(path.read_text(encoding="utf-8"))
    entries, name = content["groups"], path.stem.removesuffix("-evidence")
    settings = f"Settings: {shared_settings_of(entries)}. Trained with {content['environment']}."
    parts = [f"## {name}", settings, *map(markdown, tables_of(name, entries)), chosen_from(entries)]
    return "\n\n".join(part.strip() for part in parts if part)


def draw(entries: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw errors over the weight decay, with a circle where validation data chose it; what diverges leaves the top."""
    curves = {method: curve for method, found in by_method(entries).items() if len(curve := over_decays(found)) > 1}
    chosen = {method: chosen_of(found)["settings"][DECAY] for method, found in by_method(entries).items()}
    decays = sorted({decay for curve in curves.values() for decay in curve})
    figure, axes = plt.subplots(figsize=(4.6, 5.2), layout="constrained")
    for (method, curve), colour in zip(curves.items(), itertools.cycle(COLOURS), strict=False):
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


def over_decays(entries: Sequence[Mapping[str, Any]]) -> dict[float, Estimate]:
    """The test error of a method over its weight decay: at each, that of the candidate of lowest validation error."""
    best: dict[float, Mapping[str, Any]] = {}
    for entry in sorted(entries, key=validation_error):
        best.setdefault(entry["settings"][DECAY], entry)
    return {decay: estimate(list(best[decay]["test error %"].values())) for decay in sorted(best)}


def main(arguments: Sequence[str]) -> None:
    """Write the appendix of a folder of results."""
    options = tyro.cli(Options, args=arguments, prog="python -m experiments appendix", description=__doc__)
    folder = options.folder
    sections = [section(path) for path in sorted(folder.glob("*-evidence.json"))]
    for path in sorted(folder.glob("*-budget.md")):
        sections.append(f"## {path.stem}\n\n{path.read_text(encoding='utf-8').strip()}")
    (folder / "README.md").write_text("\n\n".join([TITLE.strip(), *sections]) + "\n", encoding="utf-8")
    if options.picture is not None:
        content = json.loads((folder / f"{options.picture}-evidence.json").read_text(encoding="utf-8"))
        draw(content["groups"], folder / "decays.png")
    print(f"Written: {folder / 'README.md'}")
