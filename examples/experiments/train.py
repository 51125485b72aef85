"""Train a network plainly, with APART or one of its rivals: `python -m experiments train --data digits --out runs/x`.

The settings start from a preset, by default that of the data set, with what the method was published with; every other
flag changes one of them. OUT gets config.json, metrics.csv (a row an epoch), checkpoints, TensorBoard files, and in the
end model.safetensors. A run that was stopped, by Ctrl-C, SIGTERM or a power cut, goes on with the same command and
--resume, and ends as if nothing had happened.

The original's names of options are understood too: --dataset, --num_workers, -b, -eps, -g, -r.

On several GPUs or processes: `torchrun --nproc-per-node 2 -m experiments train ...`. They divide --batch-size, and the
first of them writes OUT. With torchrun's --max-restarts a run comes back by itself after a process was killed.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import tyro

from experiments import ranks
from experiments.interrupts import Interrupted
from experiments.loop import train
from experiments.presets import preset
from experiments.runs import CHECKPOINTS, CONFIG, METRICS, MODEL, last_errors
from experiments.settings import DataName, Settings

# What the original's program calls some options; it has their other names as well, with - or _ between words.
ORIGINAL = {
    "--dataset": "--data",
    "--num_workers": "--workers",
    "--num-workers": "--workers",
    "-b": "--batch-size",
    "-eps": "--epsilon",
    "-g": "--groups",
    "-r": "--ratio",
}


@dataclass(frozen=True)
class Choice:
    """What decides where the settings start from; `Command` looks at whether there is such a data set.

    Attributes:
        data: the data set, if one is named.
        preset: the preset, if one is named.
        method: the method, if one is named.
        rule: the rule, if one is named.
    """

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


def main(arguments: Sequence[str]) -> None:
    """Run the command."""
    arguments = [ORIGINAL.get(argument, argument) for argument in arguments]
    command = parse(arguments)
    out = command.settings.out
    go_on = shlex.join([*arguments, *([] if command.resume else ["--resume"])])
    go_on = f"{'python' if ranks.launched() == 1 else 'torchrun ...'} -m experiments train {go_on}"
    try:
        train([command.settings], resume=command.resume)
    except Interrupted as stop:
        stop.advice = f"a checkpoint is written. Go on with: {go_on}"
        raise
    except KeyboardInterrupt:  # before training, or a second time, so that no step was waited for
        checkpoints = sorted((out / CHECKPOINTS).glob("step-*.pt"))
        if not (out / CONFIG).exists():
            sys.exit("stopped before anything was written: the same command starts the run.")
        since = f"what came after {checkpoints[-1].stem} is lost" if checkpoints else "no checkpoint had been written"
        sys.exit(f"stopped; {since}. Go on with: {go_on}")
    if ranks.is_first():
        print(last_errors(out))
        print(f"Network: {out}/{MODEL}, errors: {out}/{METRICS}, settings: {out}/{CONFIG}")
