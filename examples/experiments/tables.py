"""Tables of results: the same cells are printed, written as Markdown, and put in their place on a page."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from experiments.figures import format_gain, write_json
from experiments.paired import Key, clear_of_zero, difference_by_key
from experiments.runs import FolderError

FILE_WIDTH = 180  # of the printed table where there is no terminal


class Cell(NamedTuple):
    """A cell of the table."""

    text: str
    bold: bool = False


class ResultTable(NamedTuple):
    """What is printed, and written as Markdown; the first column is that of the rows' labels."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    notes: str


Errors = Mapping[Key, float]


def gains(rows: Sequence[tuple[Errors | None, Errors]]) -> list[Cell]:
    """A column: by how many points the error of a row lies below that of plain training, over the runs that both have.

    Args:
        rows: of each, the errors of plain training, if there is one to set it against, and its own.

    Returns:
        Differences and intervals, and the number of pairs where it is not that of the seeds; nothing without pairs. In
        bold what is clear of zero by Holm's procedure over the rows.
    """
    differences = [difference_by_key(plain, own) if plain else None for plain, own in rows]
    cells = []
    for (plain, own), difference, is_clear in zip(rows, differences, clear_of_zero(differences), strict=True):
        pairs = len((plain or {}).keys() & own.keys())
        missing = "" if pairs == len(own) else f" ({pairs} run{'s' * (pairs > 1)})"
        cells.append(Cell(format_gain(difference) + missing if difference else "", is_clear))
    return cells


def print_table(results: ResultTable) -> None:
    """Print a table."""
    console = Console()
    if not console.is_terminal:
        console.width = FILE_WIDTH
    table = Table(
        title=results.title, caption=results.notes, title_justify="left", caption_justify="left", box=SIMPLE_HEAD
    )
    for number, column in enumerate(results.columns):
        table.add_column(column, justify="right" if number else "left", overflow="fold")
    for cells in results.rows:
        table.add_row(*(Text(cell.text, style="bold" if cell.bold else "") for cell in cells))
    console.print(table)


def markdown(results: ResultTable) -> str:
    """A table in Markdown."""
    body = [[f"**{cell.text}**" if cell.bold else cell.text for cell in cells] for cells in results.rows]
    lines = [results.columns, ["---", *["---:"] * (len(results.columns) - 1)], *body]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return "\n\n".join(part for part in (f"**{results.title}**", table, results.notes) if part) + "\n"


def write_results(stem: Path, tables: Sequence[ResultTable], numbers: Mapping[str, Any], page: Path | None) -> None:
    """Print tables, and write them: as Markdown, on a page, and the numbers that they are made of as JSON."""
    for table in tables:
        print_table(table)
    stem.parent.mkdir(parents=True, exist_ok=True)
    text = "\n".join(markdown(table) for table in tables)
    stem.with_suffix(".md").write_text(text, encoding="utf-8")
    write_json(stem.with_suffix(".json"), numbers)
    if page is not None:
        show_on_page(page, stem.name, text)


def show_on_page(page: Path, name: str, table: str) -> None:
    """Replace a table on a page."""
    text = page.read_text(encoding="utf-8") if page.exists() else ""
    place = re.compile(rf"(?<=<!-- {re.escape(name)} -->\n).*?(?=<!-- end -->)", re.DOTALL)
    if not place.search(text):
        raise FolderError(f"{page} has no place for the table: expected the lines <!-- {name} --> and <!-- end -->")
    page.write_text(place.sub(lambda _: f"\n{table}\n", text, count=1), encoding="utf-8")
