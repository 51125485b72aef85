"""Finished runs as the rows of a table: what belongs together, how it is called, what it is set against.

A `Group` is runs that differ in split and seed alone; a `Family` is a method with all the radii that it was trained at,
of which validation data choose one.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from experiments.methods import OWN_RULES
from experiments.paired import Key
from experiments.runs import METHODS, FinishedRun, FolderError, is_fitted

NAMES = {
    "plain": "plain",
    "apart": "APART",
    "one_pass": "APART in one pass",
    "apart_sam": "APART-SAM",
    "sam": "SAM",
    "sam_on": "SAM-ON",
    "momentum_sam": "Momentum-SAM",
    "ghost_noise": "ghost noise",
}
ZERO_RADIUS_NAMES = {"apart": "zero radius", "one_pass": "zero radius in one pass"}
SYMBOLS = {"method.epsilon": "ε", "method.rho": "ρ"}
# What a method's bare name stands for; a rule of its own is in OWN_RULES.
ORDINARY = {
    "method.rule": "sign",
    "method.every": 1,
    "method.epsilon_schedule": "constant",
    "method.label_smoothing": 0.0,
    "model.dropout": 0.0,
}
NAMED_ALONE = ("data.name", "data.train_samples", "data.augment")  # in the name of a data set
# What is chosen on validation data. A share of smoothing that is not zero, and weight decay where it is tuned, too.
RADII = ("method.epsilon", "method.rho")
CHOSEN = (*RADII, "method.groups", "method.clean_fraction", "method.ghost_size", "method.label_smoothing")
DECAY = "training.weight_decay"
GUESSED_CLASSES = {"cifar100": 100, "tiny-imagenet": 200, "imagenet": 1000}


class Group(NamedTuple):
    """Runs that differ in split and seed alone."""

    label: str
    settings: Mapping[str, Any]
    runs: Mapping[Key, FinishedRun]

    @property
    def epochs(self) -> int:
        """Passes over the training data, whatever a step costs."""
        return int(self.settings["training.epochs"])

    @property
    def passes_per_epoch(self) -> float:
        """Forward-backward passes in an epoch."""
        return next(iter(self.runs.values())).passes_per_epoch

    @property
    def passes(self) -> float:
        """Forward-backward passes over the training data, of the whole run."""
        return self.epochs * self.passes_per_epoch

    @property
    def is_plain(self) -> bool:
        """Whether it is ordinary training."""
        return bool(self.settings["method.name"] == "plain" and not self.settings["method.label_smoothing"])

    @property
    def errors(self) -> dict[Key, float]:
        """Final error of every run."""
        return {key: run.errors[self.epochs] for key, run in self.runs.items()}

    @property
    def loss(self) -> float:
        """Mean training loss of the last epoch."""
        return sum(run.losses[-1] for run in self.runs.values()) / len(self.runs)


def by_data(runs: Iterable[FinishedRun]) -> dict[str, list[FinishedRun]]:
    """Runs by the name of their data set: `digits`, `cifar10-5000` for a part of it, `cifar10-5000-unaugmented`."""
    found: dict[str, list[FinishedRun]] = {}
    for run in runs:
        name, samples, augment = (run.settings[part] for part in NAMED_ALONE)
        parts = [name, *([str(samples)] if samples else []), *([] if augment else ["unaugmented"])]
        found.setdefault("-".join(parts), []).append(run)
    return found


def group_runs(runs: Iterable[FinishedRun]) -> list[Group]:
    """Put the runs together that differ in split and seed alone."""
    found: dict[str, dict[Key, FinishedRun]] = {}
    for run in sorted(runs, key=_rank):
        members = found.setdefault(json.dumps(run.settings, sort_keys=True), {})
        if run.key in members:
            twins = f"{members[run.key].folder} and {run.folder}"
            raise FolderError(f"{twins} have the same settings, split and seed {run.key}: leave one of them out")
        members[run.key] = run
    all_settings = [next(iter(members.values())).settings for members in found.values()]
    varied = varied_settings(all_settings)
    usual_epochs = base_epochs(all_settings)
    return [
        Group(label(settings, varied, usual_epochs), settings, members)
        for settings, members in zip(all_settings, found.values(), strict=True)
    ]


def _rank(run: FinishedRun) -> tuple[object, ...]:
    """Where a run stands in the table: by method, epochs, what a bare name stands for, radius and the rest."""
    settings = run.settings
    method = METHODS.index(settings["method.name"])
    usual = ordinary(settings)
    is_unusual = [settings.get(name, usual[name]) != usual[name] for name in ORDINARY]
    radii = (settings.get("method.epsilon", 0), settings.get("method.rho", 0))
    return (method, settings["training.epochs"], is_unusual, *radii, json.dumps(settings, sort_keys=True), run.key)


def varied_settings(all_settings: Sequence[Mapping[str, Any]]) -> list[str]:
    """Which settings have more than one value among those that have them; method and epochs have words of their own."""
    names = dict.fromkeys(name for settings in all_settings for name in settings)
    values = {name: {str(settings[name]) for settings in all_settings if name in settings} for name in names}
    return [name for name in names if len(values[name]) > 1 and name not in ("method.name", "training.epochs")]


def base_epochs(all_settings: Sequence[Mapping[str, Any]]) -> int:
    """The length of training that others are multiples of: the shortest of those that are set against plain training.

    Plain training itself may have been shorter, as one more rival.
    """
    rivals = [settings for settings in all_settings if settings["method.name"] != "plain"] or all_settings
    return min(int(settings["training.epochs"]) for settings in rivals)


def label(settings: Mapping[str, Any], varied: Sequence[str], usual_epochs: int) -> str:
    """What sets a group apart."""
    method, zero_radius = settings["method.name"], has_zero_radius(settings)
    parts = [ZERO_RADIUS_NAMES[method] if zero_radius else NAMES[method]]
    usual = ordinary(settings)
    for name in dict.fromkeys((*varied, "method.rule")):
        if name in settings and usual.get(name) != settings[name]:
            parts.append(f"{word(name)} {settings[name]}")
    factor, rest = divmod(settings["training.epochs"], usual_epochs)
    if rest:
        parts.append(f"{settings['training.epochs']} epochs")
    elif factor > 1:
        parts.append(f"{factor}× epochs")
    return ", ".join(parts)


def ordinary(settings: Mapping[str, Any]) -> dict[str, Any]:
    """What the bare name of a method stands for; at zero radius, whatever the rule is."""
    usual = ORDINARY | {"method.rule": OWN_RULES.get(settings["method.name"], ORDINARY["method.rule"])}
    idle = ("method.epsilon", "method.rule") if has_zero_radius(settings) else ()
    return usual | {name: settings[name] for name in idle if name in settings}


def has_zero_radius(settings: Mapping[str, Any]) -> bool:
    """Whether it is a control: a method of APART that perturbs nothing."""
    return settings["method.name"] in ZERO_RADIUS_NAMES and settings["method.epsilon"] == 0


def plain_training(groups: Sequence[Group], group: Group, factor: int) -> Group | None:
    """The plain training that a group is set against: everything but the method is the same."""
    alike = {plain.epochs: plain for plain in groups if plain.is_plain and frame(plain) == frame(group)}
    epochs = min(alike) if group.is_plain else group.epochs
    plain = alike.get(factor * epochs)
    return None if plain is group else plain


def frame(group: Group) -> dict[str, Any]:
    """All of a group's settings that are neither the method's nor the length of training."""
    return {
        name: value
        for name, value in group.settings.items()
        if not name.startswith("method.") and name != "training.epochs"
    }


def unconverged(groups: Sequence[Group]) -> str:
    """A sentence on plain training, not cut short, that has not fitted its samples; nothing where all has."""
    usual_epochs = base_epochs([group.settings for group in groups])
    losses = [
        f"{group.loss:.3f} after {group.epochs} epochs"
        for group in groups
        if group.is_plain and group.epochs >= usual_epochs
        if not is_fitted(group.loss, 0.0, GUESSED_CLASSES.get(group.settings["data.name"], 10))
    ]
    if not losses:
        return ""
    return f" **Plain training has not converged here** (training loss {', '.join(losses)}), so perturbations may harm."


def shared_settings(groups: Sequence[Group]) -> str:
    """The settings that are the same in all groups that have them."""
    varied = {*NAMED_ALONE, "method.name", *varied_settings([group.settings for group in groups])}
    settings = {name: value for group in groups for name, value in group.settings.items() if name not in varied}
    settings["training.epochs"] = base_epochs([group.settings for group in groups])
    usual = [name for name, value in settings.items() if value is None or ORDINARY.get(name) == value]
    return ", ".join(f"{word(name)} {value}" for name, value in sorted(settings.items()) if name not in usual)


def by_key(values: Mapping[Key, float]) -> dict[str, float]:
    """Values by split and seed as JSON has them: `3` for seed 3 of split 0, `1/3` for that of split 1."""
    return {f"{split}/{seed}" if split else f"{seed}": value for (split, seed), value in values.items()}


def word(setting: str) -> str:
    """A setting in few words: `ε` for method.epsilon, `lr` for training.lr, `model` for model.name."""
    section, _, name = setting.partition(".")
    return SYMBOLS.get(setting) or (section if name == "name" else name.replace("_", " "))


def edges_of(chosen: Mapping[str, Any], candidates: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Which chosen settings are the smallest or largest that were tried, 0 aside: the best may lie beyond them."""
    found = {}
    for name in (*CHOSEN, DECAY):
        values = sorted({settings[name] for settings in candidates if name in settings})
        value = chosen.get(name)
        if len(values) > 1 and (value == values[-1] or value == values[0] != 0):
            found[word(name)] = f"{value:g} of {values[0]:g} to {values[-1]:g}"
    return found


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


def validation_error(candidate: Candidate) -> float:
    """The mean over all seeds that it has."""
    return float(np.mean(list(candidate.validation.errors.values())))


class Family(NamedTuple):
    """A method, with all the radii that it was trained at.

    Attributes:
        label: its name.
        candidates: by radius, in ascending order.
        is_plain: whether it is the plain training that others are set against.
    """

    label: str
    candidates: list[Candidate]
    is_plain: bool

    @property
    def best(self) -> Candidate:
        """Of the candidates with the most runs, that of the lowest mean validation error; of equals the first.

        Candidates with fewer were dropped in a search: a low error of a single seed is often luck.
        """
        most = max(len(each.validation.runs) for each in self.candidates)
        return min((each for each in self.candidates if len(each.validation.runs) == most), key=validation_error)

    @property
    def edges(self) -> dict[str, str]:
        """What of the choice lies at the edge of what was tried."""
        return edges_of(self.best.test.settings, [each.test.settings for each in self.candidates])

    @property
    def chosen(self) -> str:
        """The chosen settings, with a mark where one is at the edge of what was tried."""
        return self.best.chosen + (f" (at the edge: {', '.join(self.edges)})" if self.edges else "")

    @property
    def group(self) -> Group:
        """The chosen runs, with their test errors."""
        return self.best.test


def find_families(test: Sequence[Group], validation: Sequence[Group]) -> list[Family]:
    """Put groups together that differ in nothing but what is chosen; zero radius is a method of its own.

    All methods stand at the weight decay that most of them have, plain training that they are set against included.
    What was trained at several is a rival once more, with its weight decay among what is chosen. Where no decay is that
    of most, as in a grid, weight decay is chosen for all, plain training included.
    """
    varied = varied_settings([group.settings for group in test])
    told = [name for name in CHOSEN if name in RADII or name in varied]
    told_apart = [name for name in varied if name not in (*CHOSEN, DECAY)]
    usual_epochs = base_epochs([group.settings for group in test])
    decays = Counter(group.settings[DECAY] for group in [g for g in test if not g.is_plain] or test).most_common(2)
    usual = decays[0][0] if len({count for _, count in decays}) == len(decays) else None
    found: dict[str, Family] = {}
    tuned: dict[str, Family] = {}

    for group, validated in zip(test, validation, strict=True):
        smoothed = bool(group.settings["method.label_smoothing"])
        names = [name for name in told if name in group.settings and (smoothed or name != "method.label_smoothing")]
        called = label(group.settings, told_apart, usual_epochs) + ", label smoothing" * smoothed
        rest = {name: value for name, value in group.settings.items() if name not in (*CHOSEN, DECAY)}
        key = json.dumps([rest, smoothed, has_zero_radius(group.settings)], sort_keys=True)

        values = [f"{word(name)} {group.settings[name]:g}" for name in names]
        decay = f"{word(DECAY)} {group.settings[DECAY]:g}"
        if group.settings[DECAY] == usual:
            family = found.setdefault(key, Family(called, [], group.is_plain))
            family.candidates.append(Candidate(", ".join(values), group, validated))
        name = called if usual is None else f"{called}, tuned weight decay"
        family = tuned.setdefault(key, Family(name, [], is_plain=usual is None and group.is_plain))
        family.candidates.append(Candidate(", ".join([*values, decay]), group, validated))
    several = [family for family in tuned.values() if len({c.test.settings[DECAY] for c in family.candidates}) > 1]
    return [*found.values(), *several]


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
