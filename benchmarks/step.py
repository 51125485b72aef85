"""What a training step costs, as a multiple of the plain step of the same network.

    python benchmarks/step.py                                   the table of the page
    python benchmarks/step.py --against ../older --rounds 15    this checkout against another, and the bounds
    python benchmarks/step.py --signs gradient --compiled       more kinds of steps
    python benchmarks/step.py --scaling                         growing batch, depth, width; eight models

Every network has a process of its own, with `--against` one for each checkout, and all steps take turns in every round.
methods.py says what each step does. Networks whose plain step takes less than 10 ms have a row and no goal: there the
start of operators is the cost, and another layer of batch norm starts more of them.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from methods import COMPILED, METHODS, prepare, time_prepared
from networks import ALL, GROWTH, STEPS, ghost_groups, make_case
from timing import ROOT, Row, Table, Worker, arguments, as_ratio, as_seconds, interleaved, median_of, ratios, run

PLAIN, TWO, ONE = "plain", "two passes", "one pass"
EAGER = (PLAIN, TWO, ONE, "two passes, drop-in", "one pass, drop-in", "SAM")
CARRIED = "one pass, gradient's signs"
GRAPHS = ("plain, compiled", "two passes, compiled", "one pass, compiled")
EIGHT = ("eight models", "eight models, compiled", "eight models, mapped", "eight models, mapped, compiled")

# The most that two passes and one pass may cost, in plain steps; None: what they cost in the other checkout, and 0.03.
BOUNDS: dict[str, tuple[float | None, float | None]] = {
    "resnet": (None, None),
    "timm/test_resnet": (None, None),
    "timm/resnet18": (2.45, 1.25),
    "timm/lcnet_035": (2.80, 1.55),
    "digits": (3.4, 2.1),
    "ten_layers": (3.4, 2.1),
}
SAME = 0.03


def blocks(settings: argparse.Namespace) -> Iterator[tuple[str, list[str]]]:
    """What is measured together: a network, and its steps with the one first that the others are divided by."""
    methods = list(settings.methods)
    if settings.signs == "gradient":
        methods.append(CARRIED)
    if settings.scaling:
        for networks in GROWTH.values():
            yield from ((network, [PLAIN, TWO, ONE]) for network in networks)
        yield "digits", [name for name in EIGHT if settings.compiled or name not in COMPILED]
    else:
        for network in settings.networks:
            yield network, methods + list(GRAPHS if settings.compiled else ())


def measure(settings: argparse.Namespace) -> Iterator[Row]:
    """Time all steps of a network against each other, then those of the next.

    Yields:
        A row for every network and step.
    """
    checkouts = {"": ROOT} | ({"against": settings.against} if settings.against else {})
    for network, methods in blocks(settings):
        with ExitStack() as stack:
            workers = {
                checkout: stack.enter_context(Worker(path, settings.memory, settings.threads))
                for checkout, path in checkouts.items()
            }
            samples = {worker(start, network, methods, settings) for worker in workers.values()}.pop()
            timers = {
                (checkout, method): partial(worker, time_prepared, method, settings.seconds, settings.device)
                for checkout, worker in workers.items()
                for method in methods
            }
            seconds = interleaved(network, timers, settings.rounds)
        for method in methods:
            quotients = {name: ratios(seconds[name, method], seconds[name, methods[0]]) for name in checkouts}
            row = {"network": network, "samples": samples, "method": method, "baseline": methods[0]}
            row |= {"seconds": median_of(seconds["", method]), "ratio": median_of(quotients[""])}
            if settings.against and method != methods[0]:
                row["against"] = median_of(quotients["against"])
                differences = (mine - other for mine, other in zip(*quotients.values(), strict=True))
                row["difference"] = median_of(differences)
            yield row | verdict(row)


def start(network: str, methods: list[str], settings: argparse.Namespace) -> int:
    """Make the steps of a network in this process; returns its batch size."""
    case = make_case(network, settings.device, settings.samples, settings.channels_last)
    samples = len(case.batch[1])
    prepare(case, methods, settings.groups or ghost_groups(samples))
    return samples


def verdict(row: Row) -> Row:
    """The bound on a step, where it has one, and whether it holds as far as the interval tells."""
    if row["network"] not in BOUNDS or row["method"] not in (TWO, ONE) or "against" not in row:
        return {}
    limit = BOUNDS[row["network"]][row["method"] == ONE]
    figure = row["difference"] if limit is None else row["ratio"]
    bound = SAME if limit is None else limit
    holds = "holds" if figure["high"] <= bound else "broken" if figure["low"] > bound else "undecided"
    return {"bound": f"≤ {limit:g}" if limit else f"+{SAME}", "verdict": holds}


def table(rows: Sequence[Row]) -> Table:
    """A line for every network, a column for every step; with another checkout a line for both."""
    if any("against" in row for row in rows):
        heads = ["network", "step", "here", "there", "here − there", "bound", ""]
        return Table(heads, [against_line(row) for row in rows if row["method"] != row["baseline"]])
    methods = list(dict.fromkeys(row["method"] for row in rows if row["method"] != row["baseline"]))
    lines = []
    for network, baseline in dict.fromkeys((row["network"], row["baseline"]) for row in rows):
        found = {row["method"]: row for row in rows if (row["network"], row["baseline"]) == (network, baseline)}
        name = f"{network}, {found[baseline]['samples']}" + f", {baseline}" * (baseline != PLAIN)
        cells = [as_ratio(found[method]["ratio"]) if method in found else "" for method in methods]
        lines.append([name, as_seconds(found[baseline]["seconds"]), *cells])
    return Table(["network, batch", "the plain step", *methods], lines)


def against_line(row: Row) -> list[str]:
    """A step in both checkouts."""
    cells = [as_ratio(row["ratio"]), as_ratio(row["against"]), as_ratio(row["difference"], "+")]
    return [row["network"], row["method"], *cells, row.get("bound", ""), row.get("verdict", "")]


def parsed(line: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = arguments(__doc__, rounds=15)
    parser.add_argument("--networks", nargs="+", default=STEPS, choices=list(ALL), metavar="NETWORK")
    parser.add_argument("--methods", nargs="+", default=None, choices=[*METHODS, *COMPILED], metavar="METHOD")
    parser.add_argument("--samples", type=int, help="batch size; each network's own by default")
    parser.add_argument("--groups", type=int, help="ghost groups; 16 by default, or half a smaller batch")
    parser.add_argument("--against", type=Path, help="root of another checkout to compare this one with")
    parser.add_argument("--signs", choices=["random", "gradient"], default="random", help="gradient: of one pass too")
    parser.add_argument("--compiled", action="store_true", help="compiled steps too, which takes minutes")
    parser.add_argument("--scaling", action="store_true", help="how the cost grows, in place of the networks")
    parser.add_argument("--channels-last", action="store_true", help="memory format of images and convolutions")
    parser.add_argument("--memory", choices=["kept", "glibc"], default="kept", help="what becomes of freed memory")
    settings = parser.parse_args(line)
    if settings.quick:
        settings.rounds, settings.seconds = 6, 0.05
    settings.methods = settings.methods or ([PLAIN, TWO, ONE] if settings.against or settings.quick else list(EAGER))
    return settings


if __name__ == "__main__":
    found = run(__file__, parsed(), measure, table)
    sys.exit(any(row.get("verdict") == "broken" for row in found))
