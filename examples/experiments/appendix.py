"""Results in detail, from the numbers of every seed: `python -m experiments appendix results` writes results/README.md.

Each `*-evidence.json` of the folder, which `evidence` wrote, becomes a section: every method with what validation data
chose, against the plain training that they chose; and what was chosen from.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro

from experiments.figures import format_error, format_gain
from experiments.groups import edges_of, word
from experiments.paired import Key, difference_by_key, estimate, holm, welch_by_key
from experiments.tables import Cell, ResultTable, markdown

Entry = Mapping[str, Any]

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
COLUMNS = (
    "method",
    "chosen",
    "runs",
    "passes",
    "validation error %",
    "test error %",
    "gain",
    "without pairs",
    "p, Holm",
)
MEASURED_ONCE = ("method", "chosen", "is_chosen", "at the edge", "passes", "settings")


def values_of(entry: Entry, figure: str) -> dict[Key, float]:
    """A figure of every run, by split and seed: the key `1/3` is that of seed 3 of split 1."""
    keys = {key: tuple(map(int, key.split("/"))) for key in entry[figure]}
    return {(0, *parts)[-2:]: entry[figure][key] for key, parts in keys.items()}  # type: ignore[misc]


def mean_of(entry: Entry, figure: str) -> str:
    """A figure's mean and standard error."""
    return format_error(estimate(list(values_of(entry, figure).values()))) if entry.get(figure) else ""


def chosen_of(entries: Sequence[Entry]) -> Entry:
    """Of the candidates with the most runs, that of the lowest mean validation error over them; of equals the first."""
    most = max(len(entry["validation error %"]) for entry in entries)
    refined = [entry for entry in entries if len(entry["validation error %"]) == most]
    return min(refined, key=lambda entry: float(np.mean(list(entry["validation error %"].values()))))


def tables_of(name: str, entries: Sequence[Entry]) -> list[ResultTable]:
    """The tables of a set: errors, and what else was measured, if anything was."""
    methods: dict[str, list[Entry]] = {}
    for entry in entries:
        methods.setdefault(entry["method"], []).append(entry)
    chosen = {method: chosen_of(found) for method, found in methods.items()}
    plain = chosen_of([entry for method, entry in chosen.items() if method.startswith("plain")])
    pairs = [(values_of(plain, "test error %"), values_of(entry, "test error %")) for entry in chosen.values()]
    differences = [
        None if entry is plain else difference_by_key(*both) for entry, both in zip(chosen.values(), pairs, strict=True)
    ]
    ps = holm([difference.p if difference else math.nan for difference in differences])
    rows = []
    for (method, entry), difference, both, p in zip(chosen.items(), differences, pairs, ps, strict=True):
        edges = edges_of(entry["settings"], [each["settings"] for each in methods[method]])
        texts = [method, entry["chosen"] + (f" (at the edge: {', '.join(edges)})" if edges else "")]
        texts += [str(len(both[1])), f"{entry['passes']:g}", mean_of(entry, "validation error %")]
        texts += [mean_of(entry, "test error %"), format_gain(difference) if difference else ""]
        without_pairs = welch_by_key(*both) if difference else None
        texts += [format_gain(without_pairs) if without_pairs else "", "" if math.isnan(p) else f"{p:.2g}"]
        rows.append(
            [Cell(text, bold=p < 0.05 and column == "gain") for column, text in zip(COLUMNS, texts, strict=True)]
        )
    tables = [ResultTable(f"{name}: test error", COLUMNS, rows, "")]
    figures = [figure for figure in plain if figure not in (*MEASURED_ONCE, "validation error %", "test error %")]
    if figures:
        rows = [
            [Cell(method), *(Cell(mean_of(entry, figure)) for figure in figures)] for method, entry in chosen.items()
        ]
        tables.append(ResultTable(f"{name}: what the chosen networks withstand", ("method", *figures), rows, ""))
    return tables


def candidates_of(entries: Sequence[Entry]) -> str:
    """What was chosen from, a line for each method: validation error and runs."""
    methods: dict[str, list[str]] = {}
    for entry in entries:
        runs = len(entry["validation error %"])
        text = f"{entry['chosen']}: {mean_of(entry, 'validation error %')} ({runs})"
        methods.setdefault(entry["method"], []).append(text)
    lines = [f"- {method}: {'; '.join(found)}" for method, found in methods.items() if len(found) > 1]
    return "\n".join(["Chosen from, by validation error % (runs):", "", *lines]) if lines else ""


def shared_settings_of(entries: Sequence[Entry]) -> str:
    """The settings that all have."""
    all_settings = [entry["settings"] for entry in entries]
    names = [name for name in all_settings[0] if name.startswith(("training.", "model.", "data."))]
    same = [name for name in names if len({str(settings.get(name)) for settings in all_settings}) == 1]
    return ", ".join(f"{word(name)} {all_settings[0][name]}" for name in same if all_settings[0][name] is not None)


def section(path: Path) -> str:
    """The section of one file."""
    content = json.loads(path.read_text(encoding="utf-8"))
    entries, name = content["groups"], path.stem.removesuffix("-evidence")
    settings = f"Settings: {shared_settings_of(entries)}. Trained with {content['environment']}."
    parts = [f"## {name}", settings, *map(markdown, tables_of(name, entries)), candidates_of(entries)]
    return "\n\n".join(part.strip() for part in parts if part)


def main(arguments: Sequence[str]) -> None:
    """Write the appendix of a folder of results."""
    folder = tyro.cli(
        Annotated[Path, tyro.conf.Positional],
        args=arguments,
        prog="python -m experiments appendix",
        description=__doc__,
    )
    sections = [section(path) for path in sorted(folder.glob("*-evidence.json"))]
    (folder / "README.md").write_text("\n\n".join([TITLE.strip(), *sections]) + "\n", encoding="utf-8")
    print(f"Written: {folder / 'README.md'}")
