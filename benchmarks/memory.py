"""How much memory a training step takes at its peak, beyond model and batch.

    python benchmarks/memory.py
    python benchmarks/memory.py --networks resnet18 --samples 512 --device cuda

Every figure is that of a process of its own: on a CPU the growth of its largest resident set (VmHWM) since model and
batch were made, on a GPU that of the largest allocation. Freed memory is returned at once, so that the peak is that of
what is in use; with `--memory glibc` some of it stays, and the peak is what a training run takes from the machine.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import torch
from methods import METHODS, Step
from networks import ALL, ghost_groups, make_case
from timing import ROOT, Row, Table, Worker, arguments, as_ratio, interleaved, median_of, ratios, run

PLAIN = "plain"
EAGER = (PLAIN, "two passes", "one pass", "two passes, drop-in", "one pass, drop-in")
STEPS = 3
PROCESS = Path("/proc/self")


def growth(network: str, method: str, settings: argparse.Namespace) -> int:
    """Take a few steps in this process: bytes at the peak, less what model and batch take."""
    case = make_case(network, settings.device, settings.samples)
    return peak_of(METHODS[method](case, ghost_groups(len(case.batch[1]))), settings.device)


def peak_of(step: Step, device: str) -> int:
    """Bytes that a few calls of a step take at their peak, beyond those in use before."""
    if device == "cpu":
        (PROCESS / "clear_refs").write_text("5")  # sets VmHWM to what is resident now
        before = resident("VmRSS")
    else:
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
    for _ in range(STEPS):
        step()
    if device == "cpu":
        return resident("VmHWM") - before
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def resident(field: str) -> int:
    """A field of this process's status, in bytes."""
    for line in (PROCESS / "status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return 1024 * int(line.split()[1])
    raise OSError(f"{PROCESS}/status has no {field}: peak memory on a CPU is measured on Linux only")


def in_worker(path: Path, network: str, method: str, settings: argparse.Namespace) -> float:
    """The growth of a process of its own."""
    with Worker(path, settings.memory, settings.threads) as worker:
        return worker(growth, network, method, settings)


def measure(settings: argparse.Namespace) -> Iterator[Row]:
    """Measure the steps of a network in turn, then those of the next.

    Yields:
        A row for every network and step.
    """
    path = settings.against or ROOT
    for network in settings.networks:
        measures = {name: partial(in_worker, path, network, name, settings) for name in settings.methods}
        peaks = interleaved(f"memory of {network}", measures, settings.rounds)
        for method, values in peaks.items():
            quotients = ratios(values, peaks[settings.methods[0]])
            yield {"network": network, "step": method, "bytes": median_of(values), "ratio": median_of(quotients)}


def table(rows: Sequence[Row]) -> Table:
    """A line for every step."""
    lines = [
        [row["network"], row["step"], f"{row['bytes']['median'] / 2**20:.1f} MiB", as_ratio(row["ratio"])]
        for row in rows
    ]
    return Table(["network", "step", "peak", "/ plain"], lines)


def parsed(line: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = arguments(__doc__, rounds=7)
    parser.add_argument("--networks", nargs="+", default=["resnet"], choices=list(ALL), metavar="NETWORK")
    parser.add_argument("--methods", nargs="+", default=list(EAGER), choices=list(METHODS), metavar="METHOD")
    parser.add_argument("--samples", type=int, help="batch size; each network's own by default")
    parser.add_argument("--memory", choices=["returned", "glibc"], default="returned", help="that is freed")
    parser.add_argument("--against", type=Path, help="root of another checkout, to be measured in place of this one")
    settings = parser.parse_args(line)
    if settings.quick:
        settings.rounds, settings.methods = 3, list(EAGER[:3])
    return settings


if __name__ == "__main__":
    run(__file__, parsed(), measure, table)
