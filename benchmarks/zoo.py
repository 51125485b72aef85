"""Whether the library is right on networks that people use: all forms of a step, against a definition.

    python benchmarks/zoo.py --models levit_128s resnet18 --name some
    python benchmarks/zoo.py --packages timm --name timm && python benchmarks/zoo_page.py

For every entry of `catalogue.py` a step is taken by the functional step of two passes, by the functional step of one
pass, and by both contexts of the drop-in, and again by `definition.py`, given the same δ. What is recorded is how far
gradients, statistic gradients and buffers are apart, what was refused and by which error, which models have no batch
norm, and which do not train at all. `docs/zoo.md` says what came out.
"""

from __future__ import annotations

import gc
import json
import signal
import time
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from typing import Any

import torch
from agreement import KINDS, against_definition, described, in_dtype, plain_step, seeded
from catalogue import PACKAGES, Entry, entries
from common import Rounds, Row, Sheet, result_path, run_script
from definition import training_layers


class TooLongError(BaseException):
    """A model has had its time. No `except Exception` of a package is to catch it."""


@dataclass(frozen=True)
class Settings(Rounds):
    """What is compared.

    Attributes:
        packages: that models are taken from.
        models: names of models; * stands for anything.
        seconds: processor time that a model may take.
        largest: parameters, in millions, that a model may have.
        resume: whether to keep what an earlier run has compared and found alike, and do the rest.
    """

    packages: tuple[str, ...] = PACKAGES
    models: tuple[str, ...] = ("*",)
    seconds: int = 15
    largest: int = 35
    resume: bool = False
    rounds: int = 1
    threads: int = 1
    device: str = "cpu"


def measure(settings: Settings) -> Iterator[Row]:
    """Compare one model after the other.

    Args:
        settings: which.

    Yields:
        A row for every model.
    """
    torch.set_num_threads(settings.threads)
    kept = earlier(settings) if settings.resume else {}
    for package in settings.packages:
        for entry in entries(package):
            if any(fnmatch(entry.name, pattern) for pattern in settings.models):
                print(f"{package}: {entry.name}", flush=True)
                yield kept.get((package, entry.name)) or row_of(entry, settings)
                gc.collect()


def earlier(settings: Settings) -> dict[tuple[str, str], Row]:
    """The rows of an earlier run, stopped or not, by package and model."""
    path = result_path("zoo", settings)
    rows = json.loads(path.read_text(encoding="utf-8"))["rows"] if path.exists() else []
    return {(row["package"], row["model"]): row for row in rows if row["outcome"] in ("compared", "no batch norm")}


def row_of(entry: Entry, settings: Settings) -> Row:
    """All that is to say about a model."""
    row: Row = {"package": entry.package, "family": entry.family, "model": entry.name}
    start = time.process_time()
    try:
        with limited(settings.seconds), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the packages
            row |= compared(entry, settings)
    except TooLongError:
        row |= {"outcome": "too long", "reason": f"more than {settings.seconds} s of processor time"}
    return row | {"seconds": round(time.process_time() - start, 1)}


@contextmanager
def limited(seconds: int) -> Iterator[None]:
    """Raise `TooLongError` after some processor time."""

    def stop(*_: Any) -> None:
        raise TooLongError

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def compared(entry: Entry, settings: Settings) -> Row:
    """Make a model, and compare what can be."""
    if entry.make is None:
        return {"outcome": "no batch norm"}
    seeded()
    try:
        case = entry.make()
    except Exception as error:
        return {"outcome": "fails", "reason": f"cannot be made: {described(error)}"}
    layers = training_layers(case.model)
    parameters = sum(parameter.numel() for parameter in case.model.parameters())
    row: Row = {"layers": len(layers), "parameters": parameters}
    if not layers:
        return row | {"outcome": "no batch norm"}
    if parameters > settings.largest * 1e6:
        return row | {"outcome": "too large", "reason": f"{parameters / 1e6:.0f} million parameters"}
    reasons = {}
    for dtype in (torch.float64, torch.float32):
        typed = in_dtype(case, dtype)
        try:
            plain = plain_step(typed)
        except Exception as error:
            reasons[dtype] = described(error)
            continue
        return row | {"float64": reasons.get(torch.float64, "")} | against_definition(typed, plain)
    return row | {"outcome": "fails", "reason": f"plain training fails: {reasons[torch.float32]}"}


def sheets(content: Mapping[str, Any]) -> list[Sheet]:
    """The tables.

    Args:
        content: what was recorded.

    Returns:
        A summary; what was compared, by package; what was refused; all others; and what rounding decides.
    """
    rows = content["rows"]
    kinds = {
        "what was tried": summary(rows),
        **{package: compared_lines(rows, package) for package in PACKAGES},
        "refused": [[row["model"], form, error] for row in rows for form, error in row.get("refused", {}).items()],
        "not compared": [
            [row["model"], row["family"], row["outcome"], row.get("reason", "")]
            for row in rows
            if row["outcome"] not in ("compared", "DIFFERS", "refused")
        ],
        "statistic gradients that are zero but for rounding": cancelled_lines(rows),
    }
    return [Sheet(title, COLUMNS.get(title, COMPARED), lines) for title, lines in kinds.items() if lines]


COMPARED = (
    "model",
    "module",
    "BN layers",
    "gradients",
    "statistic gradients",
    "running statistics",
    "one pass",
    "settings",
    "zero but for rounding",
)
COLUMNS = {
    "what was tried": (
        "package",
        "models",
        "compared",
        "differ",
        "no batch norm",
        "refused",
        "others",
        "largest error",
    ),
    "refused": ("model", "form", "error"),
    "not compared": ("model", "module", "outcome", "reason"),
    "statistic gradients that are zero but for rounding": (
        "model",
        "share",
        "alone",
        "without them",
        "without as many others",
        "rise of the loss, with / without them",
    ),
}


def summary(rows: Sequence[Row]) -> list[list[str]]:
    """How many models there are of every outcome, by package."""
    lines = []
    for package in PACKAGES:
        of_package = [row for row in rows if row["package"] == package]
        outcomes = Counter(row["outcome"] for row in of_package)
        named = [outcomes.pop(outcome, 0) for outcome in ("compared", "DIFFERS", "no batch norm", "refused")]
        errors = [worst(row, kind) for row in of_package if "errors" in row for kind in KINDS]
        if of_package:
            largest = format_error(max(errors, default=0.0))
            lines.append([package, *map(str, [len(of_package), *named, sum(outcomes.values())]), largest])
    return lines


def compared_lines(rows: Sequence[Row], package: str) -> list[list[str]]:
    """A line for every model of a package that was compared."""
    return [
        [
            row["model"] + (" **differs**" if row["outcome"] == "DIFFERS" else ""),
            row["family"],
            str(row["layers"]),
            *(format_error(worst(row, kind)) for kind in KINDS),
            "refused" if "one pass" in row["refused"] else "yes",
            settings_of(row),
            f"{row['cancelled']:.1%}" if "cancelled" in row else "",
        ]
        for row in rows
        if row["package"] == package and "errors" in row
    ]


def cancelled_lines(rows: Sequence[Row]) -> list[list[str]]:
    """A line for every model that has such gradients, those with the largest share first."""
    found = sorted((row for row in rows if row.get("cancelled")), key=lambda row: -row["cancelled"])
    return [
        [
            row["model"],
            f"{row['cancelled']:.2%}",
            *(f"{row[key]:.1e}" for key in ("alone", "without", "without_others")),
            f"{row['rises'][1]:.4f} / {row['rises'][2]:.4f}",
        ]
        for row in found
    ]


def worst(row: Row, kind: str) -> float:
    """The largest error of a kind, over all forms."""
    return max(float(of_form[kind]) for of_form in row["errors"].values() if kind in of_form)


def settings_of(row: Row) -> str:
    """What had to be set for a model."""
    said = [f"rows={row['rows']!r}"] if row["rows"] else []
    said += ["one group"] if row["groups"] == 1 else []
    return ", ".join(said + (["float32"] if row["float64"] else ["float32 inside"] * (row["precision"] == "float32")))


def format_error(error: float) -> str:
    """A relative error."""
    return f"{error:.0e}"


if __name__ == "__main__":
    run_script(__file__, __doc__, Settings(), Settings(), measure, sheets)
