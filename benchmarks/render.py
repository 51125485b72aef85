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
from typing import Any

import tyro
from common import RESULTS, markdown, where
from figures import FIGURES

INTRODUCTION = """# What APART costs

Every table is made by the command above it and `python benchmarks/render.py`; `make bench` runs the ones with
`--quick`. Times are taken by `torch.utils.benchmark` in interleaved rounds: all rows of a block are timed once in every
round, in random order, after a first call that is not counted. A time is the median over all blocks of calls, a ratio
the median over the rounds of the row's median divided by that of the baseline in the same round; the distance of the
quartiles (IQR) stands behind it in brackets. Every time is taken on two clocks: that on the wall, and the processor's,
in which other programs on the machine do not count.
"""

NO_GPU = """No figure on this page was taken on a GPU. `make gpu` takes them, in nine minutes and with PyTorch alone.
"""

# By script, in the order of the page. Read together with its docstring, which says what the rows are.
QUESTIONS = {
    "step_cost": "A training step",
    "layer_cost": "The layer alone",
    "breakdown": "Where the time goes",
    "memory": "Peak memory",
    "compile": "Compilation",
    "functionalize_cost": "Making a model functional",
    "scaling": "Growth",
    "distributed": "Several ranks",
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
        stopped = "" if content["complete"] else " (stopped before it had measured everything)"
        parts.append(f"`{content['command']}` on {where(content['environment'])}{stopped}:")
        parts += figure(content, path.with_suffix(".png"), page)
        parts += [markdown(sheet) for sheet in script.sheets(content)]
    return "\n\n".join(part.strip("\n") for part in parts) + "\n"


def figure(content: Mapping[str, Any], path: Path, page: Path) -> list[str]:
    """The drawing of a result, where there is one.

    Args:
        content: what was recorded.
        path: where to draw.
        page: where to show it.

    Returns:
        Markdown, or nothing.
    """
    benchmark = content["benchmark"]
    if benchmark not in FIGURES:
        return []
    FIGURES[benchmark](content, path)
    return [f"![{QUESTIONS[benchmark]}]({path.resolve().relative_to(page.resolve().parent).as_posix()})"]


def results(folder: Path) -> list[tuple[Path, dict[str, Any]]]:
    """All recorded results about costs: script by script, those without a name first."""
    found = [(path, json.loads(path.read_text(encoding="utf-8"))) for path in folder.glob("*.json")]
    found = [each for each in found if each[1]["benchmark"] in QUESTIONS]  # the zoo has a page of its own
    order = list(QUESTIONS)
    return sorted(found, key=lambda each: (order.index(each[1]["benchmark"]), each[0].stem))


def main(settings: Settings) -> None:
    """Write the page.

    Args:
        settings: from the command line.
    """
    recorded = results(settings.results)
    sections = [INTRODUCTION]
    if not any(content["environment"]["accelerator"] for _, content in recorded):
        sections.append(NO_GPU)
    for benchmark, found in itertools.groupby(recorded, key=lambda each: each[1]["benchmark"]):
        sections.append(section(benchmark, list(found), settings.out))
    settings.out.write_text("\n".join(sections), encoding="utf-8")
    print(settings.out)


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
