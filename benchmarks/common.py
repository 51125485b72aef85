"""How the benchmarks measure, and how they record it.

    times = interleaved("resnet18", steps, settings)                    # {name: one Times a round}
    rows = [timing_row(times, name, baselines=("plain",)) for name in times]
    run_script(__file__, __doc__, Settings(), QUICK, measure, sheets)   # results/step_cost-cpu.json, and a table

Times are taken by `torch.utils.benchmark.Timer`, which waits for the device by itself, on two clocks: that on the wall,
and the processor's, in which other programs on the machine do not count. All rows are measured once in every round, so
that whatever else happens on the machine happens to all of them; ratios are formed within rounds. What is measured is
written after every row: a run that is stopped keeps what it has.

Nothing is needed but PyTorch, as long as no command line is read: a machine with a GPU may have nothing else.
"""

from __future__ import annotations

import json
import os
import random
import shlex
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple, TypeVar
from unittest.mock import patch

import torch
from torch.utils.benchmark import Timer, timer

# The programs in examples/ have the models, and know the machine.
sys.path.append(str(Path(__file__).resolve().parents[1] / "examples"))
from experiments.environment import environment

import apart_func

RESULTS = Path(__file__).parent / "results"
CLOCKS = ("wall", "processor")

# What glibc does with memory that is freed, as variables for a process. Mapped anew, a large activation costs a virtual
# machine as long as the arithmetic on it, now and then; and by default glibc starts to keep blocks once it has seen
# some, so that peaks depend on the order.
ALLOCATORS: dict[str, dict[str, str]] = {
    "glibc": {},
    "kept": {"MALLOC_MMAP_THRESHOLD_": str(2**32), "MALLOC_TRIM_THRESHOLD_": str(2**34)},
    "returned": {"MALLOC_MMAP_THRESHOLD_": str(2**16), "MALLOC_TRIM_THRESHOLD_": str(2**16)},
}

Result = TypeVar("Result")
Row = dict[str, Any]


@dataclass(frozen=True)
class Rounds:
    """How often rows are measured, and where; every script adds what.

    Attributes:
        rounds: how often each row is measured, in turn with the others.
        threads: of the CPU.
        device: where to run.
        name: of the result, which then stands beside that of the same script without a name.
        out: folder for the JSON file.
    """

    rounds: int = 7
    threads: int = os.cpu_count() or 1
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    name: str = ""
    out: Path = RESULTS


@dataclass(frozen=True)
class TimedRounds(Rounds):
    """The same for times.

    Attributes:
        seconds: least time each row gets in a round.
    """

    seconds: float = 0.3


class Times(NamedTuple):
    """Seconds a call, one value for every block of calls.

    Attributes:
        wall: by the clock on the wall.
        processor: by the processor's, of all threads together.
    """

    wall: list[float]
    processor: list[float]


Settings = TypeVar("Settings", bound=Rounds)


@dataclass(frozen=True)
class Spread:
    """The middle of some values.

    Attributes:
        median: their median.
        iqr: the distance of their quartiles.
        n: how many there are.
    """

    median: float
    iqr: float
    n: int


class Sheet(NamedTuple):
    """A table.

    Attributes:
        title: what it says.
        columns: their heads.
        lines: their cells.
    """

    title: str
    columns: Sequence[str]
    lines: Sequence[Sequence[str]]


def spread(values: Sequence[float]) -> Spread:
    """The median of values, and how far they lie apart."""
    low, median, high = torch.tensor(values, dtype=torch.float64).quantile(torch.tensor([0.25, 0.5, 0.75]).double())
    return Spread(median.item(), (high - low).item(), len(values))


def command_line(full: Settings, quick: Settings, description: str | None) -> Settings:
    """Read settings from the command line.

    Args:
        full: the defaults.
        quick: the defaults that `--quick` puts in their place.
        description: what `--help` says.

    Returns:
        Settings: the defaults, with what the command line changes.
    """
    import tyro

    arguments = sys.argv[1:]
    defaults = quick if "--quick" in arguments else full
    return tyro.cli(
        type(full),
        default=defaults,
        args=[argument for argument in arguments if argument != "--quick"],
        description=f"{description}\n\n--quick: other defaults, for a couple of minutes on two cores.",
    )


def turns(label: str, names: Iterable[str], rounds: int) -> Iterator[str]:
    """Call up every name once a round, each round in another order, and show how far it is.

    Args:
        label: stands beside the count.
        names: what takes turns.
        rounds: how many.

    Yields:
        The names, one by one.
    """
    names, orders = list(names), random.Random(0)
    for number in range(1, rounds + 1):
        print(f"{label}: round {number} of {rounds}", file=sys.stderr, flush=True)
        yield from orders.sample(names, k=len(names))


def interleaved(label: str, steps: Mapping[str, Callable[[], object]], settings: TimedRounds) -> dict[str, list[Times]]:
    """Time some functions against each other.

    Args:
        label: what they are, together.
        steps: functions by name. Each is called once before the rounds, which compiles it where it compiles.
        settings: rounds, threads, and the least time for each. It is called at least once a round, after a call that
            is not counted.

    Returns:
        The times by name, one `Times` a round.
    """
    torch.set_num_threads(settings.threads)  # Inductor writes the number into the code that it generates
    times: dict[str, list[Times]] = {name: [] for name in steps}
    for turn, name in enumerate(turns(label, steps, settings.rounds + 1)):
        if turn < len(steps):
            steps[name]()
        else:
            times[name].append(timed(steps[name], settings))
    return times


def timed(step: Callable[[], object], settings: TimedRounds) -> Times:
    """Time a function for one round, on both clocks."""
    readings: list[float] = []

    def both_clocks() -> float:
        readings.append(time.process_time())
        return timer()

    clock = Timer("step()", timer=both_clocks, globals={"step": step}, num_threads=settings.threads)
    measured = clock.blocked_autorange(min_run_time=settings.seconds)
    # The timer is read before and after every block; the first blocks only find out how many calls make one.
    last = readings[-2 * len(measured.times) :]
    blocks = zip(last[::2], last[1::2], strict=True)
    return Times(measured.times, [(end - start) / measured.number_per_run for start, end in blocks])


def timing_row(times: Mapping[str, Sequence[Times]], name: str, baselines: Iterable[str]) -> Row:
    """What was measured of one function.

    Args:
        times: what `interleaved` returned.
        name: of the function.
        baselines: functions to divide by. Ratios are those of both medians of a round, and spread over the rounds.

    Returns:
        For each clock the times in seconds, over all blocks, and the ratios, over the rounds: a part of a row.
    """
    row: Row = {}
    for clock in CLOCKS:
        blocks = [block for each in times[name] for block in getattr(each, clock)]
        medians = {function: medians_of(rounds, clock) for function, rounds in times.items()}
        row[clock] = {"seconds": asdict(spread(blocks)), "relative_to": relative_to(medians, name, baselines)}
    return row


def medians_of(rounds: Iterable[Times], clock: str) -> list[float]:
    """The median block of every round, in seconds a call."""
    return [spread(getattr(each, clock)).median for each in rounds]


def time_columns(baselines: Iterable[str]) -> list[str]:
    """Heads for `time_cells`."""
    ratios = [f"/ {base}{', processor' * (clock == 'processor')}" for base in baselines for clock in CLOCKS]
    return ["time (IQR)", "processor time (IQR)", *(f"{ratio} (IQR)" for ratio in ratios)]


def time_cells(row: Row, baselines: Iterable[str]) -> list[str]:
    """Times and ratios on both clocks, as the cells of a table."""
    times = [format_seconds(row[clock]["seconds"]) for clock in CLOCKS]
    return times + [format_ratio(row[clock]["relative_to"].get(base)) for base in baselines for clock in CLOCKS]


def relative_to(values: Mapping[Any, Sequence[float]], name: Any, baselines: Iterable[Any]) -> dict[Any, Any]:
    """By what factor some values lie above others, pair by pair.

    Args:
        values: equally many for every name.
        name: whose values to divide.
        baselines: names of those to divide by; the ones without values are left out.

    Returns:
        The spread of the ratios, by baseline.
    """
    return {
        base: asdict(spread([mine / theirs for mine, theirs in zip(values[name], values[base], strict=True)]))
        for base in baselines
        if base in values
    }


def in_child(function: Callable[..., Result], *arguments: Any, allocator: str = "glibc", **variables: str) -> Result:
    """Call a function in a new process.

    Args:
        function: one of a module, since it travels to the process by name.
        *arguments: for the function.
        allocator: one of `ALLOCATORS`.
        **variables: environment variables for the process.

    Returns:
        What the function returned.
    """
    with patch.dict(os.environ):
        for name in ALLOCATORS["kept"]:
            os.environ.pop(name, None)
        os.environ.update(ALLOCATORS[allocator] | variables)
        with ProcessPoolExecutor(1, get_context("spawn")) as pool:
            return pool.submit(function, *arguments).result()


def run_script(
    file: str,
    doc: str | None,
    full: Settings,
    quick: Settings,
    measure: Callable[[Settings], Iterable[Row]],
    sheets: Callable[[Mapping[str, Any]], list[Sheet]],
) -> None:
    """Read the command line, measure, write JSON, and print the tables.

    Args:
        file: of the script.
        doc: what `--help` says.
        full: its settings.
        quick: the settings that `--quick` puts in their place.
        measure: the script's.
        sheets: the script's.
    """
    run(Path(file).stem, command_line(full, quick, doc), measure, sheets)


def run(
    benchmark: str,
    settings: Settings,
    measure: Callable[[Settings], Iterable[Row]],
    sheets: Callable[[Mapping[str, Any]], list[Sheet]],
) -> None:
    """Measure, write JSON after every row, and print the tables.

    Args:
        benchmark: name of the script.
        settings: its settings.
        measure: the script's.
        sheets: the script's.
    """
    rows: list[Row] = []
    for row in measure(settings):
        rows.append(row)
        record(benchmark, settings, rows, complete=False)
    content = record(benchmark, settings, rows)
    print(where(content["environment"]))
    for sheet in sheets(content):
        print(f"\n{markdown(sheet)}", end="", flush=True)


def record(benchmark: str, settings: Rounds, rows: Sequence[Row], complete: bool = True) -> dict[str, Any]:
    """Write what was measured as JSON, with where and how.

    Args:
        benchmark: name of the script.
        settings: its settings.
        rows: what it measured.
        complete: whether that is all.

    Returns:
        What is in the file.
    """
    device = settings.device
    content = {
        "benchmark": benchmark,
        "command": shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *_shown_arguments()]),
        "complete": complete,
        "settings": {name: value for name, value in asdict(settings).items() if name != "out"},
        "environment": {
            **environment(),
            "apart_func": apart_func.__version__,
            "device": device,
            "accelerator": torch.cuda.get_device_name(device) if device.startswith("cuda") else None,
            "threads": settings.threads,
            "omp_proc_bind": os.environ.get("OMP_PROC_BIND"),
            "malloc_trim_threshold": os.environ.get("MALLOC_TRIM_THRESHOLD_"),
        },
        "rows": list(rows),
    }
    settings.out.mkdir(parents=True, exist_ok=True)
    result_path(benchmark, settings).write_text(
        json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
    )
    return content


def result_path(benchmark: str, settings: Rounds) -> Path:
    """Where a benchmark records what it measures."""
    parts = [benchmark, settings.device.partition(":")[0], settings.name]
    return settings.out / f"{'-'.join(filter(None, parts))}.json"


def markdown(sheet: Sheet) -> str:
    """A table in Markdown, its columns aligned for the eye as well, the first to the left."""
    cells = [[*sheet.columns], *map(list, sheet.lines)]
    widths = [max(3, *(len(line[number]) for line in cells)) for number in range(len(sheet.columns))]

    def aligned(line: Sequence[str]) -> str:
        first, *others = (
            cell.rjust(width) if number else cell.ljust(width)
            for number, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        return f"| {' | '.join([first, *others])} |"

    rule = ["-" * widths[0], *(f"{'-' * (width - 1)}:" for width in widths[1:])]
    return "\n".join([f"**{sheet.title}**", "", *map(aligned, [cells[0], rule, *cells[1:]])]) + "\n"


def where(machine: Mapping[str, Any]) -> str:
    """One line on the hardware and versions of a result."""
    processor = f"{machine['hardware']}, {machine['threads']} of {machine['cores']} cores"
    device = f"{machine['accelerator']} ({processor})" if machine["accelerator"] else processor
    return f"{device}; torch {machine['torch']}, Python {machine['python']}, apart_func {machine['apart_func']}"


def format_seconds(seconds: Mapping[str, float]) -> str:
    """A time and the distance of its quartiles."""
    unit, scale = ("s", 1.0) if seconds["median"] >= 1 else ("ms", 1e3) if seconds["median"] >= 1e-3 else ("μs", 1e6)
    return f"{scale * seconds['median']:.3g} {unit} ({scale * seconds['iqr']:.3g})"


def format_ratio(ratio: Mapping[str, float] | None, digits: int = 2) -> str:
    """A ratio and the distance of its quartiles; nothing where there is none."""
    return "" if ratio is None else f"{ratio['median']:.{digits}f} × ({ratio['iqr']:.{digits}f})"


def _shown_arguments() -> list[str]:
    """The command line, without the folder that results go to."""
    arguments = sys.argv[1:]
    return [
        argument
        for before, argument in zip(["", *arguments], arguments, strict=False)
        if "--out" not in (before, argument)
    ]
