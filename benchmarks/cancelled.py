"""What the signs of statistic gradients that are zero but for rounding do, and whether float32 can tell them.

    python benchmarks/cancelled.py
    python benchmarks/zoo_page.py

In one ghost group and for two radii: how the gradient of the second pass changes by a perturbation of these components
alone, and what leaving them out of the whole δ changes, beside leaving out as many others. Then, for the statistic
gradients that the library computes in float32: how many of these have the sign that they have in float64, and of which
share of them, and of all others, the magnitude is below a bound in parts of the layer's largest.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from agreement import Options, Taken, cancelled, defined, flat, functional, in_dtype, seeded, zero_but_for_rounding
from catalogue import Case, entry
from common import Rounds, Row, Sheet, run_script
from definition import Groups
from torch import Tensor

BOUNDS = (1e-7, 1e-6, 1e-5, 1e-4)


@dataclass(frozen=True)
class Settings(Rounds):
    """What is measured.

    Attributes:
        models: package and name.
        radii: of the perturbation.
    """

    models: tuple[str, ...] = (
        "timm/efficientvit_m0",
        "timm/test_efficientnet",
        "transformers/LevitForImageClassification",
        "transformers/EfficientNetForImageClassification",
        "transformers/MobileNetV2ForImageClassification",
        "transformers/MobileViTV2ForImageClassification",
        "transformers/HGNetV2ForImageClassification",
    )
    radii: tuple[float, ...] = (0.1, 0.01)
    rounds: int = 1
    threads: int = 1
    device: str = "cpu"


def measure(settings: Settings) -> Iterator[Row]:
    """Look at one model after the other.

    Args:
        settings: which.

    Yields:
        A row for every model.
    """
    torch.set_num_threads(settings.threads)
    for model in settings.models:
        seeded()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the packages
            make = entry(*model.split("/")).make
            assert make is not None
            yield {"model": model} | row_of(make(), settings)


def row_of(case: Case, settings: Settings) -> Row:
    """All that is to say about a model."""
    double = in_dtype(case, torch.float64)
    effects = []
    for epsilon in settings.radii:
        options = Options(groups=1, epsilon=epsilon)
        taken, step = step_of(double, options)
        effects.append({"epsilon": epsilon} | cancelled(double, taken, step, options))
    seeded()
    single = functional(in_dtype(case, torch.float32), Options(groups=1), {})
    return {"effects": effects} | told_apart(single, taken, zero_but_for_rounding(taken, step))


def step_of(case: Case, options: Options) -> tuple[Taken, Any]:
    """A step by the library, and by the definition."""
    seeded()
    taken = functional(case, options, {})
    return taken, defined(case, taken.perturbation, Groups(options.groups, case.samples))


def told_apart(single: Taken, double: Taken, zero: Mapping[str, Tensor]) -> Row:
    """Whether the statistic gradients in float32 say which of them are zero."""
    mask = torch.cat(list(zero.values()))
    others = ~mask & (torch.cat(list(flat(double.stat_grads).values())) != 0)
    signs = [torch.cat([g.sign() for g in flat(taken.stat_grads).values()]) for taken in (single, double)]
    parts = []
    for layer in single.stat_grads.values():
        together = torch.cat(list(layer)).abs()
        parts.append(together / together.max())
    share, alike = torch.cat(parts), signs[0] == signs[1]
    return {
        "zero": int(mask.sum()),
        "others": int(others.sum()),
        "signs_alike": alike[mask].double().mean().item(),
        "below": [[(share[kind] <= bound).double().mean().item() for kind in (mask, others)] for bound in BOUNDS],
    }


def sheets(content: Mapping[str, Any]) -> list[Sheet]:
    """The tables.

    Args:
        content: what was recorded.

    Returns:
        Effects by radius; and what float32 can tell.
    """
    rows = content["rows"]
    effects = [
        [
            row["model"],
            f"{effect['epsilon']:g}",
            *(f"{effect[key]:.1e}" for key in ("alone", "without", "without_others")),
            f"{effect['rises'][1]:.4f} / {effect['rises'][2]:.4f}",
        ]
        for row in rows
        for effect in row["effects"]
    ]
    bounds = [
        [
            row["model"],
            f"{row['zero']} / {row['others']}",
            f"{row['signs_alike']:.0%}",
            *(f"{of_zero:.1%} / {of_others:.1%}" for of_zero, of_others in row["below"]),
        ]
        for row in rows
    ]
    columns = ["model", "ε", "alone", "without them", "without as many others", "rise of the loss, with / without them"]
    return [
        Sheet("by radius", columns, effects),
        Sheet("by bound", ["model", "zero / others", "signs alike", *(f"≤ {bound:g}" for bound in BOUNDS)], bounds),
    ]


if __name__ == "__main__":
    run_script(__file__, __doc__, Settings(), Settings(), measure, sheets)
