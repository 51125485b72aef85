"""Train a network plainly, with APART, SAM or APART-SAM: `python examples/train.py --data digits --out runs/x`.

The settings start from a preset, by default that of the data set, with what the method was published with; every other
flag changes one of them. OUT gets config.json, metrics.csv (a row an epoch), checkpoints, TensorBoard files, and in the
end model.safetensors. A run that was stopped, by Ctrl-C, SIGTERM or a power cut, goes on with the same command and
--resume, and ends as if nothing had happened.
"""

from __future__ import annotations

import shlex
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import tyro
from training.checkpoints import CheckpointError
from training.interrupts import Interrupted
from training.loop import RunError, train
from training.nonfinite import NonFiniteError
from training.settings import PRESETS, DataName, Settings


@dataclass(frozen=True)
class Choice:
    """What decides where the settings start from; `Command` looks at whether there is such a data set.

    Attributes:
        data: the data set, if one is named.
        preset: the preset, if one is named.
    """

    data: str | None = None
    preset: str | None = None


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
    """Read a command line: the preset first, then what changes it.

    Args:
        arguments: without the program's name.

    Returns:
        The settings, and whether to resume.
    """
    choice, _ = tyro.cli(Choice, args=arguments, return_unknown_args=True, add_help=False)
    preset = PRESETS.get(choice.preset or choice.data or "digits", Settings())
    return tyro.cli(
        Command,
        args=arguments,
        default=Command(preset),
        description=__doc__,
        config=(tyro.conf.OmitArgPrefixes,),
    )


def main(arguments: Sequence[str]) -> None:
    """Run the program.

    Args:
        arguments: of the command line, without the program's name.
    """
    command = parse(arguments)
    warnings.showwarning = lambda message, *_: print(f"warning: {message}", file=sys.stderr)
    again = shlex.join(["python", *sys.argv, *([] if command.resume else ["--resume"])])
    try:
        out = train(command.settings, resume=command.resume)
    except Interrupted as stop:
        print(f"{stop}; a checkpoint is written. Go on with: {again}", file=sys.stderr)
        sys.exit(128 + stop.signal_number)
    except (ValueError, OSError, RunError, CheckpointError, NonFiniteError) as error:
        sys.exit(f"error: {error}")
    print(f"Network: {out}/model.safetensors, errors: {out}/metrics.csv, settings: {out}/config.json")


if __name__ == "__main__":
    main(sys.argv[1:])
