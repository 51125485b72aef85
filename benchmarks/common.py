"""How the benchmarks measure, and how they record it.

    times = interleaved("resnet18", steps, settings)                    # {name: one Measurement a round}
    rows = [timing_row(times, name, baselines=("plain",)) for name in times]
    run_script(__file__, __doc__, Settings(), QUICK, measure, sheets)   # results/step_cost-cpu.json, and a table

Times are taken by `torch.utils.benchmark.Timer`, which waits for the device by itself. All rows are measured once in
every round, so that whatever else happens on the machine happens to all of them; ratios are formed within rounds.
"""

from __future__ import annotations

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
from typing import Any, Literal, NamedTuple, TypeVar
from unittest.mock import patch

import torch
import tyro
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table
from torch.utils.benchmark import Measurement, Timer, timer

# The programs in examples/ have the models, and know the machine.
sys.path.append(str(Path(__file__).resolve().parents[1] / "examples"))
from experiments.environment import environment
from experiments.figures import write_json

import apart_func

RESULTS = Path(__file__).parent / "results"

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
        clock: "cpu" is the processor's time, in which other programs do not count; for one thread.
    """

    seconds: float = 0.3
    clock: Literal["wall", "cpu"] = "wall"

    def __post_init__(self) -> None:
        """Refuse what would be measured wrongly."""
        if self.clock == "cpu" and (self.threads > 1 or self.device != "cpu"):
            raise ValueError(
                f"clock='cpu' adds up the time of all threads and knows no GPU; threads={self.threads} and "
                f"device={self.device!r} were given. Use threads=1 and device='cpu', or clock='wall'."
            )


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
        label: stands beside the bar.
        names: what takes turns.
        rounds: how many.

    Yields:
        The names, one by one.
    """
    names, orders = list(names), random.Random(0)
    columns = (TimeRemainingColumn(compact=True, elapsed_when_finished=True), TextColumn("{task.description}"))
    with Progress(BarColumn(bar_width=None), TaskProgressColumn(), *columns, expand=True) as progress:
        task = progress.add_task(label, total=rounds * len(names))
        for _ in range(rounds):
            for name in orders.sample(names, k=len(names)):
                progress.update(task, description=f"{label}: {name}")
                yield name
                progress.advance(task)
        progress.update(task, description=label)


def interleaved(
    label: str, steps: Mapping[str, Callable[[], object]], settings: TimedRounds
) -> dict[str, list[Measurement]]:
    """Time some functions against each other.

    Args:
        label: what they are, together.
        steps: functions by name. Each is called once before the rounds, which compiles it where it compiles.
        settings: rounds, threads, and the least time for each. It is called at least once a round, after a call that
            is not counted.

    Returns:
        The measurements by name, one a round.
    """
    torch.set_num_threads(settings.threads)  # Inductor writes the number into the code that it generates
    clock = timer if settings.clock == "wall" else time.process_time
    timers = {
        name: Timer("step()", timer=clock, globals={"step": steps[name]}, num_threads=settings.threads)
        for name in steps
    }
    times: dict[str, list[Measurement]] = {name: [] for name in steps}
    for turn, name in enumerate(turns(label, steps, settings.rounds + 1)):
        if turn < len(steps):
            steps[name]()
        else:
            times[name].append(timers[name].blocked_autorange(min_run_time=settings.seconds))
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


def run_script(
    file: str,
    doc: str | None,
    full: Settings,
    quick: Settings,
    measure: Callable[[Settings], list[Row]],
    sheets: Callable[[Mapping[str, Any]], list[Sheet]],
    draw: Callable[[Mapping[str, Any], Path], None] | None = None,
) -> None:
    """Read the command line, measure, write JSON (and a drawing beside it), and print the tables.

    Args:
        file: of the script.
        doc: what `--help` says.
        full: its settings.
        quick: the settings that `--quick` puts in their place.
        measure: the script's.
        sheets: the script's.
        draw: the script's, if it has one.
    """
    settings = command_line(full, quick, doc)
    path, content = record(Path(file).stem, settings, measure(settings))
    if draw:
        draw(content, path.with_suffix(".png"))
    print_sheets(content, sheets(content))


def record(benchmark: str, settings: Rounds, rows: Sequence[Row]) -> tuple[Path, dict[str, Any]]:
    """Write what was measured as JSON, with where and how.

    Args:
        benchmark: name of the script.
        settings: its settings.
        rows: what it measured.

    Returns:
        The file, and what is in it.
    """
    device = settings.device
    content = {
        "benchmark": benchmark,
        "command": shlex.join(["python", f"benchmarks/{benchmark}.py", *_shown_arguments()]),
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
    parts = [benchmark, device.partition(":")[0], settings.name]
    path = settings.out / f"{'-'.join(filter(None, parts))}.json"
    write_json(path, content)
    return path, content


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
