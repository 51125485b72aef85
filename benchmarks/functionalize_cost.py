"""How long `functionalize(model)` takes: the slowest of timm's networks.

    python benchmarks/functionalize_cost.py --quick
    python benchmarks/functionalize_cost.py --name all

It is called once for a model, before its first step, and looks at every module. Every network with batch norm in less
than `--most-layers` layers is made, on the meta device, since `functionalize` copies no weight (`--weights` makes them
all the same), and then made functional `--rounds` times. Times are the processor's: it is Python and nothing else, and
other programs on the machine do not count. The longest of these times may contain a collection of Python's garbage, as
the one of a program may. Networks that are refused are listed with the error.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from fnmatch import fnmatch
from time import process_time
from typing import Any

import torch
from common import Rounds, Row, Sheet, format_seconds, run_script, spread
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from apart_func import ApartError, functionalize


@dataclass(frozen=True)
class Settings(Rounds):
    """What is measured.

    Attributes:
        models: names of timm's networks; * stands for anything.
        most_layers: only networks with fewer layers of batch norm.
        weights: whether networks have them.
        shown: networks in the table.
        goal: seconds that a network may take.
    """

    models: tuple[str, ...] = ("*",)
    most_layers: int = 200
    weights: bool = False
    shown: int = 20
    goal: float = 0.2
    rounds: int = 5
    threads: int = 1
    device: str = "cpu"


QUICK = Settings(models=("repghostnet_200", "maxvit_xlarge_tf_224", "mobileone_s4", "densenet161", "resnet18"))


def measure(settings: Settings) -> Iterator[Row]:
    """Time one network after the other.

    Args:
        settings: which.

    Yields:
        A row for every network with batch norm.
    """
    import timm  # importing it takes seconds

    torch.set_num_threads(settings.threads)
    functionalize(nn.Sequential(nn.BatchNorm1d(2)))  # what is set up once does not count
    for name in timm.list_models():
        if not any(fnmatch(name, pattern) for pattern in settings.models):
            continue
        with torch.device(settings.device if settings.weights else "meta"):
            model = make(name)
        if 0 < layers_of(model) < settings.most_layers:
            yield {"model": name} | row_of(model, settings.rounds)


def row_of(model: nn.Module, rounds: int) -> Row:
    """Make a model functional, again and again."""
    row: Row = {"modules": sum(1 for _ in model.modules()), "layers": layers_of(model)}
    seconds = []
    try:
        for _ in range(rounds):
            start = process_time()
            functionalize(model)
            seconds.append(process_time() - start)
    except ApartError as error:
        return row | {"error": str(error)}
    return row | {"longest_seconds": max(seconds), "seconds": asdict(spread(seconds))}


def layers_of(model: nn.Module) -> int:
    """How many layers of batch norm there are."""
    return sum(isinstance(module, _BatchNorm) for module in model.modules())


def make(name: str) -> nn.Module:
    """A network of timm, not pretrained."""
    import timm

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of models that are called something else by now
        model: nn.Module = timm.create_model(name, pretrained=False)
    return model.train()  # pruned ones come in evaluation mode


def sheets(content: Mapping[str, Any]) -> list[Sheet]:
    """The tables.

    Args:
        content: what was recorded.

    Returns:
        The slowest networks, and those that were refused.
    """
    settings, rows = content["settings"], content["rows"]
    timed = sorted((row for row in rows if "seconds" in row), key=lambda row: -row["seconds"]["median"])
    refused = [row for row in rows if "error" in row]
    slow = sum(row["seconds"]["median"] > settings["goal"] for row in timed)
    lines = [
        [row["model"], *_counts(row), format_seconds(row["seconds"]), f"{1000 * row['longest_seconds']:.0f} ms"]
        for row in timed[: settings["shown"]]
    ]
    title = f"the slowest of {len(timed)} networks; {slow} take more than {settings['goal']:g} s"
    tables = [Sheet(title, ["network", "modules", "BN layers", "processor time (IQR)", "longest"], lines)]
    if refused:
        cells = [[row["model"], *_counts(row), row["error"]] for row in refused]
        tables.append(Sheet("refused", ["network", "modules", "BN layers", "error"], cells))
    return tables


def _counts(row: Row) -> list[str]:
    return [str(row["modules"]), str(row["layers"])]


if __name__ == "__main__":
    run_script(__file__, __doc__, Settings(), QUICK, measure, sheets)
