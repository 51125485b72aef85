"""How results are written: numbers with intervals, tables in terminal and Markdown, and the colours of pictures."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import matplotlib
from rich.console import Console
from rich.markdown import Markdown

from experiments.paired import ByKey, Estimate, PairedDifference, difference_by_key, holm

matplotlib.use("Agg")

FILE_WIDTH = 180  # of the printed table where there is no terminal
# Okabe and Ito, without their yellow, which is faint on white: told apart with every kind of colour vision.
COLOURS = ("#0072B2", "#E69F00", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#000000")


class ResultTable(NamedTuple):
    """What is printed, and written as Markdown; the first column is that of the rows' labels."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: str = ""


def format_gain(difference: PairedDifference | None) -> str:
    """A difference and its interval, as in `+1.26 [+0.91, +1.61]`; a single pair has no interval."""
    if difference is None:
        return ""
    interval = "" if math.isnan(difference.low) else f" [{difference.low:+.2f}, {difference.high:+.2f}]"
    return f"{difference.mean:+.2f}{interval}"


def format_error(error: Estimate) -> str:
    """An error and its standard error, as in `6.40 ± 0.28`; a single run has no standard error."""
    return f"{error.mean:.2f}" + ("" if math.isnan(error.standard_error) else f" ± {error.standard_error:.2f}")


def bold(text: str, is_bold: bool = True) -> str:
    """Text in Markdown, bold if it is to be."""
    return f"**{text}**" if text and is_bold else text


def gains(rows: Sequence[tuple[ByKey | None, ByKey]]) -> list[str]:
    """By how many points the second errors of each row are below the first, those of plain training; bold by Holm."""
    differences = [difference_by_key(plain, own) if plain else None for plain, own in rows]
    cells = []
    for (plain, own), difference, p in zip(rows, differences, holm(differences), strict=True):
        pairs = len((plain or {}).keys() & own.keys())
        missing = "" if pairs in (0, len(own)) else f" ({pairs} run{'s' * (pairs > 1)})"
        cells.append(bold(format_gain(difference) + missing, p < 0.05))
    return cells


def show(text: str) -> None:
    """Print Markdown, its tables as tables."""
    console = Console()
    if not console.is_terminal:
        console.width = FILE_WIDTH
    console.print(Markdown(text))


def markdown(results: ResultTable) -> str:
    """A table in Markdown."""
    lines = [results.columns, ["---", *["---:"] * (len(results.columns) - 1)], *results.rows]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return "\n\n".join(part for part in (f"**{results.title}**", table, results.notes) if part) + "\n"
