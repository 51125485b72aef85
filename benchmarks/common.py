"""How the benchmarks measure, and how they record it.

    times = interleaved(steps, rounds=7, seconds=0.5, threads=2)      # {name: one Measurement a round}
    rows = [timing_row(times, name, baselines=("plain eager",)) for name in times]
    record(Path("results"), "step_cost", settings, rows)              # results/step_cost.json

Times are taken by `torch.utils.benchmark.Timer`, which waits for the device by itself. All steps are timed once in
every round, so that whatever else happens on the machine happens to all of them; ratios are formed within rounds.
"""

from __future__ import annotations

import os
import random
import shlex
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple, TypeVar
from unittest.mock import patch

import torch
import tyro
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table
from torch.utils.benchmark import Measurement, Timer

# The programs in examples/ have the models, and know the machine.
sys.path.append(str(Path(__file__).resolve().parents[1] / "examples"))
from compare_report import write_json
from environment import environment

import apart_func

RESULTS = Path(__file__).parent / "results"

Settings = TypeVar("Settings")
Result = TypeVar("Result")
Row = dict[str, Any]


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
    arguments = sys.argv[1:]
    defaults = quick if "--quick" in arguments else full
    return tyro.cli(
        type(full),
        default=defaults,
        args=[argument for argument in arguments if argument != "--quick"],
        description=f"{description}\n\n--quick: other defaults, for a couple of minutes on two cores.",
    )


def default_device() -> str:
    """The accelerator where there is one."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def interleaved(
    steps: Mapping[str, Callable[[], object]], rounds: int, seconds: float, threads: int, show: Callable[[str], None]
) -> dict[str, list[Measurement]]:
    """Time some functions against each other.

    Args:
        steps: functions by name. Each is called once before the rounds, which compiles it where it compiles.
        rounds: how often each is timed; every round takes them in another order.
        seconds: least time that each gets in a round; it is called at least once, after a call that is not counted.
        threads: of the CPU.
        show: is told the name of each function that has had its turn.

    Returns:
        The measurements by name, one a round.
    """
    torch.set_num_threads(threads)  # Inductor writes the number into the code that it generates
    for name, step in steps.items():
        step()
        show(name)
    timers = {name: Timer("step()", globals={"step": step}, num_threads=threads) for name, step in steps.items()}
    times: dict[str, list[Measurement]] = {name: [] for name in steps}
    orders = random.Random(0)
    for _ in range(rounds):
        for name in orders.sample(list(steps), k=len(steps)):
            times[name].append(timers[name].blocked_autorange(min_run_time=seconds))
            show(name)
    return times


def timing_row(times: Mapping[str, Sequence[Measurement]], name: str, baselines: Iterable[str]) -> Row:
    """What was measured of one function.

    Args:
        times: what `interleaved` returned.
        name: of the function.
        baselines: functions to divide by. Ratios are those of both medians of a round, and spread over the rounds.

    Returns:
        Times in seconds, over all calls, and ratios, over the rounds, as a row for `record`.
    """
    calls = [time for measurement in times[name] for time in measurement.times]
    medians = {function: [measurement.median for measurement in rounds] for function, rounds in times.items()}
    return {"seconds": asdict(spread(calls)), "relative_to": relative_to(medians, name, baselines)}


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


def in_child(function: Callable[..., Result], *arguments: Any, **variables: str) -> Result:
    """Call a function in a new process.

    Args:
        function: one of a module, since it travels to the process by name.
        *arguments: for the function.
        **variables: environment variables for the process.

    Returns:
        What the function returned.
    """
    with patch.dict(os.environ, variables), ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def progress_bar() -> Progress:
    """A bar with the time left and what is being done."""
    return Progress(
        BarColumn(bar_width=None),
        TaskProgressColumn(),
        TimeRemainingColumn(compact=True, elapsed_when_finished=True),
        TextColumn("{task.description}"),
        expand=True,
    )


def record(
    folder: Path, benchmark: str, settings: Any, rows: Sequence[Row], device: str, threads: int
) -> dict[str, Any]:
    """Write what was measured as JSON, with where and how.

    Args:
        folder: where to; it is made if need be.
        benchmark: name of the script.
        settings: its settings, a dataclass.
        rows: what it measured.
        device: what it ran on.
        threads: of the CPU.

    Returns:
        What it wrote.
    """
    content = {
        "benchmark": benchmark,
        "command": shlex.join(["python", f"benchmarks/{benchmark}.py", *_shown_arguments()]),
        "settings": {name: value for name, value in asdict(settings).items() if name != "out"},
        "environment": {
            **environment(),
            "apart_func": apart_func.__version__,
            "device": device,
            "accelerator": torch.cuda.get_device_name(device) if device.startswith("cuda") else None,
            "threads": threads,
            "omp_proc_bind": os.environ.get("OMP_PROC_BIND"),
            "malloc_trim_threshold": os.environ.get("MALLOC_TRIM_THRESHOLD_"),
        },
        "rows": list(rows),
    }
    write_json(result_path(folder, benchmark, device), content)
    return content


def result_path(folder: Path, benchmark: str, device: str) -> Path:
    """Where `record` writes."""
    return folder / f"{benchmark}-{device.partition(':')[0]}.json"


def print_sheets(content: Mapping[str, Any], sheets: Iterable[Sheet]) -> None:
    """Print tables, under a line that says where their numbers were taken.

    Args:
        content: what `record` returned.
        sheets: the tables.
    """
    console = Console()
    console.width = max(console.width, 120)
    console.print(where(content["environment"]), highlight=False)
    for sheet in sheets:
        table = Table(title=sheet.title, title_justify="left")
        for number, column in enumerate(sheet.columns):
            table.add_column(column, justify="right" if number else "left")
        for line in sheet.lines:
            table.add_row(*line)
        console.print(table)


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
