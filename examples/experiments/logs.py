"""What a run counts and tells: the row that an epoch comes to, and a progress bar.

`Place` is where a run is and what it has counted, `epoch_row` a row of `metrics.csv`. `progress_bar` yields a function
that shows a `Progress`; in a file or pipe it prints a line an epoch.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from rich.table import Column
from torch import Tensor

from experiments.settings import Settings, TrainingSettings

Row = dict[str, float | None]
WRONG = 2  # the column of `Place.sums`
TIMING_COLUMNS = ("images_per_second", "data_wait", "seconds")
LOSSES = ("train_loss", "adversarial_loss", "train_error")
ERRORS = ("validation_error", "test_error", "test_top5_error")
COLUMNS = ("epoch", "step", "lr", *LOSSES, *ERRORS, *TIMING_COLUMNS)


@dataclass
class Place:
    """How far runs have come, and what they have counted since the last row of their metrics."""

    epoch: int = 0  # epochs that are complete
    batch: int = 0  # steps of the epoch that comes after them
    # Over these steps: loss, second loss, wrong labels, number; (runs, 4), as `Learner.train` has them.
    sums: Tensor = field(default_factory=lambda: torch.zeros(1, 4, dtype=torch.float64))
    seconds: float = 0.0  # that they took, of all runs
    waiting_seconds: float = 0.0  # of it, for data
    rows: list[list[Row]] = field(default_factory=lambda: [[]])  # of the metrics, of every run

    def of_run(self, number: int) -> Place:
        """What of the counted belongs to one run; time is shared."""
        count, rows = len(self.sums), self.rows[number : number + 1]
        seconds, waiting_seconds = self.seconds / count, self.waiting_seconds / count
        return replace(self, sums=self.sums[number], seconds=seconds, waiting_seconds=waiting_seconds, rows=rows)


def learning_rate(training: TrainingSettings, done: float) -> float:
    """The learning rate where a share `done` of the run's steps lies behind."""
    if training.schedule == "cosine":
        return training.lr * (1 + math.cos(math.pi * done)) / 2
    return training.lr * training.gamma ** sum(done >= milestone for milestone in training.milestones)


def means(place: Place, training: TrainingSettings) -> tuple[float | None, float | None, float | None]:
    """Loss, second loss where the method has one, and error in percent, over the steps of this epoch of one run."""
    loss, second_loss, wrong, counted = place.sums.tolist()
    if not counted:
        return None, None, None
    error = 100 * wrong / (counted * training.batch_size)
    return loss / counted, None if math.isnan(second_loss) else second_loss / counted, error


def epoch_row(
    settings: Settings, steps: int, place: Place, errors: Sequence[float | None], measuring_seconds: float
) -> Row:
    """What an epoch came to."""
    step = steps * (place.epoch + 1)
    lr = learning_rate(settings.training, (step - 1) / (steps * settings.training.epochs))
    speed, waiting = steps * settings.training.batch_size / place.seconds, place.waiting_seconds / place.seconds
    times = (speed, waiting, place.seconds + measuring_seconds)
    values = (place.epoch + 1, step, lr, *means(place, settings.training), *errors, *times)
    return dict(zip(COLUMNS, values, strict=True))


@dataclass(frozen=True)
class Progress:
    """Where a run is."""

    out: Path  # its folder
    epoch: int  # epochs that are complete
    epochs: int
    step: int  # steps that were taken
    steps: int  # of the whole run
    loss: float | None  # mean clean loss of the epoch so far
    train_error: float | None  # of the clean outputs in the epoch so far, in percent
    images_per_second: float  # in the epoch so far
    validation_error: float | None  # the last one measured, in percent; None where there are no such samples
    test_error: float | None  # likewise

    def __str__(self) -> str:
        """All of it, for a person; what matters most is first, since a terminal may cut the rest."""
        parts = [f"epoch {self.epoch}/{self.epochs}", *described_errors(self.test_error, self.validation_error)]
        if self.loss is not None and self.train_error is not None:
            parts.append(f"loss {self.loss:.3f}, accuracy {100 - self.train_error:.1f} %")
        return ", ".join([*parts, f"{self.images_per_second:.0f} images/s"])


def described_errors(test: float | None, validation: float | None) -> list[str]:
    """Errors in percent, for a person; those that were not measured are left out."""
    errors = {"test": test, "validation": validation}
    return [f"{name} error {error:.2f} %" for name, error in errors.items() if error is not None]


Show = Callable[[Progress], None]


@contextmanager
def progress_bar() -> Iterator[Show]:
    """A bar with the time left, or a line for every epoch where the output is no terminal."""
    console = Console()
    columns = [
        BarColumn(bar_width=10),
        TimeRemainingColumn(compact=True, elapsed_when_finished=True),
        TextColumn("{task.description}", table_column=Column(ratio=1, no_wrap=True, overflow="ellipsis")),
    ]
    with Bar(*columns, console=console, expand=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("starting", total=None)
        complete: set[int] = set()

        def show(progress: Progress) -> None:
            bar.update(task, completed=progress.step, total=progress.steps, description=str(progress))
            if not console.is_terminal and progress.epoch not in complete | {0}:
                print(progress, flush=True)
            complete.add(progress.epoch)

        yield show


def write_metrics(path: Path, rows: Sequence[Row]) -> None:
    """Write `metrics.csv`, a row an epoch."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
