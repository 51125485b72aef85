"""Tables of results: the same cells are printed and written as Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from experiments.figures import format_gain, write_json
from experiments.paired import Key, clear_of_zero, difference_by_key

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


def write_results(stem: Path, tables: Sequence[ResultTable], numbers: Mapping[str, Any]) -> None:
    """Print tables, and write them as Markdown, and the numbers that they are made of as JSON."""
    for table in tables:
        print_table(table)
    stem.parent.mkdir(parents=True, exist_ok=True)
    stem.with_suffix(".md").write_text("\n".join(map(markdown, tables)), encoding="utf-8")
    write_json(stem.with_suffix(".json"), numbers)
