"""Write README.md beside this file from the results: every table, the figures, and the command of each number.

python benchmarks/render.py
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import tyro
from common import RESULTS, Sheet, where

ORDER = ("step_cost", "layer_cost", "memory", "compile", "scaling")
COLOURS = {"plain": "#999999", "SAM": "#009E73", "APART": "#D55E00"}

INTRODUCTION = """# What APART costs

Every table is made by the command above it and `python benchmarks/render.py`; `make bench` runs them all. Times are
taken by `torch.utils.benchmark` in interleaved rounds: all rows of a block are timed once in every round, in random
order, after a first call that is not counted. A time is the median over all calls, a ratio the median over the rounds
of the row's median divided by that of the baseline in the same round; the distance of the quartiles (IQR) stands
behind it in brackets. `make bench` lets the timed processes keep the memory that they free (`MALLOC_TRIM_THRESHOLD_`):
by glibc's default large activations are mapped anew again and again, which is slow and noisy on a virtual machine.
"""

# Read together with the docstring of the script, which says what its rows are.
QUESTIONS = {
    "step_cost": "A training step",
    "layer_cost": "The layer alone",
    "memory": "Peak memory",
    "compile": "Compilation",
    "scaling": "Growth",
}


@dataclass(frozen=True)
class Settings:
    """What is rendered.

    Attributes:
        results: folder of the JSON files; figures are drawn into it.
        out: the page.
    """

    results: Path = RESULTS
    out: Path = Path(__file__).parent / "README.md"


def markdown(sheet: Sheet) -> str:
    """A table in Markdown, its first column to the left."""
    head = [*sheet.columns]
    rule = ["---"] + ["---:"] * (len(head) - 1)
    cells = [head, rule, *sheet.lines]
    return f"**{sheet.title}**\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in cells) + "\n"


def section(content: Mapping[str, Any], figure: Path | None) -> str:
    """What the page says about a result.

    Args:
        content: what the script recorded.
        figure: its drawing, relative to the page.

    Returns:
        Markdown.
    """
    benchmark = content["benchmark"]
    script = importlib.import_module(benchmark)
    notes = (script.__doc__ or "").strip().split("\n\n")
    prose = "\n\n".join(f"```text\n{part}\n```" if part.startswith("    ") else part for part in notes[0:1] + notes[2:])
    parts = [
        f"## {QUESTIONS[benchmark]}, on {content['environment']['device']}",
        prose,
        f"`{content['command']}` on {where(content['environment'])}:",
        *([f"![{QUESTIONS[benchmark]}]({figure.as_posix()})"] if figure else []),
        *(markdown(sheet) for sheet in script.sheets(content)),
    ]
    return "\n\n".join(part.strip("\n") for part in parts) + "\n"


def draw_step_cost(content: Mapping[str, Any], path: Path) -> None:
    """Draw every step's time as a multiple of the plain step, a panel for each network.

    Args:
        content: what was recorded.
        path: the PNG file.
    """
    models = list(dict.fromkeys(row["model"] for row in content["rows"]))
    figure, axes = plt.subplots(1, len(models), figsize=(4.4 * len(models), 4), layout="constrained", squeeze=False)
    for panel, model in zip(axes[0], models, strict=True):
        rows = [row for row in content["rows"] if row["model"] == model and "plain" in row["relative_to"]][::-1]
        ratios = [row["relative_to"]["plain"] for row in rows]
        panel.barh(
            [bar_label(row) for row in rows],
            [ratio["median"] for ratio in ratios],
            xerr=[ratio["iqr"] / 2 for ratio in ratios],
            color=[COLOURS[row["method"].replace("-", " ").split()[0]] for row in rows],
            capsize=2,
        )
        panel.axvline(2, color="black", linewidth=0.8, linestyle=":")  # two plain steps
        panel.set(title=model, xlabel="time / plain step, eager")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def bar_label(row: Mapping[str, Any]) -> str:
    """A step, in few words."""
    return f"{row['method']} r{row['ratio']:g} g{row['groups']}" if "ratio" in row else str(row["method"])


def draw(content: Mapping[str, Any], path: Path) -> Path | None:
    """Draw a result that has a figure.

    Args:
        content: what was recorded.
        path: where to.

    Returns:
        The file, or None.
    """
    benchmark = content["benchmark"]
    if benchmark == "step_cost":
        draw_step_cost(content, path)
    elif benchmark == "scaling":
        importlib.import_module("scaling").draw(content, path)
    else:
        return None
    return path


def results(folder: Path) -> Sequence[tuple[Path, dict[str, Any]]]:
    """All recorded results, script by script."""
    found = [(path, json.loads(path.read_text(encoding="utf-8"))) for path in sorted(folder.glob("*.json"))]
    return sorted(found, key=lambda each: ORDER.index(each[1]["benchmark"]))


def main(settings: Settings) -> None:
    """Write the page.

    Args:
        settings: from the command line.
    """
    sections = [INTRODUCTION]
    for path, content in results(settings.results):
        figure = draw(content, path.with_suffix(".png"))
        sections.append(section(content, figure and figure.resolve().relative_to(settings.out.resolve().parent)))
    settings.out.write_text("\n".join(sections), encoding="utf-8")
    print(settings.out)


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
