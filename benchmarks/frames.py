"""How deep an eager step is: our frames on the stack when the first arithmetic begins.

    python benchmarks/frames.py
    python benchmarks/frames.py --against ../older

The first arithmetic of a pass is the first function of PyTorch that computes (a sum, a mean, a product) after the
forward of a batch-norm layer has begun, as Python's own profiler sees it: a mode of PyTorch would change the path.
Counted are frames of `apart_func` between the caller of the step and it. A climb is a frame of a file which the stack
has left for another file of ours before: the code goes back up, as through a closure that was handed down. A chain of
calls that goes down through the files has none.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.nn.functional as F
from timing import ROOT, Row, Table, Worker, arguments, run
from torch import Tensor, nn

import apart_func

COMPUTES = ("mean", "sum", "var", "norm", "mul", "add", "sub", "sqrt", "square")
PACKAGE = str(Path(apart_func.__file__).parent)
STEPS: dict[str, Callable[..., Callable[..., object]]] = {
    "two passes": apart_func.make_apart_step,
    "one pass": apart_func.make_one_pass_step,
}


class Stacks:
    """Keeps the stack of our frames at the first arithmetic in each forward of a layer; for `sys.setprofile`.

    Attributes:
        found: stacks from the outermost frame to the innermost, as (file, function).
    """

    def __init__(self) -> None:
        self.waits = False
        self.found: list[list[tuple[str, str]]] = []

    def begin(self) -> None:
        """A layer's forward begins."""
        self.waits = True

    def __call__(self, frame: FrameType, event: str, function: Any) -> None:
        """Look at what Python calls."""
        if not self.waits or event != "c_call":
            return
        owner, name = getattr(function, "__self__", None), getattr(function, "__name__", "")
        of_torch = isinstance(owner, Tensor) or "torch" in f"{getattr(owner, '__module__', '')}{owner}"
        if of_torch and name != "add_" and any(word in name for word in COMPUTES):  # add_ counts batches
            self.waits = False
            self.found.append(our_frames(frame))


def our_frames(frame: FrameType | None) -> list[tuple[str, str]]:
    """The frames of the library that lead to a frame, from the outermost on."""
    frames = []
    while frame is not None:
        if frame.f_code.co_filename.startswith(PACKAGE):
            frames.append((Path(frame.f_code.co_filename).relative_to(PACKAGE).as_posix(), frame.f_code.co_name))
        frame = frame.f_back
    return frames[::-1]


def climbs(files: Sequence[str]) -> int:
    """How often a stack comes back to a file that it has left."""
    return sum(file != before and file in files[:number] for number, (before, file) in enumerate(pairwise(files)))


def stacks_of(name: str) -> list[list[tuple[str, str]]]:
    """The stacks of a step on a model of one layer."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(12, 2))
    batch = torch.randn(8, 3, 2, 2), torch.randint(2, (8,))
    stacks = Stacks()
    model[0].register_forward_pre_hook(lambda *_: stacks.begin())  # a function, which no copy of the model copies
    step = STEPS[name](model, F.cross_entropy, epsilon=0.1, groups=2)
    state = apart_func.split_state(model)
    step(*state, batch)  # what is made once is made here
    stacks.waits = False
    sys.setprofile(stacks)
    try:
        step(*state, batch)
    finally:
        sys.setprofile(None)
    return stacks.found


def measure(settings: argparse.Namespace) -> Iterator[Row]:
    """Count the frames of both steps.

    Yields:
        A row for every pass and checkout.
    """
    for checkout, path in ({"here": ROOT} | ({"there": settings.against} if settings.against else {})).items():
        with Worker(path) as worker:
            for name in STEPS:
                for number, stack in enumerate(worker(stacks_of, name), 1):
                    counts = {"frames": len(stack), "climbs": climbs([file for file, _ in stack])}
                    stack_lines = [" ".join(frame) for frame in stack]
                    files = {"files": len({file for file, _ in stack}), "stack": stack_lines}
                    yield {"checkout": checkout, "step": name, "pass": number} | counts | files
                    print(f"\n{name}, pass {number}, {checkout}:\n    " + "\n    ".join(stack_lines))


def table(rows: Sequence[Row]) -> Table:
    """A line for every pass."""
    heads = ["step", "pass", "", "frames", "files", "climbs"]
    return Table(heads, [[str(row[key]) for key in ("step", "pass", "checkout", *heads[3:])] for row in rows])


if __name__ == "__main__":
    parser = arguments(__doc__)
    parser.add_argument("--against", type=Path, help="root of another checkout to compare this one with")
    run(__file__, parser.parse_args(), measure, table)
