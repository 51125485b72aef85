"""The published experiments: `python -m experiments COMMAND ...`, from the folder above this one.

    train        one network
    sweep        a grid of methods, radii, settings and seeds, over the cores
    report       a table and learning curves from finished runs
    evaluate     what trained networks withstand
    evidence     methods compared, with radii chosen on validation data
    budget       arms with equal budgets of tuning: examples/results/PLAN.md
    appendix     results in detail, from the numbers of every seed

`python -m experiments COMMAND --help` lists what each takes.
"""

from __future__ import annotations

import difflib
import errno
import importlib
import sys
import warnings
from collections.abc import Sequence

# The module of each command, and the function there.
COMMANDS = {
    "train": ("train", "main"),
    "sweep": ("sweep", "main"),
    "report": ("report", "report_main"),
    "evaluate": ("evaluate", "main"),
    "evidence": ("report", "evidence_main"),
    "budget": ("budget", "main"),
    "appendix": ("report", "appendix_main"),
}

# Options that have nothing to switch off any more: scripts that say them go on working.
FORMER = ("--no-tensorboard",)


def main(arguments: Sequence[str]) -> int | str | None:
    """Run a command. An error that a user can mend is one line; what is none is raised."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(__doc__)
        return 0 if arguments else 2
    command, *options = (argument for argument in arguments if argument not in FORMER)
    if command not in COMMANDS:
        near = difflib.get_close_matches(command, COMMANDS, n=1)
        advice = f"did you mean {near[0]}?" if near else f"choose one of {', '.join(COMMANDS)}."
        return f"error: there is no command {command!r}: {advice}"
    try:  # imports take seconds, in which Ctrl-C may come
        from concurrent.futures.process import BrokenProcessPool

        from experiments.machine import Interrupted, launched
        from experiments.methods import NonFiniteError
        from experiments.runs import CheckpointError, RunError

        if command != "train" and launched() > 1:
            return f"error: {command} is a program of one process: start it without torchrun."
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *_, **__: print(f"warning: {message}", file=sys.stderr)
            module, function = COMMANDS[command]
            getattr(importlib.import_module(f"experiments.{module}"), function)(options)
    except KeyboardInterrupt:
        return "stopped: the same command goes on."
    except Interrupted as stop:
        print(f"{stop}; {stop.advice}", file=sys.stderr)
        return 128 + stop.signal_number
    except BrokenProcessPool:
        return "error: a worker was killed, by hand or for want of memory. The same command goes on."
    except OSError as error:
        is_full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        advice = ". The checkpoints that are there are whole: make room, and go on with --resume."
        return f"error: {error}{advice if is_full else ''}"
    except (ValueError, RunError, CheckpointError, NonFiniteError) as error:
        return f"error: {error}"
    return None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
