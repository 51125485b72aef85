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
from typing import Any

COMMANDS = ("train", "sweep", "report", "evaluate", "evidence", "budget", "appendix")


def main(arguments: Sequence[str]) -> int | str | None:
    """Run a command."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(__doc__)
        return 0 if arguments else 2
    if arguments[0] not in COMMANDS:
        near = difflib.get_close_matches(arguments[0], COMMANDS, n=1)
        print(f"error: there is no command {arguments[0]!r}: ", end="", file=sys.stderr)
        print(f"did you mean {near[0]}?" if near else f"choose one of {', '.join(COMMANDS)}.", file=sys.stderr)
        return 2
    try:
        check_alone(arguments[0])
        with warnings.catch_warnings():
            warnings.showwarning = _one_line  # type: ignore[assignment]  # whose own arguments have names
            importlib.import_module(f"experiments.{arguments[0]}").main(arguments[1:])
    except KeyboardInterrupt:
        return "stopped: the same command goes on."
    except Exception as error:
        return _explained(error)
    return None


def check_alone(command: str) -> None:
    """Make sure that torchrun has not started several processes of a command that is one."""
    from experiments.ranks import launched

    if command != "train" and launched() > 1:
        raise ValueError(f"{command} is a program of one process: start it without torchrun.")


def _one_line(message: Warning | str, *_: Any) -> None:
    print(f"warning: {message}", file=sys.stderr)


def _explained(error: Exception) -> int | str:
    """An error that a user can mend, in one line; what is none is raised again."""
    from concurrent.futures.process import BrokenProcessPool

    from experiments.learner import NonFiniteError
    from experiments.machine import Interrupted
    from experiments.runs import CheckpointError, RunError

    if isinstance(error, Interrupted):
        print(f"{error}; {error.advice}", file=sys.stderr)
        return 128 + error.signal_number
    if isinstance(error, BrokenProcessPool):
        return "error: a worker was killed, by hand or for want of memory. The same command goes on."
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return f"error: {error}. The checkpoints that are there are whole: make room, and go on with --resume."
    if isinstance(error, (ValueError, OSError, RunError, CheckpointError, NonFiniteError)):
        return f"error: {error}"
    raise error


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
