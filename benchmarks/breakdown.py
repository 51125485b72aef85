"""Where the time of an eager step goes, beside the plain steps in it.

    python benchmarks/breakdown.py
    python benchmarks/breakdown.py --network timm/lcnet_035 --method 'one pass' --by functions

    kinds        of work: operators taken together; outside of them is Python
    operators    that torch.profiler saw, by the time in them alone
    functions    of Python that cProfile saw, likewise

What takes longer than in the plain steps stands first. A profiler makes everything slower, small things most: calls and
shares say more than times. Every figure is the median over interleaved calls.
"""

from __future__ import annotations

import argparse
import cProfile
import os
import pstats
import re
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch
from methods import METHODS, Step
from networks import ALL, ghost_groups, make_case
from timing import Row, Table, arguments, interleaved, run
from torch.autograd.profiler_util import EventList
from torch.profiler import ProfilerActivity, profile
from torch.utils.benchmark import timer

OUTSIDE = "outside of operators"
KINDS = {  # the first whose pattern is found in an operator's name
    "convolutions": "conv",
    "batch norm": "batch_norm",
    "matrix products": "addmm|::mm|linear",
    "nodes of autograd": "Backward|autograd::",
    "views and allocation": "view|reshape|as_strided|detach|alias|expand|select|slice|narrow|permute|transpose|aten::t$"
    "|squeeze|flatten|split|chunk|unbind|empty|resize|set_$",
    OUTSIDE: OUTSIDE,
}


class Spent(NamedTuple):
    """What goes into one operator or function in a call of a step.

    Attributes:
        calls: how often it is called.
        seconds: in it alone.
    """

    calls: float = 0.0
    seconds: float = 0.0


Profile = dict[str, Spent]


def operators(step: Step) -> Profile:
    """One call by operators."""
    start = timer()
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        step()
    total = timer() - start
    averages: EventList = profiler.key_averages()
    found = {each.key: Spent(each.count, each.self_cpu_time_total / 1e6) for each in averages}
    return found | {OUTSIDE: Spent(0, total - sum(each.seconds for each in found.values()))}


def kinds(step: Step) -> Profile:
    """One call by kinds of operators."""
    found: Profile = {}
    for name, (calls, seconds) in operators(step).items():
        kind = next((kind for kind, pattern in KINDS.items() if re.search(pattern, name)), "other arithmetic")
        found[kind] = Spent(*map(sum, zip(found.get(kind, Spent()), (calls, seconds), strict=True)))
    return found


def functions(step: Step) -> Profile:
    """One call by functions of Python."""
    profiler = cProfile.Profile()
    profiler.runcall(step)
    stats = pstats.Stats(profiler).stats  # type: ignore[attr-defined]  # typeshed leaves it out
    names = {key: f"{'/'.join(Path(key[0]).parts[-2:])}:{key[2]}" if key[1] else key[2] for key in stats}
    return {names[key]: Spent(calls, seconds) for key, (_, calls, seconds, *_) in stats.items()}


PROFILERS: dict[str, Callable[[Step], Profile]] = {"kinds": kinds, "operators": operators, "functions": functions}


def measure(settings: argparse.Namespace) -> Iterator[Row]:
    """Profile a step and the plain steps in it, in turn.

    Yields:
        For every operator, kind or function a row, with what goes into it in each of the two.
    """
    os.environ.setdefault("KINETO_LOG_LEVEL", "5")  # the profiler says nothing while it works
    torch.set_num_threads(settings.threads)
    case = make_case(settings.network)
    groups, plain = ghost_groups(len(case.batch[1])), METHODS["plain"](case, 0)
    floor = plain if settings.method.startswith("one pass") else lambda: (plain(), plain())
    steps = {"plain": floor, "step": METHODS[settings.method](case, groups)}
    found: dict[str, list[Profile]] = {name: [] for name in steps}

    def profiled(name: str) -> float:
        found[name].append(PROFILERS[settings.by](steps[name]))
        return 0.0

    interleaved("profile", {name: partial(profiled, name) for name in steps}, settings.rounds)
    names = dict.fromkeys(name for profiles in found.values() for each in profiles for name in each)
    both = {name: {key: middle(profiles, name)._asdict() for key, profiles in found.items()} for name in names}
    rows: list[Row] = [{"name": name, **spent} for name, spent in both.items()]
    yield from sorted(rows, key=lambda row: row["plain"]["seconds"] - row["step"]["seconds"])


def middle(profiles: Sequence[Profile], name: str) -> Spent:
    """The median over the profiles of a step."""
    of_calls = [each.get(name, Spent()) for each in profiles]
    return Spent(median(each.calls for each in of_calls), median(each.seconds for each in of_calls))


def table(rows: Sequence[Row], shown: int = 20) -> Table:
    """The first rows, and all of them together."""
    sums = {key: Spent(*map(sum, zip(*(row[key].values() for row in rows), strict=True))) for key in ("plain", "step")}
    lines = []
    everything = {"name": "all"} | {key: total._asdict() for key, total in sums.items()}
    for row in [everything, *rows[:shown]]:
        line = [f"`{row['name']}`"]
        for key, total in sums.items():
            spent = Spent(**row[key])
            share = f"{spent.seconds / total.seconds:.0%}"
            line += [f"{spent.calls:g}", f"{1e3 * spent.seconds:.3g} ms", share]
        lines.append(line)
    return Table(["what", "plain: calls", "time", "share", "the step: calls", "time", "share"], lines)


def parsed(line: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = arguments(__doc__, rounds=9)
    parser.add_argument("--network", default="ten_layers", choices=list(ALL), metavar="NETWORK")
    parser.add_argument("--method", default="two passes", choices=list(METHODS), metavar="METHOD")
    parser.add_argument("--by", default="kinds", choices=list(PROFILERS), help="what the time is divided by")
    return parser.parse_args(line)


if __name__ == "__main__":
    run(__file__, parsed(), measure, table)
