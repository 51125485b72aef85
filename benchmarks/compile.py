"""How large the compiled step is, and how long it takes to compile with an empty cache.

    python benchmarks/compile.py                       ResNet-18: some ten minutes
    python benchmarks/compile.py --quick               a tiny network: two minutes
    python benchmarks/compile.py --nodes               its nodes alone, without Inductor
    python benchmarks/compile.py --nodes --against ../older

A node is an operator or an argument in the graphs that AOTAutograd hands to Inductor, with Inductor's decompositions.
Compiling is measured in a process of its own that has compiled a trivial function before, so that what Inductor loads
and sets up once does not count: the first call of a step with an empty cache, less the second. On a CPU it is processor
time, that of the C++ compiler included, with one worker of Inductor's. Every figure is printed when it is there.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from methods import ONE_GRAPH, functional, plain_compiled
from networks import ALL, Case, ghost_groups, make_case
from timing import ROOT, Row, Table, Worker, arguments, as_seconds, median_of, processor_seconds, run
from torch.utils.benchmark import timer

PLAIN = "plain functional"
COMPILES = ("plain", PLAIN, "one pass", "two passes")
COUNTED = (PLAIN, "one pass", "two passes")
QUICK_NETWORK = "tiny"  # which --quick takes


def count_nodes(network: str, name: str, settings: argparse.Namespace) -> dict[str, int]:
    """Trace a step in this process, and count the nodes of its graphs by operator."""
    from torch._dynamo.backends.common import aot_autograd
    from torch._functorch._aot_autograd.utils import make_boxed_func
    from torch._inductor.decomposition import select_decomp_table

    nodes: Counter[str] = Counter()

    def count(graph: torch.fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        nodes.update(str(node.target) if node.op == "call_function" else node.op for node in graph.graph.nodes)
        return make_boxed_func(graph.forward)

    backend: Any = aot_autograd(fw_compiler=count, bw_compiler=count, decompositions=select_decomp_table)
    made_step(case_of(network, settings), name, partial(ONE_GRAPH, backend=backend))()
    return dict(nodes.most_common())


def compile_seconds(network: str, name: str, settings: argparse.Namespace) -> float:
    """Compile a step in this process: seconds of its first call, less those of the second."""
    clock = processor_seconds if settings.device == "cpu" else timer
    torch.compile(lambda x: x + 1)(torch.ones(2, device=settings.device))
    step = made_step(case_of(network, settings), name, ONE_GRAPH)
    times = []
    for _ in range(2):
        start = clock()
        step()
        times.append(clock() - start)
    return times[0] - times[1]


def case_of(network: str, settings: argparse.Namespace) -> Case:
    """The network with its batch."""
    return make_case(network, settings.device, settings.samples)


def made_step(case: Case, name: str, compiler: Callable[..., Any]) -> Callable[[], object]:
    """A step that is compiled at its first call."""
    groups = ghost_groups(len(case.batch[1]))
    return plain_compiled(case, groups, compiler) if name == "plain" else functional(case, groups, name, compiler)


def measure(settings: argparse.Namespace) -> Iterator[Row]:
    """Count nodes, and then compile.

    Yields:
        A row for every step and checkout, with `nodes` or with `seconds`.
    """
    network = QUICK_NETWORK if settings.quick else settings.network
    checkouts = {"here": ROOT} | ({"there": settings.against} if settings.against else {})
    for checkout, path in checkouts.items():
        for name in COUNTED:
            with Worker(path, threads=settings.threads) as worker:
                nodes = worker(count_nodes, network, name, settings)
            yield said({"network": network, "step": name, "checkout": checkout, "nodes": nodes})
    if settings.nodes:
        return
    for checkout, path in checkouts.items():
        for name in COMPILES:
            seconds = []
            for _ in range(settings.rounds):
                with TemporaryDirectory() as cache:
                    own = {"TORCHINDUCTOR_CACHE_DIR": cache, "TORCHINDUCTOR_COMPILE_THREADS": "1"}
                    with Worker(path, threads=settings.threads, **own) as worker:
                        seconds.append(worker(compile_seconds, network, name, settings))
            yield said({"network": network, "step": name, "checkout": checkout, "seconds": median_of(seconds)})


def said(row: Row) -> Row:
    """Print a row as soon as it is there."""
    figure = f"{sum(row['nodes'].values())} nodes" if "nodes" in row else as_seconds(row["seconds"])
    print(f"{row['network']}, {row['step']}, {row['checkout']}: {figure}", flush=True)
    return row


def table(rows: Sequence[Row]) -> Table:
    """A line for every step: its nodes and its time, also as multiples of the plain functional step's."""
    lines = []
    for network, checkout in dict.fromkeys((row["network"], row["checkout"]) for row in rows):
        here = [row for row in rows if (row["network"], row["checkout"]) == (network, checkout)]
        nodes = {row["step"]: sum(row["nodes"].values()) for row in here if "nodes" in row}
        seconds = {row["step"]: row["seconds"] for row in here if "seconds" in row}
        for step in dict.fromkeys(row["step"] for row in here):
            line = [f"{step}, {network}", checkout, *("" for _ in range(4))]
            if step in nodes:
                line[2:4] = [str(nodes[step]), f"{nodes[step] / nodes[PLAIN]:.2f}" if PLAIN in nodes else ""]
            if step in seconds:
                line[4] = as_seconds(seconds[step])
            if step in seconds and PLAIN in seconds:
                line[5] = f"{seconds[step]['median'] / seconds[PLAIN]['median']:.2f}"
            lines.append(line)
    return Table(["step", "", "nodes", "/ plain functional", "cold compile", "/ plain functional"], lines)


def parsed(line: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = arguments(__doc__, rounds=1)
    parser.add_argument("--network", default="resnet18", choices=list(ALL), metavar="NETWORK")
    parser.add_argument("--samples", type=int, help="batch size; the network's own by default")
    parser.add_argument("--nodes", action="store_true", help="count nodes and compile nothing")
    parser.add_argument("--against", type=Path, help="root of another checkout to compare this one with")
    return parser.parse_args(line)


if __name__ == "__main__":
    run(__file__, parsed(), measure, table)
