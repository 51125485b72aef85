"""Where settings start, `PRESETS`, and what a command line makes of them, `parse(arguments)`.

`PRESETS` has the published settings for every large data set: WRN-40-2 on CIFAR, preact ResNet-18 on Tiny-ImageNet,
ResNet-18 on ImageNet; SGD with momentum 0.9 at a learning rate of 0.1, which falls tenfold at the milestones. A last
batch that is incomplete is dropped, since groups must divide it. One pass was not published, and starts from the rule
that did best, with a radius that suits it.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated

import tyro

from experiments.methods import OWN_RULES
from experiments.settings import (
    DataName,
    DataSettings,
    MachineSettings,
    MethodSettings,
    ModelSettings,
    Settings,
    TrainingSettings,
)

_CIFAR = Settings(
    data=DataSettings("cifar10"),
    model=ModelSettings("wideresnet40_2"),
    method=MethodSettings(epsilon=0.1, groups=16, rho=0.2),
    training=TrainingSettings(epochs=200, batch_size=128, weight_decay=5e-4, milestones=(0.5, 0.75)),
    machine=MachineSettings(workers=min(8, os.cpu_count() or 1)),
    seed=42,
)
_IMAGENET = replace(
    _CIFAR,
    data=DataSettings("imagenet", crop=224),
    model=ModelSettings("resnet18"),
    method=MethodSettings(epsilon=0.025, groups=1, rho=0.025),
    training=TrainingSettings(
        epochs=105, batch_size=256, weight_decay=1e-4, milestones=(30 / 105, 60 / 105, 90 / 105, 100 / 105)
    ),
)
_BUNDLED = Settings(
    method=MethodSettings(groups=4),
    training=TrainingSettings(epochs=60, batch_size=64, schedule="cosine"),
    machine=MachineSettings(checkpoint_epochs=0, checkpoint_seconds=30),
)
PRESETS: dict[str, Settings] = {
    "cifar10": _CIFAR,
    "cifar100": replace(_CIFAR, data=DataSettings("cifar100")),
    "tiny-imagenet": replace(
        _CIFAR,
        data=DataSettings("tiny-imagenet", crop=64),
        model=ModelSettings("preact_resnet18"),
        method=replace(_CIFAR.method, groups=8),
        training=replace(_CIFAR.training, batch_size=256),
    ),
    "imagenet": _IMAGENET,
    "folder": replace(_IMAGENET, data=DataSettings("folder", crop=224)),
    "digits": _BUNDLED,
    "mnist5k": replace(_BUNDLED, data=DataSettings("mnist5k")),
}


def preset(data: str, method: str | None = None, rule: str | None = None) -> Settings:
    """Where the settings of a run start from, given what is known of it."""
    settings = PRESETS.get(data, Settings())
    own = OWN_RULES.get(method or settings.method.name)
    if own is None or rule not in (None, own):
        return settings
    # Random signs want about twice the radius of the gradient's: examples/RESULTS.md
    return replace(settings, method=replace(settings.method, rule=own, epsilon=2 * settings.method.epsilon))


@dataclass(frozen=True)
class Choice:
    """What decides where the settings start from."""

    data: str | None = None
    preset: str | None = None
    method: str | None = None
    rule: str | None = None


@dataclass(frozen=True)
class Command:
    """A command line.

    Attributes:
        settings: of the run.
        preset: data set whose settings to start from; by default that of --data.
        resume: go on with the run that is in OUT, if there is one.
    """

    settings: Annotated[Settings, tyro.conf.arg(name="")]
    preset: Annotated[DataName | None, tyro.conf.arg(metavar="DATA")] = None
    resume: tyro.conf.FlagCreatePairsOff[bool] = False


def parse(arguments: Sequence[str], description: str = "") -> Command:
    """Read a command line of train: the preset first, then what changes it."""
    choice, _ = tyro.cli(Choice, args=arguments, return_unknown_args=True, add_help=False)
    start = preset(choice.preset or choice.data or "digits", choice.method, choice.rule)
    return tyro.cli(
        Command,
        args=arguments,
        prog="python -m experiments train",
        default=Command(start),
        description=description,
        config=(tyro.conf.OmitArgPrefixes,),
    )
