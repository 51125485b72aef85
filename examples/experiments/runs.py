"""Runs: what one counts, what it tells on the way, and what it leaves in its folder.

    config.json          the settings, and the machine
    metrics.csv          a row an epoch
    checkpoints/         the last two
    model.safetensors    parameters and buffers; written last, so a run has finished where it lies, whole

A file is written beside its place, flushed to the disk, and moved there at once: whatever happens, what stands under
its name is whole. If the newest checkpoint is damaged all the same, the one before it is loaded.
"""

from __future__ import annotations

import csv
import io
import json
import math
import os
import statistics
import time
import warnings
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
import torch
from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from rich.table import Column
from safetensors import SafetensorError, safe_open
from torch import Tensor

from experiments.files import walk
from experiments.machine import environment, is_restarted, world_size
from experiments.settings import (
    Settings,
    SettingsError,
    TrainingSettings,
    as_json,
    compared,
    differences,
    from_json,
    learning_rate,
    passes_per_epoch,
)

try:
    import fcntl
except ModuleNotFoundError:  # Windows has no such locks
    fcntl = None  # type: ignore[assignment]

CONFIG, METRICS, MODEL = "config.json", "metrics.csv", "model.safetensors"
CHECKPOINTS, TOGETHER = "checkpoints", "checkpoints-together"
KEPT = 2  # checkpoints
RELEASED_SECONDS = 30.0
FITTED = 0.05  # of the loss of guessing: above it, a network has not fitted its training samples

Row = dict[str, float | None]
WRONG = 2  # the column of `Place.sums`
TIMING_COLUMNS = ("images_per_second", "data_wait", "seconds")
LOSSES = ("train_loss", "adversarial_loss", "train_error")
ERRORS = ("validation_error", "test_error", "test_top5_error")
COLUMNS = ("epoch", "step", "lr", *LOSSES, *ERRORS, *TIMING_COLUMNS)

State = dict[str, Any]


class RunError(RuntimeError):
    """A run cannot begin, or cannot go on."""


class CheckpointError(RuntimeError):
    """No checkpoint can be read, though there are some."""


class FolderError(ValueError):
    """A run folder that cannot be used: which one, why, and what would do."""


# What a run counts and tells.


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
        """The part of one run; the time is divided equally."""
        count, rows = len(self.sums), self.rows[number : number + 1]
        seconds, waiting_seconds = self.seconds / count, self.waiting_seconds / count
        return replace(self, sums=self.sums[number], seconds=seconds, waiting_seconds=waiting_seconds, rows=rows)


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


# The folder of a run.


def write_whole(path: Path, content: bytes | memoryview) -> None:
    """Write a file so that under its name is the old content or all of the new one, even if the machine stops."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".tmp")
    try:
        with beside.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    except BaseException as error:
        beside.unlink(missing_ok=True)
        if isinstance(error, OSError):
            error.filename = error.filename or str(path)  # a full disk does not say where
        raise
    if os.name != "nt":  # the folder's list of names, too; Windows cannot, and does not need it
        descriptor = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def write_config(settings: Settings) -> None:
    """Write a run's settings, and what they run on, into its folder."""
    config = as_json(settings) | {"environment": environment() | {"processes": world_size()}}
    write_whole(settings.out / CONFIG, json.dumps(config, indent=2, ensure_ascii=False).encode())


def write_metrics(path: Path, rows: Sequence[Row]) -> None:
    """Write `metrics.csv`, a row an epoch."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)


def write_network(out: Path, params: Mapping[str, Tensor], buffers: Mapping[str, Tensor]) -> None:
    """Write a trained network into a run's folder, which makes the run complete."""
    tensors = {name: tensor.contiguous() for name, tensor in {**params, **buffers}.items()}
    write_whole(out / MODEL, safetensors.torch.save(tensors))


def save_checkpoint(folder: Path, step: int, state: State) -> None:
    """Write a checkpoint, then delete those that are too many. Where it cannot be written, all are as before."""
    content = io.BytesIO()
    torch.save(state, content)
    write_whole(folder / f"step-{step:09d}.pt", content.getbuffer())
    for old in checkpoints(folder)[KEPT:]:
        old.unlink()


def checkpoints(folder: Path) -> list[Path]:
    """All checkpoints, the newest first."""
    return sorted(folder.glob("step-*.pt"), reverse=True)


def load_checkpoint(folder: Path) -> State | None:
    """Read the newest checkpoint that is whole; a damaged one is renamed, and a warning says so."""
    for interrupted in folder.glob("*.tmp"):
        interrupted.unlink()
    found = checkpoints(folder)
    for path in found:
        try:
            return _read_checkpoint(path)
        except (OSError, MemoryError) as error:  # of the machine, and says nothing of the file
            raise CheckpointError(
                f"the checkpoint {path} cannot be read for the moment ({type(error).__name__}: {error}). It may be "
                "whole: mend what is wrong with the machine, and go on with --resume."
            ) from error
        except Exception as error:  # whatever a damaged file makes of its reader
            warnings.warn(f"the checkpoint {path} is damaged and was set aside: {error}", stacklevel=2)
            path.rename(path.with_suffix(".damaged"))
    if found:
        raise CheckpointError(f"all checkpoints in {folder} are damaged. Delete the run's folder to start again.")
    return None


def _read_checkpoint(path: Path) -> State:
    """Load a checkpoint; all of it is read first, so that an error after that is one of its content."""
    content = io.BytesIO(path.read_bytes())
    with zipfile.ZipFile(content) as archive:
        broken = archive.testzip()  # the checksums, which `torch.load` does not compare
    if broken:
        raise CheckpointError(f"the checksum of {broken} is wrong")
    content.seek(0)
    try:
        state: State = torch.load(content, map_location="cpu", weights_only=True)
    except RuntimeError as error:
        if "allocate memory" in str(error):  # PyTorch's allocator has an error of its own
            raise MemoryError(str(error).splitlines()[0]) from error
        raise
    return state


@contextmanager
def held(out: Path) -> Iterator[None]:
    """Keep a run's folder from other processes while open; the system lets go of it when this process ends, however."""
    if fcntl is None:
        yield
        return
    out.mkdir(parents=True, exist_ok=True)
    folder = os.open(out, os.O_RDONLY)
    # Processes that load for one that was killed hold it for some seconds more.
    deadline = time.monotonic() + (RELEASED_SECONDS if is_restarted() else 0)
    try:
        while True:
            try:
                fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError as error:
                if time.monotonic() >= deadline:
                    message = f"another process is training in {out}. Wait for it, or choose another --out."
                    raise RunError(message) from error
                time.sleep(0.1)
            except OSError:  # a file system without locks
                break
        yield
    finally:
        os.close(folder)


def read_config(path: Path) -> Settings:
    """The settings of a run, from its `config.json`."""
    try:
        return from_json(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, RecursionError) as error:
        raise SettingsError(f"{path} cannot be used: {error}") from error


def is_complete(settings: Settings, resume: bool) -> bool:
    """Whether a run's folder holds it, finished; it may be that of another run."""
    config = settings.out / CONFIG
    if not config.exists():
        return False
    if not resume:
        raise RunError(f"{settings.out} already holds a run. Add --resume to go on with it, or choose another --out.")
    if changed := differences(settings, read_config(config)):
        raise RunError(
            f"{settings.out} holds a run with other settings: repeat its own, or choose another --out.{changed}"
        )
    return is_finished(settings.out)


def is_finished(folder: Path) -> bool:
    """Whether training has come to its end there: the network is there, and whole."""
    try:
        with safe_open(folder / MODEL, "pt"):
            return True
    except (OSError, SafetensorError):
        return False


def last_errors(out: Path) -> str:
    """What a run has come to, for a person."""
    with (out / METRICS).open(encoding="utf-8", newline="") as file:
        *_, row = csv.DictReader(file)
    test, validation = (float(row[name]) if row[name] else None for name in ("test_error", "validation_error"))
    return f"after {row['epoch']} epochs: {', '.join(described_errors(test, validation))}"


# Finished runs.


def find_finished(paths: Iterable[Path]) -> list[Path]:
    """Look for run folders of finished runs, and say which others are left out."""
    paths = list(paths)
    found: dict[str, Path] = {}
    for path in paths:
        if not path.exists():
            raise FolderError(f"{path} does not exist: expected what was given to train or sweep as --out")
        folders = [folder for folder, files in walk(path) if CONFIG in files]
        if not folders:
            print(f"left out: {path} is no run folder and holds none (no {CONFIG})")
        for folder in folders:
            found.setdefault(os.path.realpath(folder), folder)
    finished = [folder for folder in found.values() if is_finished(folder)]
    for folder in found.values():
        if folder not in finished:
            print(f"left out: {folder} has not finished (no whole {MODEL}); train --resume goes on")
    if not finished:
        looked = ", ".join(map(str, paths)) or "no folder at all"
        raise FolderError(f"no finished run in {looked}: expected folders that train or sweep wrote to, as in runs/*")
    return finished


class FinishedRun(NamedTuple):
    """What a finished run has left."""

    folder: Path
    settings: Mapping[str, Any]  # what decides its result, except split and seed, as `section.name`
    key: tuple[int, int]  # split of the data, and seed
    machine: str  # torch and hardware
    losses: list[float]  # mean training loss of every epoch, without perturbation
    errors: Mapping[int, float]  # in percent after each epoch that measured it; the last epoch is among them
    passes_per_epoch: float  # forward-backward passes over the training data
    step_seconds: float  # without waiting for data, the median over epochs


def read_run(folder: Path, split: str) -> FinishedRun:
    """Read a finished run, with its errors on the test or validation samples."""
    name = CONFIG
    try:
        config = json.loads((folder / name).read_text(encoding="utf-8"))
        settings = from_json(config)
        machine = f"torch {config['environment']['torch']}, {config['environment']['hardware']}"
        name = METRICS
        with (folder / name).open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
        losses = [float(row["train_loss"]) for row in rows]
        errors = {int(row["epoch"]): float(row[f"{split}_error"]) for row in rows if row[f"{split}_error"]}
        size = settings.training.batch_size
        waits = [(float(row["images_per_second"]), float(row["data_wait"])) for row in rows]
        step_seconds = statistics.median(size / speed * (1 - wait) for speed, wait in waits)
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError, csv.Error) as error:
        problem = f"{type(error).__name__}: {error}"
        raise FolderError(f"{folder / name} is not as train writes it ({problem}): leave {folder} out") from error
    if settings.training.epochs not in errors:
        other = "validation" if split == "test" else "test"
        raise FolderError(f"{folder / METRICS} has no {split} error of the last epoch: --measure-on {other} may do")
    key = (settings.data.split_seed, settings.seed)
    told_apart, passes = compared(settings), passes_per_epoch(settings)
    return FinishedRun(folder, told_apart, key, machine, losses, errors, passes, step_seconds)


def is_fitted(loss: float, smoothing: float, classes: int) -> bool:
    """Whether a training loss is that of a network that has fitted its samples."""
    shares = [1 - smoothing + smoothing / classes, *[smoothing / classes] * (classes - 1)]
    least = -sum(share * math.log(share) for share in shares if share)
    return loss - least <= FITTED * math.log(classes)


def harm(settings: Settings, loss: float | None, classes: int) -> str:
    """What to say at the end of a run whose clean training loss is high under a perturbation; "" if it is not."""
    method = settings.method
    if method.name == "plain" or loss is None or is_fitted(loss, method.label_smoothing, classes):
        return ""
    return (
        f"the clean training loss is still {loss:.3f}: the network or the schedule does not fit its samples under "
        f"{method.name}, and plain training may be better. Compare with plain training:"
    )
