"""Write README.md beside this file from the results: every table, the figures, and the command of each number.

python benchmarks/render.py
"""

from __future__ import annotations

import importlib
import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import tyro
from common import RESULTS, Sheet, where

INTRODUCTION = """# What APART costs

Every table is made by the command above it and `python benchmarks/render.py`; `make bench` runs the ones with
`--quick`. Times are taken by `torch.utils.benchmark` in interleaved rounds: all rows of a block are timed once in every
round, in random order, after a first call that is not counted. A time is the median over all calls, a ratio the median
over the rounds of the row's median divided by that of the baseline in the same round; the distance of the quartiles
(IQR) stands behind it in brackets. With `--clock cpu` the processor's time is taken, in which other programs on the
machine do not count. `make bench` lets the timed processes keep the memory that they free (`MALLOC_TRIM_THRESHOLD_`):
by glibc's default large activations are mapped anew again and again, which is slow and noisy on a virtual machine.
"""

# By script, in the order of the page. Read together with its docstring, which says what the rows are.
QUESTIONS = {
    "step_cost": "A training step",
    "layer_cost": "The layer alone",
    "breakdown": "Where the time goes",
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


def section(benchmark: str, found: Sequence[tuple[Path, Mapping[str, Any]]], page: Path) -> str:
    """What the page says about the results of a script.

    Args:
        benchmark: the script.
        found: what it recorded, and in which files; figures are drawn beside them.
        page: the file that the section is for.

    Returns:
        Markdown.
    """
    script = importlib.import_module(benchmark)
    summary, _, *notes = (script.__doc__ or "").strip().split("\n\n")
    prose = [f"```text\n{part}\n```" if part.startswith("    ") else part for part in notes]
    parts = [f"## {QUESTIONS[benchmark]}", summary, *prose]
    for path, content in found:
        parts.append(f"`{content['command']}` on {where(content['environment'])}:")
        parts += figure(script, content, path.with_suffix(".png"), page)
        parts += [markdown(sheet) for sheet in script.sheets(content)]
    return "\n\n".join(part.strip("\n") for part in parts) + "\n"


def figure(script: ModuleType, content: Mapping[str, Any], path: Path, page: Path) -> list[str]:
    """The drawing of a result, where the script draws it.

    Args:
        script: which recorded it.
        content: what it recorded.
        path: where to draw.
        page: where to show it.

    Returns:
        Markdown, or nothing.
    """
    if not hasattr(script, "draw"):
        return []
    script.draw(content, path)
    return [f"![{QUESTIONS[content['benchmark']]}]({path.resolve().relative_to(page.resolve().parent).as_posix()})"]


def results(folder: Path) -> list[tuple[Path, dict[str, Any]]]:
    """All recorded results: script by script, those without a name first."""
    found = [(path, json.loads(path.read_text(encoding="utf-8"))) for path in folder.glob("*.json")]
    order = list(QUESTIONS)
    return sorted(found, key=lambda each: (order.index(each[1]["benchmark"]), each[0].stem))


def main(settings: Settings) -> None:
    """Write the page.

    Args:
        settings: from the command line.
    """
    sections = [INTRODUCTION]
    for benchmark, found in itertools.groupby(results(settings.results), key=lambda each: each[1]["benchmark"]):
        sections.append(section(benchmark, list(found), settings.out))
    settings.out.write_text("\n".join(sections), encoding="utf-8")
    print(settings.out)


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
