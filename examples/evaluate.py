"""Measure what trained networks withstand: `python examples/evaluate.py runs/*`.

For every finished run of `train.py`, its network is measured on the test samples: error and calibration, accuracy when
the running statistics are off, error when the samples are. The result is `evaluation.json` in the run's folder. Folders
that have one are passed over. A folder that holds run folders stands for all of them.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import tyro
from corruptions import CORRUPTIONS, SEVERITIES
from rich.progress import Progress
from safetensors.torch import load_file
from torch import Tensor, nn
from torchmetrics.functional.classification import multiclass_calibration_error
from training.checkpoints import write_whole
from training.datasets import BUNDLED, DataSet, load_dataset
from training.loop import CONFIG, MODEL, read_config
from training.networks import make_network
from training.runs import FolderError, find_finished
from training.settings import Settings
from workers import run_in_workers, tell

from apart_func import ApartError, SettingError, load_state_
from apart_func.robustness import area, check_radii, robustness

EVALUATION = "evaluation.json"
BATCH_SIZE = 256
CALIBRATION_BINS = 15


@dataclass(frozen=True)
class Options:
    """What is measured.

    Attributes:
        folders: run folders, and folders of run folders.
        radii: of the shift in the running statistics, ascending, below 1; 0 is always measured.
        draws: random shifts at each radius.
        samples: test samples that these accuracies are measured on, at most; all other figures are from all of them.
        again: measure folders anew that have been measured.
        workers: processes that measure at the same time, with one thread each.
    """

    folders: Annotated[tuple[Path, ...], tyro.conf.Positional]
    radii: tuple[float, ...] = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5)
    draws: int = 4
    samples: int = 1500
    again: tyro.conf.FlagCreatePairsOff[bool] = False
    workers: int = 2

    def __post_init__(self) -> None:
        """Refuse, before any run is measured, what no run can be measured with."""
        check_radii(self.radii)
        for name, count in {"draws": self.draws, "samples": self.samples, "workers": self.workers}.items():
            if count < 1:
                raise SettingError(f"--{name} must be 1 or more, not {count}")


def evaluate(model: nn.Module, data: DataSet, options: Options) -> dict[str, Any]:
    """Measure a network.

    Args:
        model: in evaluation mode.
        data: what it was trained on, a bundled set.
        options: from the command line.

    Returns:
        What `evaluation.json` holds; errors, accuracies, areas and the calibration error are in percent.
    """
    assert data.validation is not None, "every bundled set has validation samples"
    held_out, test = _samples(data.validation), _samples(data.test)
    test_scores, labels = scores(model, test[0]), test[1]
    curves = robustness(
        model,
        F.cross_entropy,
        _batches(*held_out),
        _batches(test[0][: options.samples], labels[: options.samples]),
        options.radii,
        draws=options.draws,
        layer_draws=0,
    )
    of_all = {"random": curves.random, "adversarial": curves.adversarial}
    calibration = multiclass_calibration_error(
        test_scores.softmax(dim=1), labels, num_classes=data.classes, n_bins=CALIBRATION_BINS
    )
    return {
        "validation_error": error_percent(scores(model, held_out[0]), held_out[1]),
        "test_error": error_percent(test_scores, labels),
        "loss": F.cross_entropy(test_scores, labels).item(),
        "ece": 100 * calibration.item(),
        "radii": curves.radii.tolist(),
        **{kind: _percent(curve) for kind, curve in of_all.items()},
        "area": {kind: 100 * area(curves.radii, curve).item() for kind, curve in of_all.items()},
        "corruptions": {
            name: [error_percent(scores(model, corrupt(test[0], severity)), labels) for severity in SEVERITIES]
            for name, corrupt in CORRUPTIONS.items()
        },
        "layers": {name: _percent(curve) for name, curve in curves.layer_adversarial.items()},
    }


@torch.no_grad()
def scores(model: nn.Module, samples: Tensor) -> Tensor:
    """Class scores of samples, (N, classes)."""
    return torch.cat([model(part) for part in samples.split(BATCH_SIZE)])


def error_percent(scores: Tensor, labels: Tensor) -> float:
    """The share of samples that get a wrong label, in percent."""
    return 100 * (scores.argmax(dim=1) != labels).double().mean().item()


def load_network(folder: Path, settings: Settings) -> nn.Module:
    """The network that a run has left, in evaluation mode.

    Args:
        folder: of a finished run.
        settings: of the run.

    Returns:
        The network, on the CPU.

    Raises:
        ValueError: what lies there does not fit the settings.
    """
    data = load_data(settings.data.name)
    model = make_network(settings.model.name, data, settings.model.width)
    load_state_(model, {}, load_file(folder / MODEL))
    return model.eval()


@lru_cache(maxsize=1)
def load_data(name: str) -> DataSet:
    """A bundled data set; a worker goes from run to run and keeps it.

    Args:
        name: of the set.

    Returns:
        The set.

    Raises:
        FolderError: it is no bundled one.
    """
    if name not in BUNDLED:
        raise FolderError(f"it was trained on {name}, and only runs on {', '.join(BUNDLED)} are measured here")
    return load_dataset(name, None)


def evaluate_run(folder: Path, options: Options) -> str | None:
    """Measure the network of a run and write its `evaluation.json`, in a worker.

    Args:
        folder: of the run.
        options: from the command line.

    Returns:
        What went wrong, if anything did: other runs need not suffer from it.
    """
    try:
        settings = read_config(folder / CONFIG)
        result = evaluate(load_network(folder, settings), load_data(settings.data.name), options)
        write_whole(folder / EVALUATION, json.dumps(result, indent=1).encode())
    except Exception as error:  # of any kind: it is told at the end
        return f"{type(error).__name__}: {error}"
    finally:
        tell(folder)
    return None


def evaluate_all(folders: Sequence[Path], options: Options) -> None:
    """Measure the runs that have not been measured yet, under a progress bar.

    Args:
        folders: of finished runs.
        options: from the command line.

    Raises:
        FolderError: some could not be measured; all others have been.
    """
    left = [folder for folder in folders if options.again or not (folder / EVALUATION).is_file()]
    print(f"{len(folders)} finished runs, {len(folders) - len(left)} of them measured already")
    with Progress(disable=not left) as progress:
        bar = progress.add_task("measuring", total=len(left))
        task = partial(evaluate_run, options=options)
        problems = run_in_workers(task, left, options.workers, lambda done: progress.advance(bar, len(done)))
    failed = [f"\n  {folder}: {problem}" for folder, problem in zip(left, problems, strict=True) if problem]
    if failed:
        raise FolderError(f"{len(failed)} of {len(left)} runs could not be measured:{''.join(failed)}")


def read_evaluation(folder: Path) -> dict[str, Any]:
    """What was measured on a run.

    Args:
        folder: of the run.

    Returns:
        The content of its `evaluation.json`.

    Raises:
        FolderError: there is none.
    """
    path = folder / EVALUATION
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise FolderError(f"{path} cannot be read ({error}): python examples/evaluate.py --again {folder}") from error
    return content


def _samples(split: Any) -> tuple[Tensor, Tensor]:
    """All samples of a bundled split, which come normalised, and their labels."""
    samples, labels = split.batch(range(len(split)))
    return samples, labels


def _batches(samples: Tensor, labels: Tensor) -> list[tuple[Tensor, Tensor]]:
    return list(zip(samples.split(BATCH_SIZE), labels.split(BATCH_SIZE), strict=True))


def _percent(fractions: Tensor) -> list[float]:
    return (100 * fractions).tolist()


if __name__ == "__main__":
    try:
        options = tyro.cli(Options, description=__doc__)
        evaluate_all(find_finished(options.folders), options)
    except (FolderError, ApartError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("stopped: the same command goes on.")
