"""How much memory a training step needs at its peak, beyond model and batch.

    python benchmarks/memory.py --quick
    python benchmarks/memory.py --models wrn_40_2 --methods plain APART --device cuda

Every row is measured in a process of its own. On a CPU it is the growth of the largest resident set (VmHWM), since
model and batch were made, on CUDA that of the largest allocation. Memory that is freed is returned at once, so that the
peak is that of what is in use, or handled by glibc's defaults: then some of it stays, and the peak is what a training
run takes from the machine.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from common import (
    Rounds,
    Row,
    Sheet,
    format_ratio,
    in_child,
    relative_to,
    run_script,
    spread,
    turns,
)
from networks import expanded, make_case
from steps import METHODS, Choice, choices, make_step, setting_cells

STEPS = 3
PLAIN = "plain"
PROCESS = Path("/proc/self")


@dataclass(frozen=True)
class Settings(Rounds):
    """What is measured.

    Attributes:
        models: which networks; see networks.py.
        methods: which steps; see steps.py. On a CPU no compiled ones: the compiler's memory would count.
        ratios: shares of the batch in the adversarial pass.
        groups: ghost groups in it, at most half its samples.
        samples: batch sizes; none takes each network's own.
        allocators: what becomes of memory that is freed.
    """

    models: tuple[str, ...] = ("cifar_resnet", "wrn_40_2", "resnet18")
    methods: tuple[str, ...] = tuple(name for name, method in METHODS.items() if not method.compiled)
    ratios: tuple[float, ...] = (1.0, 0.5)
    groups: tuple[int, ...] = (0, 16)
    samples: tuple[int, ...] = ()
    allocators: tuple[Literal["returned", "glibc"], ...] = ("returned", "glibc")

    def __post_init__(self) -> None:
        """Refuse what cannot be measured."""
        compiled = [name for name in self.methods if METHODS[name].compiled]
        if compiled and self.device == "cpu":
            raise ValueError(f"{compiled}: on a CPU the compiler's memory cannot be told from the step's")


# One thread: two stall each other at random when anything else runs on the machine.
QUICK = Settings(
    models=("cifar_resnet",),
    methods=("plain", "APART", "APART drop-in", "one pass", "one pass drop-in"),
    ratios=(1.0,),
    groups=(16,),
    rounds=5,
    threads=1,
)


def growth(choice: Choice, device: str, threads: int) -> int:
    """Run a few steps in this process, and look how its memory grows.

    Args:
        choice: which step.
        device: where to run.
        threads: of the CPU.

    Returns:
        Bytes at the peak, less what model and batch take.
    """
    torch.set_num_threads(threads)
    case = make_case(choice.model, device, choice.samples)
    step = make_step(choice, case)
    before = start_of_peak(device)
    for _ in range(STEPS):
        step()
    return peak(device) - before


def start_of_peak(device: str) -> int:
    """Forget the peak so far, and return the bytes in use."""
    if device != "cpu":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    (PROCESS / "clear_refs").write_text("5")  # sets VmHWM to what is resident now
    return resident("VmRSS")


def peak(device: str) -> int:
    """The most bytes in use since `start_of_peak`."""
    if device != "cpu":
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device)
    return resident("VmHWM")


def resident(field: str) -> int:
    """A field of this process's status, in bytes."""
    for line in (PROCESS / "status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return 1024 * int(line.split()[1])
    raise OSError(f"{PROCESS}/status has no {field}: peak memory on a CPU is measured on Linux only")


def measure(settings: Settings) -> Iterator[Row]:
    """Measure every step in processes of its own.

    Args:
        settings: what to measure.

    Yields:
        A row for each.
    """
    for model, samples, allocator in itertools.product(
        expanded(settings.models), settings.samples or (None,), settings.allocators
    ):
        made = choices(model, samples, settings.methods, settings.ratios, settings.groups)
        chosen = {choice.name: choice for choice in made}
        peaks: dict[str, list[float]] = {name: [] for name in chosen}
        for name in turns(f"{model}, memory {allocator}", chosen, settings.rounds):
            bytes_ = in_child(growth, chosen[name], settings.device, settings.threads, allocator=allocator)
            peaks[name].append(bytes_)
        for name, choice in chosen.items():
            found = {"bytes": asdict(spread(peaks[name])), "relative_to": relative_to(peaks, name, [PLAIN])}
            yield choice.labels() | {"allocator": allocator} | found


def sheets(content: Mapping[str, Any]) -> list[Sheet]:
    """The table.

    Args:
        content: what was recorded.

    Returns:
        A line for every step.
    """
    columns = ["step", "ratio", "groups", "network", "batch", "memory", "peak (IQR)", "/ plain (IQR)"]
    return [Sheet("peak memory of a step, beyond model and batch", columns, [line(row) for row in content["rows"]])]


def line(row: Row) -> list[str]:
    """The cells of a step."""
    megabytes = f"{row['bytes']['median'] / 2**20:.1f} MiB ({row['bytes']['iqr'] / 2**20:.1f})"
    ratio = format_ratio(row["relative_to"].get(PLAIN), digits=3)
    labels = [row["model"], str(row["samples"]), row["allocator"]]
    return [row["method"], *setting_cells(row), *labels, megabytes, ratio]


if __name__ == "__main__":
    run_script(__file__, __doc__, Settings(), QUICK, measure, sheets)
