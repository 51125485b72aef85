"""The training loop: `train(settings)` runs a run, or goes on with one, and leaves its folder behind.

    OUT/config.json          the settings, and the machine
    OUT/metrics.csv          a row an epoch
    OUT/checkpoints/         the last two
    OUT/tensorboard/
    OUT/model.safetensors    parameters and buffers; written last, so the run is complete once it is there

A checkpoint holds everything that the rest of the run depends on, so a resumed run is the undisturbed one, bit for bit.
"""

from __future__ import annotations

import errno
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from environment import environment
from torch import Tensor, nn

from apart_func import split_state
from training.checkpoints import Checkpoints, State, write_whole
from training.datasets import DataSet, Split, evaluation_batches, load_dataset, steps_per_epoch, training_batches
from training.interrupts import Interrupted, noted_signals
from training.learner import Learner
from training.logs import Metrics, Progress, Row, Scalars, Show, progress_bar
from training.methods import Batch, Tensors
from training.networks import make_network
from training.settings import (
    MachineSettings,
    Settings,
    SettingsError,
    TrainingSettings,
    as_json,
    differences,
    from_json,
)

CONFIG, METRICS, CHECKPOINTS, MODEL = "config.json", "metrics.csv", "checkpoints", "model.safetensors"

SHOW_SECONDS = 0.2
EVALUATION_FACTOR = 4  # an evaluation batch needs less memory than a training batch of the same size


class RunError(RuntimeError):
    """A run cannot begin, or cannot go on."""


def train(settings: Settings, show: Show | None = None, *, resume: bool = True) -> Path:
    """Run a run to its end; one that was interrupted goes on where its last checkpoint is.

    Args:
        settings: of the run. Those of an interrupted one must be the same, but for `machine` and where things are.
        show: is told a few times a second how it gets on; None shows a progress bar.
        resume: go on with the run that is in the folder, if there is one; else that is an error.

    Returns:
        The folder of the run, now complete.

    Raises:
        RunError: the folder holds another run, or the disk is full.
        Interrupted: SIGINT or SIGTERM came; a checkpoint was written.
        NonFiniteError: a loss or gradient was infinite or not a number.
        ValueError: the settings do not fit together; nothing has been written.
    """
    if is_complete(settings, resume):
        return settings.out
    data, learner = prepared(settings)
    with full_disk_explained(settings.out), noted_signals() as noted, ExitStack() as stack:
        write_config(settings)
        run = _Run(settings, data, learner, show or stack.enter_context(progress_bar()), noted, stack)
        run.to_the_end()
    return settings.out


def is_complete(settings: Settings, resume: bool) -> bool:
    """Look at what is in a run's folder.

    Args:
        settings: of the run that is wanted.
        resume: whether there may be one already.

    Returns:
        Whether this run is there, and complete.

    Raises:
        RunError: there is one and it must not be, or it is another one.
        SettingsError: the settings it has stored cannot be read.
    """
    config = settings.out / CONFIG
    if not config.exists():
        return False
    if not resume:
        raise RunError(f"{settings.out} already holds a run. Add --resume to go on with it, or choose another --out.")
    changed = differences(settings, read_config(config))
    if changed:
        listed = "".join(f"\n  {line}" for line in changed)
        raise RunError(
            f"{settings.out} holds a run with other settings: repeat its own, or choose another --out.{listed}"
        )
    return (settings.out / MODEL).exists()


def write_config(settings: Settings) -> None:
    """Write a run's settings, and what they run on, into its folder."""
    config = as_json(settings) | {"environment": environment()}
    write_whole(settings.out / CONFIG, json.dumps(config, indent=2, ensure_ascii=False).encode())


def write_network(out: Path, params: Tensors, buffers: Tensors) -> None:
    """Write a trained network into a run's folder, which makes the run complete."""
    tensors = {name: tensor.contiguous() for name, tensor in (params | buffers).items()}
    write_whole(out / MODEL, safetensors.torch.save(tensors))


def read_config(path: Path) -> Settings:
    """The settings of a run.

    Args:
        path: its `config.json`.

    Returns:
        The settings.

    Raises:
        SettingsError: they cannot be read.
    """
    try:
        return from_json(json.loads(path.read_text(encoding="utf-8")))
    except json.JSONDecodeError as error:
        raise SettingsError(f"{path} is no JSON: {error}") from error


def prepared(settings: Settings) -> tuple[DataSet, Learner]:
    """Find the data and make the network. Whatever does not fit is refused here, before there is a run.

    Args:
        settings: of the run.

    Returns:
        The data set, and the learner at its first step.

    Raises:
        ValueError: something does not fit.
    """
    device = prepared_device(settings.machine)
    data = load_dataset(settings.data.name, settings.data.folder, settings.data.crop)
    steps_per_epoch(data, settings.training.batch_size)  # refuses a batch that cannot be filled
    if settings.training.channels_last and len(data.sample_shape) != 3:
        raise SettingsError(f"channels_last is an order of images, and {data.name} has samples {data.sample_shape}.")
    learner = Learner(initial_network(settings, data).to(device), settings)
    learner.rehearse(blank_batch(data, settings.training.batch_size))
    return data, learner


def initial_network(settings: Settings, data: DataSet) -> nn.Module:
    """The network of a run before its first step. Torch's default generator is seeded, and goes on from there."""
    torch.manual_seed(settings.seed)
    return make_network(settings.model.name, data, settings.model.width)


def learning_rate(training: TrainingSettings, done: float) -> float:
    """The learning rate at a point of the run.

    Args:
        training: the schedule and where it starts.
        done: share of the run's steps that lie behind, from 0 to 1.

    Returns:
        The rate for the step that comes next.
    """
    if training.schedule == "cosine":
        return training.lr * (1 + math.cos(math.pi * done)) / 2
    return training.lr * 0.1 ** sum(done >= milestone for milestone in training.milestones)


@dataclass
class Place:
    """How far a run has come, and what it has counted since the last row of its metrics.

    Attributes:
        epoch: epochs that are complete.
        batch: steps of the epoch that comes after them.
        sums: over these steps, of those that were no overflow: loss, second loss, wrong labels, number.
        seconds: the time they took.
        waiting_seconds: of it, for data.
        rows: of the metrics.
    """

    epoch: int = 0
    batch: int = 0
    sums: Tensor = field(default_factory=lambda: torch.zeros(4, dtype=torch.float64))
    seconds: float = 0.0
    waiting_seconds: float = 0.0
    rows: list[Row] = field(default_factory=list)


class _Run:
    """A run under way.

    Args:
        settings: of the run.
        data: what it trains and measures on.
        learner: what it trains.
        show: is told how it gets on.
        noted: the signal that asks it to stop, or None.
        stack: closes what it opens.
    """

    def __init__(
        self,
        settings: Settings,
        data: DataSet,
        learner: Learner,
        show: Show,
        noted: Callable[[], int | None],
        stack: ExitStack,
    ) -> None:
        self.settings, self.data, self.learner, self.show, self.noted = settings, data, learner, show, noted
        self.steps = steps_per_epoch(data, settings.training.batch_size)
        self.checkpoints = Checkpoints(settings.out / CHECKPOINTS)
        self.place = self._restored(self.checkpoints.load())
        self.saved_at = self.shown_at = time.monotonic()
        folder = settings.out / "tensorboard" if settings.machine.tensorboard else None
        self.scalars = stack.enter_context(closing(Scalars(folder, self.step + 1)))
        self.metrics = stack.enter_context(closing(Metrics(settings.out / METRICS, self.place.rows)))

    @property
    def step(self) -> int:
        """Steps that were taken."""
        return self.place.epoch * self.steps + self.place.batch

    def to_the_end(self) -> None:
        """Train the epochs that are left, and write the network."""
        while self.place.epoch < self.settings.training.epochs:
            self._train_epoch()
            row = self._row()
            self.place = Place(self.place.epoch + 1, rows=[*self.place.rows, row])
            self.metrics.add(row)
            self.scalars.add_row(row)
            self._tell()
            every = self.settings.machine.checkpoint_epochs
            if every and self.place.epoch % every == 0:
                self._save()
        write_network(self.settings.out, *split_state(self._evaluated()))

    def _train_epoch(self) -> None:
        """Take the steps of the epoch that are left."""
        self.place.sums = self.place.sums.to(self.learner.device)
        batches = self._training_batches(self.place.epoch, self.place.batch)
        clock = time.perf_counter()
        while self.place.batch < self.steps:
            batch = self.learner.placed(next(batches))
            self.place.waiting_seconds += time.perf_counter() - clock
            self._take_step(batch)
            if time.monotonic() - self.shown_at > SHOW_SECONDS:
                self._tell()
            self._stop_if_asked()
            if time.monotonic() - self.saved_at > self.settings.machine.checkpoint_seconds:
                self._save()
            before, clock = clock, time.perf_counter()
            self.place.seconds += clock - before
        self.learner.settle()

    def _take_step(self, batch: Batch) -> None:
        """Train on a batch, and count what came of it."""
        lr = self._learning_rate(self.step)
        out = self.learner.take(batch, lr, self.step + 1)
        self.place.batch += 1
        if out is None:
            return
        wrong = (out.output.argmax(dim=1) != batch[1]).sum()
        counted = [out.loss, out.adversarial_loss, wrong, torch.ones_like(out.loss)]
        self.place.sums += torch.stack([value.to(self.place.sums) for value in counted])
        if self.step % self.settings.machine.log_steps == 0:
            self.scalars.add_step(self.step, out, lr)

    def _row(self) -> Row:
        """What the epoch that was just trained came to. Its errors are measured now, if it is their turn."""
        start = time.perf_counter()
        self.place.sums = self.place.sums.cpu()  # waits for the device
        trained = time.perf_counter()
        self.place.seconds += trained - start
        errors = self._measured_errors() if is_measured(self.settings.training, self.place.epoch) else (None, None)
        return epoch_row(self.settings, self.steps, self.place, errors, time.perf_counter() - trained)

    def _measured_errors(self) -> tuple[float | None, float]:
        """Errors on validation samples, where there are some, and on test samples, in percent."""
        model = self._evaluated().eval()
        validation = None if self.data.validation is None else self._error(model, self.data.validation)
        test = self._error(model, self.data.test)
        model.train()
        return validation, test

    def _error(self, model: nn.Module, split: Split) -> float:
        """The share of samples that get a wrong label, in percent."""
        wrong = torch.zeros((), dtype=torch.int64, device=self.learner.device)
        for batch in evaluation_batches(
            self.data, split, batch_size=EVALUATION_FACTOR * self.settings.training.batch_size, **self._loading()
        ):
            wrong += self.learner.wrong_labels(model, self.learner.placed(batch))
            self._stop_if_asked()
        return 100 * wrong.item() / len(split)

    def _evaluated(self) -> nn.Module:
        """The network to measure or save; if its statistics are measured anew, then always on the same batches."""
        return self.learner.evaluated(self._training_batches(0, 0))

    def _training_batches(self, epoch: int, first: int) -> Iterator[Batch]:
        return training_batches(
            self.data,
            batch_size=self.settings.training.batch_size,
            seed=self.settings.seed,
            epoch=epoch,
            first=first,
            augment=self.settings.data.augment,
            **self._loading(),
        )

    def _loading(self) -> dict[str, Any]:
        return {"workers": self.settings.machine.workers, "pin_memory": self.learner.device.type == "cuda"}

    def _learning_rate(self, step: int) -> float:
        return learning_rate(self.settings.training, step / (self.steps * self.settings.training.epochs))

    def _tell(self) -> None:
        """Show how the run gets on: in this epoch, or in the last one where this one has not begun."""
        place, training = self.place, self.settings.training
        if place.batch:
            loss, _, error = means(place, training)
            speed = place.batch * training.batch_size / max(place.seconds, 1e-9)
        else:
            row = place.rows[-1]
            loss, error, speed = row["train_loss"], row["train_error"], row["images_per_second"] or 0.0
        measured = measured_errors(place.rows)
        self.show(
            Progress(
                self.settings.out,
                place.epoch,
                training.epochs,
                self.step,
                self.steps * training.epochs,
                loss,
                error,
                speed,
                measured[-1] if measured else None,
                min(measured, default=None),
            )
        )
        self.shown_at = time.monotonic()

    def _stop_if_asked(self) -> None:
        number = self.noted()
        if number is not None:
            self._save()
            raise Interrupted(number)

    def _save(self) -> None:
        """Write a checkpoint of this moment, between two steps."""
        self.learner.settle()
        random = random_state(self.learner.device)
        state = {"place": vars(self.place), "learner": self.learner.state_dict(), "random": random}
        self.checkpoints.save(self.step, state)
        self.saved_at = time.monotonic()

    def _restored(self, state: State | None) -> Place:
        """Go on from a checkpoint, if there is one."""
        if state is None:
            return Place()
        self.learner.load_state_dict(state["learner"])
        set_random_state(state["random"], self.learner.device)
        return Place(**state["place"])


def is_measured(training: TrainingSettings, epoch: int) -> bool:
    """Whether errors are measured after the epoch that comes after so many."""
    return (epoch + 1) % training.evaluate_every == 0 or epoch + 1 == training.epochs


def means(place: Place, training: TrainingSettings) -> tuple[float | None, float | None, float | None]:
    """Loss, second loss where the method has one, and error in percent, over the steps of this epoch."""
    loss, second_loss, wrong, counted = place.sums.tolist()
    if not counted:
        return None, None, None
    error = 100 * wrong / (counted * training.batch_size)
    return loss / counted, None if math.isnan(second_loss) else second_loss / counted, error


def epoch_row(
    settings: Settings, steps: int, place: Place, errors: tuple[float | None, float | None], measuring_seconds: float
) -> Row:
    """What an epoch came to.

    Args:
        settings: of the run.
        steps: of an epoch.
        place: after its last one.
        errors: on validation and test samples, in percent, if they were measured.
        measuring_seconds: the time that took.

    Returns:
        A row of the metrics.
    """
    loss, second_loss, error = means(place, settings.training)
    validation_error, test_error = errors
    step = steps * (place.epoch + 1)
    return {
        "epoch": place.epoch + 1,
        "step": step,
        "lr": learning_rate(settings.training, (step - 1) / (steps * settings.training.epochs)),
        "train_loss": loss,
        "adversarial_loss": second_loss,
        "train_error": error,
        "validation_error": validation_error,
        "test_error": test_error,
        "images_per_second": steps * settings.training.batch_size / place.seconds,
        "data_wait": place.waiting_seconds / place.seconds,
        "seconds": place.seconds + measuring_seconds,
    }


def random_state(device: torch.device) -> dict[str, Tensor]:
    """The state of the generators that a step on a device draws from."""
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_random_state(state: dict[str, Tensor], device: torch.device) -> None:
    """Go on from what `random_state` returned."""
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], device)


def measured_errors(rows: Sequence[Row]) -> list[float]:
    """The errors that settings may be chosen by: on validation samples, or on test samples where there are none."""
    errors = (row["test_error"] if row["validation_error"] is None else row["validation_error"] for row in rows)
    return [error for error in errors if error is not None]


def prepared_device(machine: MachineSettings) -> torch.device:
    """Find the device, and set what torch has of global switches.

    Args:
        machine: names it.

    Returns:
        The device.

    Raises:
        SettingsError: there is no such device.
    """
    name = machine.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.zeros((), device=name).device
    except (RuntimeError, AssertionError) as error:
        raise SettingsError(f"device {name!r} cannot be used: {str(error).splitlines()[0]}") from error
    torch.backends.cudnn.benchmark = not machine.deterministic
    if machine.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS is deterministic with a fixed workspace
        torch.use_deterministic_algorithms(True)
    return device


def blank_batch(data: DataSet, batch_size: int) -> Batch:
    """A batch of the right shape, of nothing but zeros."""
    return torch.zeros(batch_size, *data.sample_shape), torch.zeros(batch_size, dtype=torch.int64)


@contextmanager
def full_disk_explained(out: Path) -> Iterator[None]:
    """Say of a full disk what it means for the run.

    Raises:
        RunError: in place of the operating system's error.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise RunError(
            f"{error.strerror or error}, while writing to {out}. The checkpoints that are there are whole: make room, "
            "and go on with --resume."
        ) from error
