"""Run folders: what the runner leaves in them, and what is read from them.

    config.json          the settings, and the machine
    metrics.csv          a row an epoch
    checkpoints/         the last two
    tensorboard/
    model.safetensors    parameters and buffers

The network is written last, so a run has finished where it lies, whole.
"""

from __future__ import annotations

import csv
import json
import math
import os
import shlex
import statistics
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, get_args

import safetensors.torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from experiments.checkpoints import write_whole
from experiments.environment import environment
from experiments.folders import walk
from experiments.logs import described_errors
from experiments.methods import READ_BY, passes_of
from experiments.paired import Key
from experiments.presets import command_line, preset
from experiments.ranks import count, is_restarted
from experiments.settings import (
    MethodName,
    Settings,
    SettingsError,
    as_json,
    differences,
    from_json,
)

try:
    import fcntl
except ModuleNotFoundError:  # Windows has no such locks
    fcntl = None  # type: ignore[assignment]

CONFIG, METRICS, MODEL = "config.json", "metrics.csv", "model.safetensors"
CHECKPOINTS, TOGETHER = "checkpoints", "checkpoints-together"
SECTIONS = ("data", "model", "method", "training")
METHODS: tuple[str, ...] = get_args(MethodName)
RELEASED_SECONDS = 30.0
FITTED = 0.05  # of the loss of guessing: above it, a network has not fitted its training samples


class RunError(RuntimeError):
    """A run cannot begin, or cannot go on."""


class FolderError(ValueError):
    """A run folder that cannot be used: which one, why, and what would do."""


class FinishedRun(NamedTuple):
    """What a finished run has left.

    Attributes:
        folder: where it lies.
        settings: what decides its result, except split and seed, as `section.name`.
        key: split of the data, and seed.
        machine: torch and hardware.
        losses: mean training loss of every epoch, without perturbation.
        errors: error in percent after each epoch that measured it; the last epoch is among them.
        passes_per_epoch: forward-backward passes over the training data.
        step_seconds: time of a step without waiting for data, the median over epochs.
    """

    folder: Path
    settings: Mapping[str, Any]
    key: Key
    machine: str
    losses: list[float]
    errors: Mapping[int, float]
    passes_per_epoch: float
    step_seconds: float


def is_complete(settings: Settings, resume: bool) -> bool:
    """Look at what is in a run's folder.

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
    return is_finished(settings.out)


@contextmanager
def held(out: Path) -> Iterator[None]:
    """Keep a run's folder from other processes while open; the system lets go of it when this process ends, however.

    Raises:
        RunError: another process is at it.
    """
    if fcntl is None:
        yield
        return
    out.mkdir(parents=True, exist_ok=True)
    folder = os.open(out, os.O_RDONLY)
    try:
        with suppress(OSError):  # a file system without locks
            if not _is_locked(folder):
                raise RunError(f"another process is training in {out}. Wait for it, or choose another --out.")
        yield
    finally:
        os.close(folder)


def _is_locked(folder: int) -> bool:
    """Lock a folder, if it is free; processes that load for one that was killed hold it for some seconds more."""
    deadline = time.monotonic() + (RELEASED_SECONDS if is_restarted() else 0)
    while True:
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() >= deadline:
                return False
            time.sleep(0.1)


def write_config(settings: Settings) -> None:
    """Write a run's settings, and what they run on, into its folder."""
    config = as_json(settings) | {"environment": environment() | {"processes": count()}}
    write_whole(settings.out / CONFIG, json.dumps(config, indent=2, ensure_ascii=False).encode())


def write_network(out: Path, params: Mapping[str, Tensor], buffers: Mapping[str, Tensor]) -> None:
    """Write a trained network into a run's folder, which makes the run complete."""
    tensors = {name: tensor.contiguous() for name, tensor in {**params, **buffers}.items()}
    write_whole(out / MODEL, safetensors.torch.save(tensors))


def read_config(path: Path) -> Settings:
    """The settings of a run, from its `config.json`."""
    try:
        return from_json(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, RecursionError) as error:
        raise SettingsError(f"{path} cannot be used: {error}") from error


def is_finished(folder: Path) -> bool:
    """Whether training has come to its end there: the network is there, and whole."""
    try:
        with safe_open(folder / MODEL, "pt"):
            return True
    except (OSError, SafetensorError):
        return False


def find_runs(paths: Iterable[Path]) -> tuple[list[Path], list[Path]]:
    """Look for run folders."""
    found: dict[str, Path] = {}
    without = []
    for path in paths:
        if not path.exists():
            raise FolderError(f"{path} does not exist: expected what was given to train or sweep as --out")
        folders = [folder for folder, files in walk(path) if CONFIG in files]
        for folder in folders:
            found.setdefault(os.path.realpath(folder), folder)
        if not folders:
            without.append(path)
    return list(found.values()), without


def find_finished(paths: Iterable[Path]) -> list[Path]:
    """Look for run folders of finished runs, and say which others are left out."""
    paths = list(paths)
    folders, without = find_runs(paths)
    finished = [folder for folder in folders if is_finished(folder)]
    for path in without:
        print(f"left out: {path} is no run folder and holds none (no {CONFIG})")
    for folder in folders:
        if folder not in finished:
            print(f"left out: {folder} has not finished (no whole {MODEL}); train --resume goes on")
    if not finished:
        looked = ", ".join(map(str, paths)) or "no folder at all"
        raise FolderError(f"no finished run in {looked}: expected folders that train or sweep wrote to, as in runs/*")
    return finished


def decisive_settings(settings: Settings) -> dict[str, Any]:
    """What decides a run's result, except split and seed: without what its method does not read, machine and places."""
    nested = as_json(settings)
    flat = {f"{part}.{name}": value for part in SECTIONS for name, value in nested[part].items()}
    del flat["data.split_seed"]
    if settings.data.name != "folder":  # elsewhere the name says what lies there
        del flat["data.folder"]
    if settings.method.rule != "multi_step":
        del flat["method.ascent_steps"]
    return {name: value for name, value in flat.items() if settings.method.name in READ_BY.get(name, METHODS)}


def read_run(folder: Path, split: str) -> FinishedRun:
    """Read a finished run.

    Raises:
        FolderError: a file is not as the runner writes it, or that error was not measured.
    """
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
    decisive, passes = decisive_settings(settings), passes_per_epoch(settings)
    return FinishedRun(folder, decisive, key, machine, losses, errors, passes, step_seconds)


def last_errors(out: Path) -> str:
    """What a run has come to, for a person."""
    with (out / METRICS).open(encoding="utf-8", newline="") as file:
        *_, row = csv.DictReader(file)
    test, validation = (float(row[f"{split}_error"] or "nan") for split in ("test", "validation"))
    errors = described_errors(test, None if math.isnan(validation) else validation)
    return f"after {row['epoch']} epochs: {', '.join(errors)}"


def passes_per_epoch(settings: Settings) -> float:
    """Forward-backward passes over the training data in an epoch, on average over the run: what a method costs."""
    method = settings.method
    passes = len(passes_of(method))
    further = method.ratio + passes - 2 if method.name in ("apart", "apart_sam") else passes - 1
    if method.name in READ_BY["method.every"]:
        further /= method.every
    if method.epsilon_schedule == "late" and method.name in READ_BY["method.epsilon_schedule"]:
        further /= 3
    return 1 + further


def is_fitted(loss: float, smoothing: float, classes: int) -> bool:
    """Whether a training loss is that of a network that has fitted its samples."""
    shares = [1 - smoothing + smoothing / classes, *[smoothing / classes] * (classes - 1)]
    least = -sum(share * math.log(share) for share in shares if share)
    return loss - least <= FITTED * math.log(classes)


def harm(settings: Settings, loss: float | None, classes: int) -> str | None:
    """What to say at the end of a run whose clean training loss is high under a perturbation; None if it is not."""
    method = settings.method
    if method.name == "plain" or loss is None or is_fitted(loss, method.label_smoothing, classes):
        return None
    start = preset(settings.data.name, "plain").method
    named = replace(start, name="plain", label_smoothing=method.label_smoothing)
    plain = replace(settings, method=named, out=settings.out.with_name(f"{settings.out.name}-plain"))
    return (
        f"the clean training loss is still {loss:.3f}: the network or the schedule does not fit its samples under "
        f"{method.name}, and plain training may be better. Compare with plain training:\n"
        f"  python -m experiments train {shlex.join(command_line(plain))}"
    )
