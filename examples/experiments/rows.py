"""What a run counts and tells: where it is, the learning rate, and the row that an epoch comes to."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from experiments.settings import Settings, TrainingSettings

Row = dict[str, float | None]


@dataclass
class Place:
    """How far runs have come, and what they have counted since the last row of their metrics.

    Attributes:
        epoch: epochs that are complete.
        batch: steps of the epoch that comes after them.
        sums: over these steps, of those that were no overflow: loss, second loss, wrong labels, number; (runs, 4).
        seconds: the time they took, of all runs.
        waiting_seconds: of it, for data.
        rows: of the metrics, of every run.
    """

    epoch: int = 0
    batch: int = 0
    sums: Tensor = field(default_factory=lambda: torch.zeros(1, 4, dtype=torch.float64))
    seconds: float = 0.0
    waiting_seconds: float = 0.0
    rows: list[list[Row]] = field(default_factory=lambda: [[]])

    def next_epoch(self) -> Place:
        """The place before the first step of the epoch that comes after this one."""
        return Place(self.epoch + 1, sums=torch.zeros_like(self.sums), rows=self.rows)

    def of_run(self, number: int) -> Place:
        """What of the counted belongs to one run; time is shared."""
        count = len(self.sums)
        return replace(
            self,
            sums=self.sums[number],
            seconds=self.seconds / count,
            waiting_seconds=self.waiting_seconds / count,
            rows=self.rows[number : number + 1],
        )


def learning_rate(training: TrainingSettings, done: float) -> float:
    """The learning rate at a point of the run.

    Args:
        training: the schedule and where it starts.
        done: share of the run's steps that lie behind, from 0 to 1.
    """
    if training.schedule == "cosine":
        return training.lr * (1 + math.cos(math.pi * done)) / 2
    return training.lr * 0.1 ** sum(done >= milestone for milestone in training.milestones)


def is_measured(training: TrainingSettings, epoch: int) -> bool:
    """Whether errors are measured after the epoch that comes after so many."""
    return (epoch + 1) % training.evaluate_every == 0 or epoch + 1 == training.epochs


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
    """What an epoch came to.

    Args:
        settings: of the run.
        steps: of an epoch.
        place: of one run, after the last of them.
        errors: on validation and test samples, and the test error of the five best guesses, in percent, if measured.
        measuring_seconds: the time that took.
    """
    loss, second_loss, error = means(place, settings.training)
    step = steps * (place.epoch + 1)
    return {
        "epoch": place.epoch + 1,
        "step": step,
        "lr": learning_rate(settings.training, (step - 1) / (steps * settings.training.epochs)),
        "train_loss": loss,
        "adversarial_loss": second_loss,
        "train_error": error,
        **dict(zip(("validation_error", "test_error", "test_top5_error"), errors, strict=True)),
        "images_per_second": steps * settings.training.batch_size / place.seconds,
        "data_wait": place.waiting_seconds / place.seconds,
        "seconds": place.seconds + measuring_seconds,
    }
