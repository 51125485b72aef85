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

from experiments import ranks
from experiments.loop import train
from experiments.machine import Interrupted
from experiments.presets import parse as parse
from experiments.runs import CHECKPOINTS, CONFIG, METRICS, MODEL, checkpoints, last_errors

# Its other names are those here, with - or _ between words.
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
    arguments = [ORIGINAL.get(argument, argument) for argument in arguments]
    command = parse(arguments, __doc__ or "")
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
