"""Run folders, as `train.py` leaves them and the sweep and the report find them.

config.json          the full settings
metrics.csv          a row an epoch
model.safetensors    written last: where it lies, the run has finished
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, get_args

from training.loop import CONFIG, METRICS, MODEL
from training.settings import MethodName, Settings, as_json, from_json

SECTIONS = ("data", "model", "method", "training")

METHODS: tuple[str, ...] = get_args(MethodName)

# Settings that only some methods read; the others concern all.
READ_BY = {
    "method.epsilon": {"apart", "one_pass", "apart_sam"},
    "method.rule": {"apart", "one_pass", "apart_sam"},
    "method.groups": {"apart", "one_pass", "apart_sam"},
    "method.ascent_steps": {"apart", "apart_sam"},
    "method.clean_fraction": {"one_pass"},
    "method.carry": {"one_pass"},
    "method.ratio": {"apart", "apart_sam"},
    "method.remainder": {"apart", "apart_sam"},
    "method.rho": {"sam", "apart_sam"},
}


class FolderError(ValueError):
    """A run folder that cannot be used: which one, why, and what would do."""


class FinishedRun(NamedTuple):
    """What a finished run has left.

    Attributes:
        folder: where it lies.
        settings: what decides its result, except the seed, as `section.name`.
        seed: of the run.
        machine: torch and hardware.
        losses: mean training loss of every epoch, without perturbation.
        errors: error in percent after each epoch that measured it; the last epoch is among them.
    """

    folder: Path
    settings: Mapping[str, Any]
    seed: int
    machine: str
    losses: list[float]
    errors: Mapping[int, float]


def is_finished(folder: Path) -> bool:
    """Whether training has come to its end there."""
    return (folder / MODEL).is_file()


def find_runs(paths: Iterable[Path]) -> tuple[list[Path], list[Path]]:
    """Look for run folders.

    Args:
        paths: run folders and folders of run folders; anything else may be among them, as in a shell's `runs/*`.

    Returns:
        The run folders, each once, and the paths that neither are nor hold one.

    Raises:
        FolderError: a path does not exist.
    """
    found: dict[Path, Path] = {}
    without = []
    for path in paths:
        if not path.exists():
            raise FolderError(f"{path} does not exist: expected what was given to train.py or sweep.py as --out")
        folders = [config.parent for config in sorted(path.rglob(CONFIG))]
        found.update((folder.resolve(), folder) for folder in folders)
        if not folders:
            without.append(path)
    return list(found.values()), without


def find_finished(paths: Iterable[Path]) -> list[Path]:
    """Look for run folders of finished runs, and say which others are left out.

    Args:
        paths: run folders and folders of run folders.

    Returns:
        At least one folder.

    Raises:
        FolderError: there is none.
    """
    paths = list(paths)
    folders, without = find_runs(paths)
    finished = [folder for folder in folders if is_finished(folder)]
    for path in without:
        print(f"left out: {path} is no run folder and holds none (no {CONFIG})")
    for folder in folders:
        if folder not in finished:
            print(f"left out: {folder} has not finished (no {MODEL}); train.py --resume goes on")
    if not finished:
        looked = ", ".join(map(str, paths)) or "no folder at all"
        raise FolderError(
            f"no finished run in {looked}: expected folders that train.py or sweep.py wrote to, as in runs/*"
        )
    return finished


def decisive_settings(settings: Settings) -> dict[str, Any]:
    """What decides a run's result, except the seed: without what its method does not read, machine and places.

    Args:
        settings: of the run.

    Returns:
        Plain values as `section.name`.
    """
    nested = as_json(settings)
    flat = {f"{part}.{name}": value for part in SECTIONS for name, value in nested[part].items()}
    if settings.data.name != "folder":  # elsewhere the name says what lies there
        del flat["data.folder"]
    if settings.method.rule != "multi_step":
        del flat["method.ascent_steps"]
    return {name: value for name, value in flat.items() if settings.method.name in READ_BY.get(name, METHODS)}


def read_run(folder: Path, split: str) -> FinishedRun:
    """Read a finished run.

    Args:
        folder: its folder.
        split: which error is read, `test` or `validation`.

    Returns:
        Settings and curves.

    Raises:
        FolderError: a file is not as `train.py` writes it, or that error was not measured.
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
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        problem = f"{type(error).__name__}: {error}"
        raise FolderError(f"{folder / name} is not as train.py writes it ({problem}): leave {folder} out") from error
    if settings.training.epochs not in errors:
        other = "validation" if split == "test" else "test"
        raise FolderError(f"{folder / METRICS} has no {split} error of the last epoch: --measure-on {other} may do")
    return FinishedRun(folder, decisive_settings(settings), settings.seed, machine, losses, errors)


def passes_per_epoch(settings: Mapping[str, Any]) -> float:
    """Forward-backward passes over the training data in an epoch of a method.

    Args:
        settings: decisive settings of a run.

    Returns:
        1 for plain training and APART in one pass, 2 for SAM, 1 + ratio where the second pass is an adversarial one;
        and one for every further gradient that a rule takes.
    """
    second = 1.0 if settings["method.name"] == "sam" else settings.get("method.ratio", 0.0)
    return float(second + settings.get("method.ascent_steps", 1))
