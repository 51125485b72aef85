"""What several ranks cost: collective calls and bytes of a step, its time on one and two ranks, and a model of more.

    python benchmarks/distributed.py --quick

Every way of training takes steps in a world of gloo ranks on this machine, each with a batch of its own. Calls are
counted as PyTorch dispatches them, those of DistributedDataParallel included, in a step after the first; bytes are what
a rank hands to them, and beside them stands what the model below takes them for. A time is that of a step of rank 0,
gradients only, after a barrier; the rows of a network take turns. Ranks share the cores and the memory of one machine,
so a step on two of them is slower by more than its communication.

The model of many GPUs adds up what the counted calls would take there:

    one all-reduce of n bytes over W GPUs    latency(W) + 2 (W − 1)/W · n / bandwidth(W)
    W ≤ 8: one node                          20 μs, 350 GB/s (NVLink of an H100)
    W > 8                                    20 μs + 10 μs · log2(W/8), 40 GB/s (an adapter of 400 Gbit/s a GPU)

It is of ResNet-50 (25.6 M parameters, 53 layers of batch norm with 26560 channels together, float32 gradients, 16 ghost
groups), of which a plain step of 256 images is taken to last 100 ms on each GPU, two thirds of it in the backward. What
DistributedDataParallel reduces hides behind its own backward but for the last 25 MiB; nothing else hides. A straggler,
other jobs on the network and the loading of data are left out. None of these numbers was measured here: they are the
settings `latency`, `hop`, `bandwidths` and `seconds` of this script.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import random
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from common import Rounds, Row, Sheet, format_ratio, format_seconds, relative_to, run_script, spread
from networks import make_case
from torch import Tensor, nn
from torch.multiprocessing.spawn import spawn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

from apart_func import (
    APART,
    init_perturbation,
    make_apart_sam_step,
    make_apart_step,
    make_one_pass_step,
    sign_perturbation,
    split_state,
)

PLAIN = "plain, DDP"


@dataclass(frozen=True)
class Settings(Rounds):
    """What is measured.

    Attributes:
        models: which networks; see networks.py.
        samples: of each rank's batch.
        groups: ghost groups of the perturbed samples.
        ranks: numbers of ranks.
        calls: steps a round.
        gpus: numbers of GPUs in the model.
        latency: of an all-reduce on one node, in seconds.
        hop: what every doubling of the nodes adds to it.
        bandwidths: on one node and between nodes, in bytes a second.
        seconds: of a plain step of the modelled network on one GPU.
    """

    models: tuple[str, ...] = ("cifar_resnet", "overhead")
    samples: int = 128
    groups: int = 16
    ranks: tuple[int, ...] = (1, 2)
    calls: int = 1
    gpus: tuple[int, ...] = (8, 64, 1024)
    latency: float = 20e-6
    hop: float = 10e-6
    bandwidths: tuple[float, float] = (350e9, 40e9)
    seconds: float = 0.1
    threads: int = 1
    device: str = "cpu"


QUICK = Settings(models=("cifar_resnet",), samples=32, rounds=5)


# Ways to train: from a model, a batch and ghost groups to a function that leaves or returns the gradients of a step.

Step = Callable[[], object]
Batch = tuple[Tensor, Tensor]


def plain(model: nn.Module, batch: Batch, groups: int) -> Step:
    """Plain training in DistributedDataParallel."""
    wrapped = DistributedDataParallel(model)
    return lambda: F.cross_entropy(wrapped(batch[0]), batch[1]).backward()


def two_drop_in(model: nn.Module, batch: Batch, groups: int, reduces_once: bool = False) -> Step:
    """Both passes of the drop-in, with a reduction in each or in the second alone."""
    wrapped = DistributedDataParallel(model)
    apart = APART(wrapped, groups=groups)

    def step() -> None:
        with apart.to_proxy(), wrapped.no_sync() if reduces_once else contextlib.nullcontext():
            (F.cross_entropy(wrapped(batch[0]), batch[1]) / 2).backward()
        with apart.to_adver():
            (F.cross_entropy(wrapped(batch[0]), batch[1]) / 2).backward()

    return step


def one_drop_in(model: nn.Module, batch: Batch, groups: int) -> Step:
    """One pass of the drop-in, by the signs of the gradient; random ones send less."""
    wrapped = DistributedDataParallel(model)
    apart = APART(wrapped, groups=groups, rule=sign_perturbation)

    def step() -> None:
        with apart.one_pass():
            F.cross_entropy(wrapped(batch[0]), batch[1]).backward()

    return step


def functional(make: Callable[..., Any], synchronised: bool = False) -> Callable[[nn.Module, Batch, int], Step]:
    """A functional step, which reduces by itself."""

    def way(model: nn.Module, batch: Batch, groups: int) -> Step:
        if synchronised:
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        carries = make is make_one_pass_step
        options = {"rule": sign_perturbation} if carries else {}
        step = make(model, F.cross_entropy, epsilon=0.1, groups=groups, process_group="world", **options)
        state = (*split_state(model), batch)
        more = (init_perturbation(model),) if carries else ()
        return lambda: step(*state, *more)

    return way


WAYS: dict[str, Callable[[nn.Module, Batch, int], Step]] = {
    PLAIN: plain,
    "APART drop-in, DDP": two_drop_in,
    "the same, no_sync in the proxy pass": partial(two_drop_in, reduces_once=True),
    "one pass drop-in, DDP": one_drop_in,
    "APART": functional(make_apart_step),
    "one pass": functional(make_one_pass_step),
    "APART-SAM": functional(make_apart_sam_step),
    "APART, SyncBatchNorm": functional(make_apart_step, synchronised=True),
    "one pass, SyncBatchNorm": functional(make_one_pass_step, synchronised=True),
}


# What a step sends, as a formula; the table has what was counted beside it.


class Shape(NamedTuple):
    """What matters of a network.

    Attributes:
        parameters: how many numbers are trained.
        channels: of all layers of batch norm together.
        layers: of batch norm.
        groups: ghost groups.
    """

    parameters: int
    channels: int
    layers: int
    groups: int


class Call(NamedTuple):
    """All-reduces of a step that are alike.

    Attributes:
        size: bytes of all of them together.
        times: how many there are.
        hidden: whether they run while a backward does.
    """

    size: int
    times: int = 1
    hidden: bool = False


RESNET50 = Shape(parameters=25_557_032, channels=26_560, layers=53, groups=16)


def sent(way: str, shape: Shape) -> list[Call]:
    """The all-reduces of a step in float32."""
    gradients, statistics = 4 * shape.parameters, Call(4 * 5 * shape.channels)
    bucket = Call(gradients + 4 * (2 * shape.channels + 3))

    def layers(groups: int) -> Call:
        """Moments of a pass and their gradients, in float64."""
        return Call(2 * 8 * (2 * groups * shape.channels + shape.layers), 2 * shape.layers)

    found = {
        PLAIN: [Call(gradients, hidden=True)],
        "APART drop-in, DDP": [Call(gradients, hidden=True)] * 2 + [statistics],
        "the same, no_sync in the proxy pass": [Call(gradients, hidden=True), statistics],
        "one pass drop-in, DDP": [Call(gradients, hidden=True), statistics],
        "APART": [bucket, statistics],
        "one pass": [bucket, statistics],
        "APART-SAM": [bucket, statistics, Call(gradients)],
        "APART, SyncBatchNorm": [bucket, statistics, layers(1), layers(shape.groups)],
        "one pass, SyncBatchNorm": [bucket, statistics, layers(shape.groups)],
    }
    return found[way]


def passes(way: str) -> int:
    """Forwards and backwards of a step."""
    return 1 if way.startswith(("plain", "one pass")) else 2


def modelled(way: str, gpus: int, settings: Mapping[str, Any], shape: Shape = RESNET50) -> float:
    """Seconds of a step that are communication and hide behind nothing.

    Args:
        way: of training.
        gpus: how many.
        settings: with the assumptions.
        shape: of the network.
    """
    nodes = max(gpus / 8, 1)
    latency = settings["latency"] + settings["hop"] * math.log2(nodes)
    bandwidth = settings["bandwidths"][gpus > 8]

    def seconds(call: Call) -> float:
        return float(call.times * latency + 2 * (gpus - 1) / gpus * call.size / bandwidth)

    backward, last_bucket = 2 / 3 * settings["seconds"], Call(25 * 2**20)
    return sum(
        max(seconds(last_bucket), seconds(call) - backward) if call.hidden else seconds(call)
        for call in sent(way, shape)
    )


# Measuring.


class Counted(TorchDispatchMode):
    """Notes the collective calls that are dispatched.

    Attributes:
        calls: how many there were, by kind.
        size: bytes that this rank handed to them, likewise.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch leaves it so
        self.calls: dict[str, int] = {}
        self.size: dict[str, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Note a call."""
        if func.namespace == "c10d":
            name, tensors = func.overloadpacket.__name__.strip("_"), args[0]
            self.calls[name] = self.calls.get(name, 0) + 1
            self.size[name] = self.size.get(name, 0) + sum(t.numel() * t.element_size() for t in tensors)
        return func(*args, **(kwargs or {}))


def shape_of(model: nn.Module, groups: int) -> Shape:
    """What matters of a model."""
    layers = [shift.mean.numel() for shift in init_perturbation(model).values()]
    return Shape(sum(p.numel() for p in model.parameters()), sum(layers), len(layers), groups)


def on_rank(rank: int, ranks: int, settings: Settings, folder: str) -> None:
    """Measure all ways on one of several ranks; rank 0 writes what it finds."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    warnings.filterwarnings("ignore", message=".*SyncBatchNorm.*")
    torch.set_num_threads(settings.threads)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store{ranks}", rank=rank, world_size=ranks)
    rows = [row | {"ranks": ranks} for name in settings.models for row in rows_of(name, settings, rank)]
    dist.destroy_process_group()
    if rank == 0:
        Path(folder, f"{ranks}.json").write_text(json.dumps(rows), encoding="utf-8")


def rows_of(name: str, settings: Settings, rank: int) -> list[Row]:
    """Count and time the steps of one network."""
    steps, counts = {}, {}
    for way, make in WAYS.items():
        model, batch = make_case(name, samples=settings.samples)
        shape = shape_of(model, settings.groups)
        steps[way] = make(model, batch, settings.groups)
        steps[way]()
        steps[way]()  # DistributedDataParallel makes its buckets anew after the first
        with Counted() as counts[way]:
            steps[way]()
    seconds: dict[str, list[float]] = {way: [] for way in steps}
    orders = random.Random(0)
    for number in range(settings.rounds):
        if rank == 0:
            print(f"{name} on {dist.get_world_size()}: round {number + 1}", file=sys.stderr, flush=True)
        for way in orders.sample(list(steps), k=len(steps)):
            dist.barrier()
            start = time.perf_counter()
            for _ in range(settings.calls):
                steps[way]()
            seconds[way].append((time.perf_counter() - start) / settings.calls)
    return [
        {
            "model": name,
            "way": way,
            "calls": counts[way].calls,
            "bytes": counts[way].size,
            "formula": {
                "calls": sum(call.times for call in sent(way, shape)),
                "bytes": sum(call.size for call in sent(way, shape)),
            },
            "seconds": asdict(spread(seconds[way])),
            "relative_to": relative_to(seconds, way, [PLAIN]),
        }
        for way in steps
    ]


def measure(settings: Settings) -> Iterator[Row]:
    """Start a world for every number of ranks.

    Args:
        settings: which.

    Yields:
        A row for every network, way and number of ranks.
    """
    with tempfile.TemporaryDirectory() as folder:
        for ranks in settings.ranks:
            spawn(on_rank, (ranks, settings, folder), nprocs=ranks)
            yield from json.loads(Path(folder, f"{ranks}.json").read_text(encoding="utf-8"))


def sheets(content: Mapping[str, Any]) -> list[Sheet]:
    """The tables.

    Args:
        content: what was recorded.

    Returns:
        For every network and number of ranks what was counted and timed, and then the model.
    """
    settings, rows = content["settings"], content["rows"]
    columns = ["step", "all-reduces", "bytes", "by formula", "broadcasts", "bytes", "time (IQR)", "/ plain (IQR)"]
    blocks = dict.fromkeys((row["model"], row["ranks"]) for row in rows)
    found = [
        Sheet(
            f"{model}, {ranks} rank{'s' * (ranks > 1)}, batch of {settings['samples']} on each",
            columns,
            [_cells(row) for row in rows if (row["model"], row["ranks"]) == (model, ranks)],
        )
        for model, ranks in blocks
    ]
    return [*found, model_sheet(settings)]


def _cells(row: Row) -> Sequence[str]:
    reduced, sent_on = (str(row[key].get("allreduce", 0)) for key in ("calls", "bytes"))
    formula = row["formula"]
    return [
        row["way"],
        reduced,
        sent_on,
        f"{formula['calls']}: {formula['bytes']}" if row["ranks"] > 1 else "",
        *(str(row[key].get("broadcast", 0)) for key in ("calls", "bytes")),
        format_seconds(row["seconds"]),
        format_ratio(row["relative_to"].get(PLAIN)),
    ]


def model_sheet(settings: Mapping[str, Any]) -> Sheet:
    """Communication that hides behind nothing, and its share of the arithmetic of the step, for many GPUs."""
    lines = []
    for way in WAYS:
        calls = sent(way, RESNET50)
        size = sum(call.size for call in calls)
        cells = []
        for gpus in settings["gpus"]:
            waits = modelled(way, gpus, settings)
            cells.append(f"{1e3 * waits:.1f} ms ({waits / (passes(way) * settings['seconds']):.1%})")
        lines.append([way, str(sum(call.times for call in calls)), f"{size / 1e6:.1f} MB", *cells])
    heads = ["step", "all-reduces", "bytes", *(f"{gpus} GPUs" for gpus in settings["gpus"])]
    return Sheet(
        "modelled, not measured: ResNet-50, communication that hides behind nothing (share of the arithmetic)",
        heads,
        lines,
    )


if __name__ == "__main__":
    run_script(__file__, __doc__, Settings(), QUICK, measure, sheets)
