"""How the benchmarks measure, and how they record it.

    with Worker(checkout) as worker:                       # a process of its own, with the library of a checkout
        worker(prepare, case, methods, groups)
        seconds = interleaved("resnet", {name: partial(worker, time_prepared, name, 0.3, "cpu") for name in methods})
    median_of(ratios(seconds["one pass"], seconds["plain"]))

Everything is measured once in every round, in random order, so that whatever else happens on the machine happens to
all of it; ratios are formed within rounds. A figure is the median over the rounds, with the 95 % interval of that
median, which the order of the values gives without an assumption about them. On a CPU the clock is the processor's:
other programs on the machine do not count, and two threads count twice. On a GPU it is that on the wall.

Rows are written as they are measured: a run that is stopped keeps what it has. Nothing but PyTorch is needed.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import shlex
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from datetime import date
from math import comb
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple, TypeVar
from unittest.mock import patch

import torch
from torch.utils.benchmark import Timer, timer

import apart_func

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).parent / "results"

# What glibc does with memory that is freed, as variables of a process. Where it is mapped again for each large
# activation, that takes a virtual machine as long as the arithmetic, now and then.
ALLOCATORS: dict[str, dict[str, str]] = {
    "glibc": {},
    "kept": {"MALLOC_MMAP_THRESHOLD_": str(2**32), "MALLOC_TRIM_THRESHOLD_": str(2**34)},
    "returned": {"MALLOC_MMAP_THRESHOLD_": str(2**16), "MALLOC_TRIM_THRESHOLD_": str(2**16)},
}

Result = TypeVar("Result")
Row = dict[str, Any]


class Table(NamedTuple):
    """A table in Markdown.

    Attributes:
        heads: of its columns.
        lines: their cells.
    """

    heads: Sequence[str]
    lines: Sequence[Sequence[str]]

    def __str__(self) -> str:
        """Columns aligned for the eye as well, the first to the left."""
        lines = [[cell.replace("|", "\\|") for cell in line] for line in self.lines]
        widths = [max(3, *map(len, column)) for column in zip(self.heads, *lines, strict=True)]
        rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
        aligned = [
            [line[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True))]
            for line in (self.heads, rule, *lines)
        ]
        return "".join(f"| {' | '.join(cells)} |\n" for cells in aligned)


# Measuring.


class Worker:
    """A process that calls functions of these scripts, with the `apart_func` of a checkout.

    Args:
        checkout: root of a checkout; this one by default.
        memory: what becomes of memory that is freed, a key of `ALLOCATORS`.
        threads: of the CPU.
        **variables: of its environment.
    """

    def __init__(self, checkout: Path = ROOT, memory: str = "kept", threads: int = 1, **variables: str) -> None:
        environment = {"OMP_NUM_THREADS": str(threads)} | ALLOCATORS[memory] | variables
        with patch.dict(os.environ, environment), patch.object(sys, "path", [str(checkout.resolve()), *sys.path]):
            self.pool = ProcessPoolExecutor(1, get_context("spawn"))
            library = Path(self.pool.submit(library_of_process).result())
        if checkout.resolve() != library.parents[1]:
            self.pool.shutdown()
            raise ValueError(f"{checkout} holds no apart_func; a process that looked for it there found {library}.")
        self(torch.set_num_threads, threads)

    def __call__(self, function: Callable[..., Result], *arguments: Any) -> Result:
        """Call a function of a module in the process, and wait for what it returns."""
        return self.pool.submit(function, *arguments).result()

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.pool.shutdown()


def library_of_process() -> str:
    """The file of the library that this process has imported."""
    return str(apart_func.__file__)


def interleaved(label: str, measures: Mapping[Any, Callable[[], float]], rounds: int) -> dict[Any, list[float]]:
    """Call every function once a round, each round in another order, and say on stderr how far it is.

    Args:
        label: stands beside the count.
        measures: functions by name, that return what they measured.
        rounds: how many.

    Returns:
        By name one value a round.
    """
    found: dict[Any, list[float]] = {name: [] for name in measures}
    orders = random.Random(0)
    for number in range(1, rounds + 1):
        print(f"{label}: round {number} of {rounds}", file=sys.stderr, flush=True)
        for name in orders.sample(list(measures), k=len(measures)):
            found[name].append(measures[name]())
    return found


def seconds_a_call(step: Callable[[], object], seconds: float, device: str) -> float:
    """Time a function for at least some seconds: the median of its blocks of calls, in seconds a call."""
    clock = time.process_time if device == "cpu" else timer  # PyTorch's waits for the device
    timed = Timer("step()", timer=clock, globals={"step": step}, num_threads=torch.get_num_threads())
    return float(timed.blocked_autorange(min_run_time=seconds).median)


def processor_seconds() -> float:
    """What this process and the ones that it has waited for have used."""
    return sum(os.times()[:4])


# Figures.


def ratios(values: Sequence[float], baseline: Sequence[float]) -> list[float]:
    """Quotients, round by round."""
    return [mine / theirs for mine, theirs in zip(values, baseline, strict=True)]


def median_of(values: Iterable[float]) -> Row:
    """The median, the ends of its 95 % interval (the widest there is below six values), and their number.

    The interval leaves out the k smallest and largest values, k as large as the sign test allows: the median of the
    population lies below the (k+1)-th smallest of n values with the probability that n coins show at most k heads.
    """
    values = sorted(values)
    n, k, below = len(values), 0, 2 * 0.5 ** len(values)
    while k + 1 < (n + 1) // 2 and below + 2 * comb(n, k + 1) * 0.5**n <= 0.05:
        k += 1
        below += 2 * comb(n, k) * 0.5**n
    return {"median": median(values), "low": values[k], "high": values[n - 1 - k], "n": n}


def as_seconds(figure: Mapping[str, float]) -> str:
    """A time with its interval, where there is more than one value."""
    unit, scale = ("s", 1.0) if figure["median"] >= 1 else ("ms", 1e3) if figure["median"] >= 1e-3 else ("μs", 1e6)
    middle, low, high = (f"{scale * figure[key]:.3g}" for key in ("median", "low", "high"))
    return f"{middle} [{low}, {high}] {unit}" if figure["n"] > 1 else f"{middle} {unit}"


def as_ratio(figure: Mapping[str, float] | None, sign: str = "") -> str:
    """A ratio (with `sign="+"` a difference of ratios) with its interval, where there is more than one value."""
    if figure is None:
        return ""
    middle, low, high = (f"{figure[key]:{sign}.2f}" for key in ("median", "low", "high"))
    return f"{middle} [{low}, {high}]" if figure["n"] > 1 else middle


# Scripts.


def arguments(description: str | None, **defaults: Any) -> argparse.ArgumentParser:
    """A command line with what all scripts take; each adds its own.

    Args:
        description: docstring of the script.
        **defaults: of the options.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="less of it, in one to three minutes")
    parser.add_argument("--rounds", type=int, help="how often everything is measured, in turn")
    parser.add_argument("--seconds", type=float, help="least time for each in a round")
    parser.add_argument("--threads", type=int, help="of the CPU; two stall each other where anything else runs")
    parser.add_argument("--device", help="where to run")
    parser.add_argument("--name", default="", help="of the result, to stand beside another one of the script")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the result")
    parser.set_defaults(**{"rounds": 7, "seconds": 0.3, "threads": 1, "device": "cpu"} | defaults)
    return parser


def run(
    file: str,
    settings: argparse.Namespace,
    measure: Callable[[argparse.Namespace], Iterable[Row]],
    table: Callable[[Sequence[Row]], Table],
) -> list[Row]:
    """Measure, write JSON after every row, and print the table.

    Args:
        file: of the script.
        settings: from its command line.
        measure: yields rows.
        table: what it says about them.

    Returns:
        The rows.
    """
    parts = [Path(file).stem, settings.device.partition(":")[0], settings.name]
    path = settings.out / f"{'-'.join(filter(None, parts))}.json"
    rows: list[Row] = []
    content = {"command": command_line(), "machine": machine(settings), "complete": False, "rows": rows}
    path.parent.mkdir(parents=True, exist_ok=True)
    for row in measure(settings):
        rows.append(row)
        path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    content["complete"] = True
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(f"\n{content['machine']}\n\n{table(rows)}", flush=True)
    return rows


def command_line() -> str:
    """The command that started this program, without folders of its machine."""
    kept, script = [], Path(sys.argv[0]).resolve()
    for before, argument in zip(["", *sys.argv[1:]], sys.argv[1:], strict=False):
        if not {before, argument} & {"--out", "--against"}:
            kept.append(argument)
    name = script.relative_to(ROOT) if script.is_relative_to(ROOT) else script.name
    return f"python {name} {shlex.join(kept)}".strip()


def machine(settings: argparse.Namespace) -> str:
    """One line on the hardware, the versions and the day."""
    name = processor_name() if settings.device == "cpu" else torch.cuda.get_device_name(settings.device)
    cores = f"{settings.threads} thread{'s' * (settings.threads > 1)} of {os.cpu_count()} cores"
    versions = f"torch {torch.__version__}, Python {platform.python_version()}, apart_func {apart_func.__version__}"
    return f"{name}, {cores}; {versions}; {date.today()}"


def processor_name() -> str:
    """The processor's name, from Linux where `platform` does not know it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine()
