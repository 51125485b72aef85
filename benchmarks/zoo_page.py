"""Write the tables of docs/zoo.md from what `zoo.py` and `cancelled.py` recorded; the text around them stays.

python benchmarks/zoo_page.py
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cancelled
import tyro
import zoo
from common import RESULTS, Sheet, markdown, where

# <!-- table: timm --> and <!-- end -->, and what is between them.
TABLE = re.compile(r"(<!-- table: (?P<title>[^>]*) -->\n).*?(<!-- end -->)", re.DOTALL)


@dataclass(frozen=True)
class Settings:
    """What is rendered.

    Attributes:
        results: folder of what was recorded.
        page: whose tables are replaced.
    """

    results: Path = RESULTS
    page: Path = Path(__file__).resolve().parents[1] / "docs" / "zoo.md"


def rendered(page: str, results: Sequence[Mapping[str, Any]]) -> str:
    """A page with the tables of some results.

    Args:
        page: with marks for tables, by title; "machine" is what the results were recorded with.
        results: what was recorded.
    """
    made = {sheet.title: table(sheet) for sheet in tables(results)}
    made["machine"] = "".join(f"- {origin(content)}\n" for content in results)
    return TABLE.sub(lambda found: found[1] + made.get(found["title"], "None.\n") + found[3], page)


def table(sheet: Sheet) -> str:
    """A table without its title, which the page has as a heading."""
    lines = [[cell.replace("|", "\\|") for cell in line] for line in sheet.lines]
    return markdown(sheet._replace(lines=lines)).partition("\n\n")[2]


def origin(content: Mapping[str, Any]) -> str:
    """What a result was recorded by, and on."""
    stopped = "" if content["complete"] else " (stopped before it had tried everything)"
    return f"`{content['command']}` on {where(content['environment'])}{stopped}"


def tables(results: Sequence[Mapping[str, Any]]) -> list[Sheet]:
    """The tables of the zoo, of all packages together, and those of `cancelled.py`."""
    rows = [row for content in results if content["benchmark"] == "zoo" for row in content["rows"]]
    others = [content for content in results if content["benchmark"] == "cancelled"]
    return [*zoo.sheets({"rows": rows}), *(sheet for content in others for sheet in cancelled.sheets(content))]


def recorded(folder: Path) -> list[dict[str, Any]]:
    """What was recorded, of every package, and by `cancelled.py`."""
    paths = [*sorted(folder.glob("zoo-cpu-*.json")), *folder.glob("cancelled-cpu.json")]
    return [json.loads(path.read_text(encoding="utf-8")) for path in paths]


def main(settings: Settings) -> None:
    """Write the page.

    Args:
        settings: from the command line.
    """
    page = settings.page.read_text(encoding="utf-8")
    settings.page.write_text(rendered(page, recorded(settings.results)), encoding="utf-8")
    print(settings.page)


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
