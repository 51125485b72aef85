"""What several ranks cost: the collective calls and bytes of a step, and its time on one and two ranks.

    python benchmarks/ranks.py
    python benchmarks/ranks.py --network ten_layers --ranks 1 2 4

Every way of training takes steps in a world of gloo ranks on this machine, each with a batch of its own. Calls are
counted as PyTorch dispatches them, those of DistributedDataParallel included, in the third step; bytes are what a rank
hands to them. A time is that on the wall of a step of rank 0, gradients only, after a barrier. Ranks share the cores
and the memory of one machine, so that a step on two of them is slower by more than its communication.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from methods import RADIUS, RHO, Step
from networks import ALL, Case, ghost_groups, make_case
from timing import Row, Table, arguments, as_ratio, as_seconds, interleaved, median_of, ratios, run
from torch import nn
from torch.multiprocessing.spawn import spawn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

from apart_func import APART, make_apart_sam_step, make_apart_step, make_one_pass_step, split_state

PLAIN = "plain, DDP"


def plain(case: Case, groups: int) -> Step:
    """Plain training in DistributedDataParallel."""
    wrapped = DistributedDataParallel(case.model)
    return lambda: F.cross_entropy(wrapped(case.batch[0]), case.batch[1]).backward()


def two_passes(case: Case, groups: int, reduces_once: bool = False) -> Step:
    """Both passes of the drop-in, with a reduction in each or in the second alone."""
    wrapped = DistributedDataParallel(case.model)
    apart = APART(wrapped, RADIUS, groups)

    def step() -> None:
        with apart.to_proxy(), wrapped.no_sync() if reduces_once else contextlib.nullcontext():
            (F.cross_entropy(wrapped(case.batch[0]), case.batch[1]) / 2).backward()
        with apart.to_adver():
            (F.cross_entropy(wrapped(case.batch[0]), case.batch[1]) / 2).backward()

    return step


def one_pass(case: Case, groups: int) -> Step:
    """The one pass of the drop-in."""
    wrapped = DistributedDataParallel(case.model)
    apart = APART(wrapped, RADIUS, groups)

    def step() -> None:
        with apart.one_pass():
            F.cross_entropy(wrapped(case.batch[0]), case.batch[1]).backward()

    return step


def functional(case: Case, groups: int, make: Callable[..., Any], synchronised: bool = False, **options: Any) -> Step:
    """A functional step, which reduces by itself."""
    model = nn.SyncBatchNorm.convert_sync_batchnorm(case.model) if synchronised else case.model
    step = make(model, F.cross_entropy, epsilon=RADIUS, groups=groups, process_group="world", **options)
    state = split_state(model)
    return lambda: step(*state, case.batch)


WAYS: dict[str, Callable[[Case, int], Step]] = {
    PLAIN: plain,
    "two passes, drop-in, DDP": two_passes,
    "the same, no_sync in the proxy pass": partial(two_passes, reduces_once=True),
    "one pass, drop-in, DDP": one_pass,
    "two passes": partial(functional, make=make_apart_step),
    "one pass": partial(functional, make=make_one_pass_step),
    "APART-SAM": partial(functional, make=make_apart_sam_step, rho=RHO),
    "two passes, SyncBatchNorm": partial(functional, make=make_apart_step, synchronised=True),
    "one pass, SyncBatchNorm": partial(functional, make=make_one_pass_step, synchronised=True),
}


class Collectives(TorchDispatchMode):
    """Counts the collective calls that are dispatched, and the bytes that this rank hands to them, by kind."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch leaves it so
        self.calls: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count a call."""
        if func.namespace == "c10d":
            name = func.overloadpacket.__name__.strip("_")
            self.calls[name] += 1
            self.bytes[name] += sum(tensor.nbytes for tensor in args[0])
        return func(*args, **(kwargs or {}))


def on_rank(rank: int, ranks: int, settings: argparse.Namespace, folder: str) -> None:
    """Measure all ways on one of several ranks; rank 0 writes what it finds."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    warnings.filterwarnings("ignore", message=".*SyncBatchNorm.*")
    torch.set_num_threads(settings.threads)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store{ranks}", rank=rank, world_size=ranks)
    steps, counted = {}, {}
    for way, make in WAYS.items():
        case = make_case(settings.network, samples=settings.samples)
        steps[way] = make(case, ghost_groups(settings.samples))
        for _ in range(2):
            steps[way]()  # DistributedDataParallel makes its buckets again after the first
        with Collectives() as counted[way]:
            steps[way]()
    timers = {way: partial(after_barrier, step) for way, step in steps.items()}
    seconds = interleaved(f"{settings.network} on {ranks}, rank {rank}", timers, settings.rounds)
    dist.destroy_process_group()
    rows = [
        {"ranks": ranks, "network": settings.network, "samples": settings.samples, "step": way}
        | {"calls": counted[way].calls, "bytes": counted[way].bytes}
        | {"seconds": median_of(seconds[way]), "ratio": median_of(ratios(seconds[way], seconds[PLAIN]))}
        for way in steps
    ]
    if rank == 0:
        Path(folder, f"{ranks}.json").write_text(json.dumps(rows), encoding="utf-8")


def after_barrier(step: Step) -> float:
    """Seconds of a step that all ranks begin together."""
    dist.barrier()
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def measure(settings: argparse.Namespace) -> Iterator[Row]:
    """Start a world for every number of ranks.

    Yields:
        A row for every way and number of ranks.
    """
    with tempfile.TemporaryDirectory() as folder:
        for ranks in settings.ranks:
            spawn(on_rank, (ranks, settings, folder), nprocs=ranks)
            yield from json.loads(Path(folder, f"{ranks}.json").read_text(encoding="utf-8"))


def table(rows: Sequence[Row]) -> Table:
    """A line for every way: calls and bytes of the largest world, and the time in every world."""
    worlds = list(dict.fromkeys(row["ranks"] for row in rows))
    lines = []
    for way in dict.fromkeys(row["step"] for row in rows):
        found = [row for row in rows if row["step"] == way]
        counts = [found[-1][what].get(kind, 0) for kind in ("allreduce", "broadcast") for what in ("calls", "bytes")]
        quotients = [as_ratio(row["ratio"]) for row in found]
        lines.append([way, *map(str, counts), as_seconds(found[-1]["seconds"]), *quotients])
    columns = [f"{ranks} rank{'s' * (ranks > 1)}: / plain" for ranks in worlds]
    return Table(["step", "all-reduces", "bytes", "broadcasts", "bytes", f"on {worlds[-1]} ranks", *columns], lines)


def parsed(line: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = arguments(__doc__, rounds=9)
    parser.add_argument("--network", default="resnet", choices=list(ALL), metavar="NETWORK")
    parser.add_argument("--samples", type=int, default=32, help="of each rank's batch")
    parser.add_argument("--ranks", nargs="+", type=int, default=[1, 2], help="numbers of ranks")
    settings = parser.parse_args(line)
    if settings.quick:
        settings.rounds = 6
    return settings


if __name__ == "__main__":
    run(__file__, parsed(), measure, table)
