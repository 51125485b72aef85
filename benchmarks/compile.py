"""How long the step takes to compile, what it is compiled to, and what that costs.

    python benchmarks/compile.py --quick
    python benchmarks/compile.py --models resnet18 wrn_40_2 --samples 32 --rounds 1 --no-warm --threads 1

    cold       first call with an empty cache             warm     first call of another process with that cache
    frames     functions that Dynamo traced               graphs   that were handed to the compiler
    nodes      in these, operators of ATen and arguments  kernels  that Inductor wrote

Every time is taken in a process of its own, after Inductor has compiled a trivial function, so that what it loads and
sets up once does not count. The time of a later step is taken off. The cold time is then split up:

    Dynamo     traces Python                              AOTAutograd  traces the operators, and cuts them in two
    Inductor   lowers, schedules, writes kernels          compiler     waiting for the compiler of C++ or Triton

With `--clock cpu` a time is the processor's, that of the C++ compiler included, with one worker of Inductor's: what
there is to do, whatever else the machine does. The parts are always times of the clock on the wall.

What the compiled step costs is measured in the process that compiled it, in interleaved rounds with the eager plain
step. Its ratio to a compiled plain step, which another process had, is that of both to the eager one.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from tempfile import TemporaryDirectory
from typing import Any, Literal, NamedTuple

import torch
from common import (
    CLOCKS,
    Rounds,
    Row,
    Sheet,
    TimedRounds,
    Times,
    format_ratio,
    format_seconds,
    in_child,
    interleaved,
    medians_of,
    relative_to,
    run_script,
    spread,
    time_cells,
    time_columns,
    turns,
)
from networks import expanded, make_case
from steps import METHODS, ONE_GRAPH, Choice, choices, make_step, step_name
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounterWithBackend
from torch._functorch._aot_autograd.utils import make_boxed_func
from torch.utils.benchmark import timer

COMPILED = tuple(name for name, method in METHODS.items() if method.compiled)
BASELINES = ("plain compiled", "plain one graph")
PLAIN, COMPILED_STEP = "plain", "compiled"
PHASES = ("Dynamo", "AOTAutograd", "Inductor", "compiler")


@dataclass(frozen=True)
class Settings(Rounds):
    """What is measured.

    Attributes:
        models: which networks; see networks.py.
        methods: which steps; see steps.py.
        ratios: shares of the batch in the adversarial pass.
        groups: ghost groups in it, at most half its samples.
        samples: batch sizes; none takes each network's own.
        warm: whether each is compiled once more with its cache.
        clock: that on the wall, or the processor's; for compiling.
        step_rounds: how often the compiled step and the plain one are timed, in turn.
        seconds: least time that either gets in such a round.
    """

    models: tuple[str, ...] = ("overhead", "cifar_resnet")
    methods: tuple[str, ...] = COMPILED
    ratios: tuple[float, ...] = (1.0,)
    groups: tuple[int, ...] = (0, 16)
    samples: tuple[int, ...] = ()
    warm: bool = True
    clock: Literal["wall", "cpu"] = "wall"
    step_rounds: int = 7
    seconds: float = 0.3


# One thread: two stall each other at random when anything else runs on the machine.
QUICK = Settings(
    models=("tiny",),
    methods=("plain compiled", "plain one graph", "APART compiled"),
    groups=(16,),
    warm=False,
    rounds=5,
    threads=1,
)


class FirstCall(NamedTuple):
    """What a process found when it compiled a step.

    Attributes:
        seconds: time of the first call, less that of another.
        phases: the part of it that was spent in each of `PHASES`.
        kernels: written by Inductor, where they were not cached.
        steps: times of later calls, and of the plain step between them.
    """

    seconds: float
    phases: dict[str, float]
    kernels: int
    steps: dict[str, list[Times]]


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


def first_call(choice: Choice, settings: Settings) -> FirstCall:
    """Compile a step in this process, and time it against the plain one.

    Args:
        choice: which step.
        settings: where to run, and how times are taken.

    Returns:
        How long it took, and what came out.
    """
    from torch._dynamo.utils import compilation_time_metrics
    from torch._inductor import metrics

    torch.set_num_threads(settings.threads)
    torch.compile(lambda x: x + 1)(torch.ones(2, device=settings.device))
    metrics.reset()
    compilation_time_metrics.clear()
    case = make_case(choice.model, settings.device, choice.samples)
    step = make_step(choice, case)
    now = timer if settings.clock == "wall" else processor_seconds
    start = now()
    step()
    first = now() - start
    kernels, phases = metrics.generated_kernel_count, phases_of(compilation_time_metrics)
    timing = TimedRounds(settings.step_rounds, settings.threads, settings.device, seconds=settings.seconds)
    plain = make_step(Choice(choice.model, choice.samples, PLAIN), case)
    steps = interleaved(f"{choice.model}, {choice.name}", {PLAIN: plain, COMPILED_STEP: step}, timing)
    later = spread(medians_of(steps[COMPILED_STEP], CLOCKS[settings.clock == "cpu"])).median
    return FirstCall(first - later, phases, kernels, steps)


def processor_seconds() -> float:
    """What this process and the ones that it has waited for have used."""
    return sum(os.times()[:4])


def phases_of(metrics: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Seconds in each of `PHASES`, from the times of Dynamo's functions, which lie within each other."""

    def seconds(*functions: str) -> float:
        return sum(sum(metrics.get(function, ())) for function in functions)

    # From the outside in: each is part of the one before it.
    frames = seconds("_compile.compile_inner", "backward._backward_impl")
    backend = seconds("OutputGraph.call_user_compiler", "backward._backward_impl")
    inductor, waiting = seconds("compile_fx_inner"), seconds("async_compile.wait")
    return dict(zip(PHASES, (frames - backend, backend - inductor, inductor - waiting, waiting), strict=True))


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


def first_calls(choice: Choice, settings: Settings) -> list[FirstCall]:
    """Compile a step in a process, and perhaps in a second one, which finds what the first has cached."""
    own = {"TORCHINDUCTOR_COMPILE_THREADS": "1"} if settings.clock == "cpu" else {}
    with TemporaryDirectory() as cache:
        own["TORCHINDUCTOR_CACHE_DIR"] = cache
        return [in_child(first_call, choice, settings, allocator="kept", **own) for _ in range(1 + settings.warm)]


def measure(settings: Settings) -> Iterator[Row]:
    """Compile every step.

    Args:
        settings: what to measure.

    Yields:
        A row for each.
    """
    for model, samples in itertools.product(expanded(settings.models), settings.samples or (None,)):
        made = choices(model, samples, settings.methods, settings.ratios, settings.groups)
        chosen = {choice.name: choice for choice in made}
        found: dict[str, list[list[FirstCall]]] = {name: [] for name in chosen}
        for name in turns(f"compiling {model}", chosen, settings.rounds):
            found[name].append(first_calls(chosen[name], settings))
        seconds = {name: [cold.seconds for cold, *_ in calls] for name, calls in found.items()}
        steps = {name: [cold.steps for cold, *_ in calls] for name, calls in found.items()}
        for name, choice in chosen.items():
            cold, *warm = zip(*found[name], strict=True)
            row = choice.labels() | step_costs(steps, name)
            row["cold_seconds"] = asdict(spread(seconds[name]))
            row["warm_seconds"] = [asdict(spread([call.seconds for call in calls])) for calls in warm]
            row["relative_to"] = relative_to(seconds, name, BASELINES)
            row["phases"] = {phase: asdict(spread([call.phases[phase] for call in cold])) for phase in PHASES}
            row["kernels"] = cold[0].kernels
            yield row | in_child(count_graphs, choice, settings.device)._asdict()


def step_costs(steps: Mapping[str, Sequence[Mapping[str, list[Times]]]], name: str) -> Row:
    """What a compiled step costs, on each clock.

    Args:
        steps: what the processes of every compiled step found, of it and of the plain one.
        name: of the step.

    Returns:
        Times, and ratios to the plain step and to the compiled ones, by way of the plain one.
    """
    row: Row = {}
    for clock in CLOCKS:
        ratios = {
            each: [
                mine / plain
                for times in processes
                for mine, plain in zip(
                    medians_of(times[COMPILED_STEP], clock), medians_of(times[PLAIN], clock), strict=True
                )
            ]
            for each, processes in steps.items()
        }
        blocks = [block for times in steps[name] for each in times[COMPILED_STEP] for block in getattr(each, clock)]
        against = {PLAIN: asdict(spread(ratios[name]))} | relative_to(ratios, name, BASELINES)
        row[clock] = {"seconds": asdict(spread(blocks)), "relative_to": against}
    return row


def sheets(content: Mapping[str, Any]) -> list[Sheet]:
    """The tables.

    Args:
        content: what was recorded.

    Returns:
        Times and counts, what the compiled steps cost, and the parts of the cold time, with a line for every step.
    """
    rows = content["rows"]
    labels = [[step_name(row), row["model"], str(row["samples"])] for row in rows]
    heads = ["step", "network", "batch"]
    measured = [base for base in BASELINES if any(base in row["relative_to"] for row in rows)]
    cold = ["cold (IQR)", *(f"/ {base} (IQR)" for base in measured), "warm (IQR)"]
    counts = ["frames", "graphs", "nodes", "kernels"]
    bases = (PLAIN, *measured)
    times = [cold_cells(row, measured) + [str(row[count]) for count in counts] for row in rows]
    parts = [[format_seconds(row["phases"][phase]) for phase in PHASES] for row in rows]
    tables = {
        "compiling a step": ([*cold, *counts], times),
        "the compiled step": (time_columns(bases), [time_cells(row, bases) for row in rows]),
        "where the cold time goes": ([f"{phase} (IQR)" for phase in PHASES], parts),
    }
    return [
        Sheet(title, [*heads, *columns], [label + cells for label, cells in zip(labels, lines, strict=True)])
        for title, (columns, lines) in tables.items()
    ]


def cold_cells(row: Row, baselines: Iterable[str]) -> list[str]:
    """The cells with times of compiling."""
    ratios = [format_ratio(row["relative_to"].get(base)) for base in baselines]
    return [format_seconds(row["cold_seconds"]), *ratios, "".join(map(format_seconds, row["warm_seconds"]))]


if __name__ == "__main__":
    run_script(__file__, __doc__, Settings(), QUICK, measure, sheets)
