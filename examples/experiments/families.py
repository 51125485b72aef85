"""Methods with all the radii that they were trained at, and the one that validation data choose: `find_families`."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from experiments.groups import Group, frame, has_zero_radius, label, varied_settings, word
from experiments.runs import FolderError

# What is chosen on validation data. A share of smoothing that is not zero, and weight decay for plain training, too.
RADII = ("method.epsilon", "method.rho")
CHOSEN = (*RADII, "method.groups", "method.clean_fraction", "method.ghost_size", "method.label_smoothing")
DECAY = "training.weight_decay"


class Candidate(NamedTuple):
    """Runs that differ in split and seed alone.

    Attributes:
        chosen: the settings that are chosen, as in `ε 0.1`.
        test: the runs with their test errors.
        validation: the runs with their validation errors.
    """

    chosen: str
    test: Group
    validation: Group


class Family(NamedTuple):
    """A method, with all the radii that it was trained at.

    Attributes:
        label: its name.
        candidates: by radius, in ascending order.
        is_plain: whether it is the plain training that others are set against.
    """

    label: str
    candidates: Sequence[Candidate]
    is_plain: bool

    @property
    def best(self) -> Candidate:
        """The candidate with the lowest mean validation error over the seeds that all have; of equals the first."""
        seeds = set.intersection(*(set(candidate.validation.runs) for candidate in self.candidates))
        if not seeds:
            raise FolderError(f"{self.label}: no radius can be chosen, since no seed was trained at all of them")

        def mean_error(candidate: Candidate) -> float:
            return float(np.mean([candidate.validation.errors[seed] for seed in sorted(seeds)]))

        return min(self.candidates, key=mean_error)

    @property
    def group(self) -> Group:
        """The chosen runs, with their test errors."""
        return self.best.test


def find_families(test: Sequence[Group], validation: Sequence[Group]) -> list[Family]:
    """Put groups together that differ in nothing but what is chosen; zero radius is a method of its own.

    Plain training at the weight decay of the other methods is what they are set against; where it was trained at
    several, the best of all is a rival.
    """
    varied = varied_settings([group.settings for group in test])
    told = [name for name in CHOSEN if name in RADII or name in varied]
    told_apart = [name for name in varied if name not in (*CHOSEN, DECAY)]
    fewest_epochs = min(group.epochs for group in test)
    usual = Counter(group.settings[DECAY] for group in [g for g in test if not g.is_plain] or test).most_common(1)[0][0]
    found: dict[str, tuple[str, list[Candidate]]] = {}

    def add(group: Group, validated: Group, kind: str, names: Sequence[str]) -> None:
        rest = {name: value for name, value in group.settings.items() if name not in (*CHOSEN, DECAY)}
        key = json.dumps([kind, rest, has_zero_radius(group.settings)], sort_keys=True)
        values = [f"{word(name)} {group.settings[name]:g}" for name in names if name in group.settings]
        called = label(group.settings, told_apart, fewest_epochs) + kind
        found.setdefault(key, (called, []))[1].append(Candidate(", ".join(values), group, validated))

    for group, validated in zip(test, validation, strict=True):
        smoothed = ", label smoothing" if group.settings["method.label_smoothing"] else ""
        names = told if smoothed else [name for name in told if name != "method.label_smoothing"]
        if not group.is_plain or group.settings[DECAY] == usual:
            add(group, validated, smoothed, names)
    for group, validated in zip(test, validation, strict=True):
        if group.is_plain and DECAY in varied:
            add(group, validated, ", tuned weight decay", [DECAY])
    return [
        Family(called, candidates, candidates[0].test.is_plain and not called.endswith("tuned weight decay"))
        for called, candidates in found.values()
    ]


def plain_of(families: Sequence[Family], family: Family, epochs: int) -> Family | None:
    """The plain training of so many epochs that a family is set against; None for itself, or where there is none."""
    for plain in families:
        if plain.is_plain and plain.group.epochs == epochs and _alike(plain, family):
            return None if plain is family else plain
    return None


def equal_epochs(families: Sequence[Family], epochs: int) -> list[Family]:
    """The families that were trained for so many epochs."""
    return [family for family in families if family.group.epochs == epochs]


def equal_compute(families: Sequence[Family], epochs: int) -> list[Family]:
    """The families that took twice as many passes."""
    return [family for family in families if family.group.passes == 2 * epochs]


def _alike(first: Family, second: Family) -> bool:
    """Whether families differ in method, length and weight decay alone."""
    one, other = (frame(family.group) | {DECAY: None} for family in (first, second))
    return one == other
