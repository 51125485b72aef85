"""How long the step takes to compile, and what it is compiled to.

    python benchmarks/compile.py --quick
    python benchmarks/compile.py --models cifar_resnet --repeats 5

    cold       first call with an empty cache             warm     first call of another process with that cache
    frames     functions that Dynamo traced               graphs   that were handed to the compiler
    nodes      in these, operators of ATen and arguments  kernels  that Inductor wrote

Every time is taken in a process of its own, after Inductor has compiled a trivial function, so that what it loads and
sets up once does not count. The time of a later step is taken off.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch
from common import (
    RESULTS,
    Row,
    Sheet,
    command_line,
    default_device,
    format_ratio,
    format_seconds,
    in_child,
    print_sheets,
    progress_bar,
    record,
    relative_to,
    spread,
)
from networks import make_case
from steps import METHODS, ONE_GRAPH, Choice, choices, make_step
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounterWithBackend
from torch._functorch._aot_autograd.utils import make_boxed_func
from torch.utils.benchmark import Timer, timer

COMPILED = tuple(name for name, method in METHODS.items() if method.compiled)
BASELINES = ("plain compiled", "plain one graph")


@dataclass(frozen=True)
class Settings:
    """What is measured.

    Attributes:
        models: which networks; see networks.py.
        methods: which steps; see steps.py.
        ratios: shares of the batch in the adversarial pass.
        groups: ghost groups in it, at most half its samples.
        samples: batch size; None takes each network's own.
        repeats: how often each is compiled, in turn with the others.
        threads: of the CPU.
        device: where to run.
        out: folder for the JSON file.
    """

    models: tuple[str, ...] = ("overhead", "cifar_resnet")
    methods: tuple[str, ...] = COMPILED
    ratios: tuple[float, ...] = (1.0,)
    groups: tuple[int, ...] = (0, 16)
    samples: int | None = None
    repeats: int = 5
    threads: int = os.cpu_count() or 1
    device: str = default_device()
    out: Path = RESULTS


# One thread: two stall each other at random when anything else runs on the machine.
QUICK = Settings(models=("tiny",), groups=(16,), repeats=1, threads=1)


class FirstCall(NamedTuple):
    """What a process found when it compiled a step.

    Attributes:
        seconds: time of the first call, less that of another.
        kernels: written by Inductor, where they were not cached.
    """

    seconds: float
    kernels: int


class Graphs(NamedTuple):
    """What a step is to the compiler.

    Attributes:
        frames: functions traced, over some calls of the step.
        graphs: handed to the compiler, forward and backward ones.
        nodes: in all of these.
    """

    frames: int
    graphs: int
    nodes: int


class Compiled(NamedTuple):
    """A step, compiled twice.

    Attributes:
        cold: with an empty cache.
        warm: with that of the first.
        graphs: what was compiled.
    """

    cold: FirstCall
    warm: FirstCall
    graphs: Graphs


def first_call(choice: Choice, device: str, threads: int) -> FirstCall:
    """Compile a step in this process.

    Args:
        choice: which step.
        device: where to run.
        threads: of the CPU.

    Returns:
        How long it took, and what came out.
    """
    from torch._inductor import metrics

    torch.set_num_threads(threads)
    torch.compile(lambda x: x + 1)(torch.ones(2, device=device))
    metrics.reset()
    step = make_step(choice, make_case(choice.model, device, choice.samples))
    start = timer()
    step()
    first = timer() - start
    kernels = metrics.generated_kernel_count
    later = Timer("step()", globals={"step": step}, num_threads=threads).blocked_autorange().median
    return FirstCall(first - later, kernels)


def count_graphs(choice: Choice, device: str) -> Graphs:
    """Trace a step and count, without compiling it.

    Args:
        choice: which step.
        device: where its tensors are.

    Returns:
        The counts.
    """
    from torch._inductor.decomposition import select_decomp_table

    sizes: list[int] = []

    def count(graph: torch.fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        sizes.append(len(graph.graph.nodes))
        return make_boxed_func(graph.forward)

    inner: Any = aot_autograd(fw_compiler=count, bw_compiler=count, decompositions=select_decomp_table)
    backend = CompileCounterWithBackend(inner)
    step = make_step(choice, make_case(choice.model, device, choice.samples), partial(ONE_GRAPH, backend=backend))
    for _ in range(3):
        step()
    return Graphs(backend.frame_count, len(sizes), sum(sizes))


def later_process(choice: Choice, device: str, threads: int) -> tuple[FirstCall, Graphs]:
    """Compile a step with what another process has cached, and count."""
    warm = first_call(choice, device, threads)
    torch._dynamo.reset()
    return warm, count_graphs(choice, device)


def cold_and_warm(choice: Choice, device: str, threads: int) -> Compiled:
    """Compile a step in two processes, the second of which finds what the first has cached."""
    with TemporaryDirectory() as cache:
        cold = in_child(first_call, choice, device, threads, TORCHINDUCTOR_CACHE_DIR=cache)
        warm, graphs = in_child(later_process, choice, device, threads, TORCHINDUCTOR_CACHE_DIR=cache)
    return Compiled(cold, warm, graphs)


def measure(settings: Settings) -> list[Row]:
    """Compile every step.

    Args:
        settings: what to measure.

    Returns:
        A row for each.
    """
    rows: list[Row] = []
    with progress_bar() as progress:
        for model in settings.models:
            chosen = choices(model, settings.samples, settings.methods, settings.ratios, settings.groups)
            task = progress.add_task(model, total=len(chosen) * settings.repeats)
            found: dict[str, list[Compiled]] = {choice.name: [] for choice in chosen}
            for _ in range(settings.repeats):
                for choice in chosen:
                    progress.update(task, description=f"{model}: {choice.name}")
                    found[choice.name].append(cold_and_warm(choice, settings.device, settings.threads))
                    progress.advance(task)
            progress.update(task, description=model)
            cold = {name: [each.cold.seconds for each in repeats] for name, repeats in found.items()}
            for choice in chosen:
                row = choice.labels()
                row["cold_seconds"] = asdict(spread(cold[choice.name]))
                row["warm_seconds"] = asdict(spread([each.warm.seconds for each in found[choice.name]]))
                row["relative_to"] = relative_to(cold, choice.name, BASELINES)
                row["kernels"] = found[choice.name][0].cold.kernels
                rows.append(row | found[choice.name][0].graphs._asdict())
    return rows


def sheets(content: Mapping[str, Any]) -> list[Sheet]:
    """The table.

    Args:
        content: what was recorded.

    Returns:
        A line for every step.
    """
    columns = ["step", "network", "cold (IQR)", *(f"/ {base} (IQR)" for base in BASELINES), "warm (IQR)"]
    counts = ["frames", "graphs", "nodes", "kernels"]
    lines = [line(row) + [str(row[count]) for count in counts] for row in content["rows"]]
    return [Sheet("compiling a step", [*columns, *counts], lines)]


def line(row: Row) -> list[str]:
    """The cells with times."""
    settings = f", ratio {row['ratio']:g}, groups {row['groups']}" if "ratio" in row else ""
    ratios = [format_ratio(row["relative_to"].get(base)) for base in BASELINES]
    cold, warm = format_seconds(row["cold_seconds"]), format_seconds(row["warm_seconds"])
    return [row["method"] + settings, row["model"], cold, *ratios, warm]


def main(settings: Settings) -> None:
    """Measure, write, and print the table.

    Args:
        settings: from the command line.
    """
    rows = measure(settings)
    content = record(settings.out, "compile", settings, rows, settings.device, settings.threads)
    print_sheets(content, sheets(content))


if __name__ == "__main__":
    main(command_line(Settings(), QUICK, __doc__))
