"""Train a network plainly, with APART or one of its rivals: `python -m experiments train --data digits --out runs/x`.

The settings start from a preset, by default that of the data set, with what the method was published with: WRN-40-2 on
CIFAR, preact ResNet-18 on Tiny-ImageNet, ResNet-18 on ImageNet; SGD with momentum 0.9 at a learning rate of 0.1, which
falls tenfold at the milestones. One pass was not published, and starts from the rule that did best, with a radius that
suits it. Every other flag changes one setting.

OUT gets config.json, metrics.csv (a row an epoch), checkpoints, and in the end model.safetensors. A run that
was stopped, by Ctrl-C, SIGTERM or a power cut, goes on with the same command and --resume, and ends as if nothing had
happened.

The original's names of options are understood too: --dataset, --num_workers, -b, -eps, -g, -r.

On several GPUs or processes: `torchrun --nproc-per-node 2 -m experiments train ...`. They divide --batch-size, and the
first of them writes OUT. With torchrun's --max-restarts a run comes back by itself after a process was killed.
"""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated

import tyro

from experiments import ranks
from experiments.loop import train
from experiments.machine import Interrupted
from experiments.methods import OWN_RULES
from experiments.runs import CHECKPOINTS, CONFIG, METRICS, MODEL, checkpoints, last_errors
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
    """A command line."""

    settings: Annotated[Settings, tyro.conf.arg(name="")]
    # data set whose settings to start from; by default that of --data.
    preset: Annotated[DataName | None, tyro.conf.arg(metavar="DATA")] = None
    resume: tyro.conf.FlagCreatePairsOff[bool] = False  # go on with the run that is in OUT, if there is one.


def parse(arguments: Sequence[str]) -> Command:
    """Read a command line: the preset first, then what changes it."""
    choice, _ = tyro.cli(Choice, args=arguments, return_unknown_args=True, add_help=False)
    start = preset(choice.preset or choice.data or "digits", choice.method, choice.rule)
    return tyro.cli(
        Command,
        args=arguments,
        prog="python -m experiments train",
        default=Command(start),
        description=__doc__,
        config=(tyro.conf.OmitArgPrefixes,),
    )


# What the original calls some options. Its other names are those here, with - or _ between words.
ORIGINAL = {
    "--dataset": "--data",
    "--num_workers": "--workers",
    "--num-workers": "--workers",
    "-b": "--batch-size",
    "-eps": "--epsilon",
    "-g": "--groups",
    "-r": "--ratio",
}


def main(arguments: Sequence[str]) -> None:
    """Run the command."""
    parts = [argument.partition("=") for argument in arguments]
    arguments = [ORIGINAL.get(name, name) + equals + value for name, equals, value in parts]
    command = parse(arguments)
    out = command.settings.out
    start = f"{'python' if ranks.launched() == 1 else 'torchrun ...'} -m experiments train"
    go_on = f"Go on with: {start} {shlex.join([*arguments, *([] if command.resume else ['--resume'])])}"
    try:
        messages = train([command.settings], resume=command.resume)
    except Interrupted as stop:
        stop.advice = f"a checkpoint is written. {go_on}"
        raise
    except KeyboardInterrupt:  # before training, or a second time, so that no step was waited for
        if not (out / CONFIG).exists():
            sys.exit("stopped before anything was written: the same command starts the run.")
        newest = checkpoints(out / CHECKPOINTS)
        lost = f"what came after {newest[0].stem} is lost" if newest else "no checkpoint had been written"
        sys.exit(f"stopped; {lost}. {go_on}")
    if ranks.is_first():
        for message in messages:
            plain = shlex.join([*arguments, "--method", "plain", "--out", f"{out}-plain"])  # the last of each counts
            print(f"warning: {message}\n  {start} {plain}", file=sys.stderr)
        print(last_errors(out))
        print(f"Network: {out}/{MODEL}, errors: {out}/{METRICS}, settings: {out}/{CONFIG}")
