"""Measure what trained networks withstand: `python -m experiments evaluate runs/*`.

For every finished run, its network is measured on the test samples: error and calibration, error by exact statistics of
the training samples, accuracy when the running statistics are off, error when the samples are. Loss and error on the
training samples are measured in evaluation mode. The result is `evaluation.json` in the run's folder. Folders that have
one are passed over. A folder that holds run folders stands for all of them.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import tyro
from rich.progress import Progress
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torchmetrics.functional.classification import multiclass_calibration_error

from apart_func import SettingError, load_state_
from apart_func.robustness import area, check_radii, robustness
from experiments.checkpoints import write_whole
from experiments.corruptions import SEVERITIES, corruptions_of
from experiments.datasets import DataSet, evaluation_batches, load_dataset
from experiments.networks import make_network
from experiments.runs import CONFIG, MODEL, FolderError, find_finished, read_config
from experiments.settings import DataSettings, Settings
from experiments.splits import Split
from experiments.workers import run_in_workers, tell

EVALUATION = "evaluation.json"
BATCH_SIZE = 256
CALIBRATION_BINS = 15
EXACT_BATCH_SIZE = 1000


@dataclass(frozen=True)
class Options:
    """What is measured.

    Attributes:
        folders: run folders, and folders of run folders.
        radii: of the shift in the running statistics, ascending, below 1; 0 is always measured.
        draws: random shifts at each radius.
        samples: test samples that accuracies under a shift and corrupted samples are measured on, at most; 0 leaves
            both out. All other figures are from all of them.
        test_samples: the test samples themselves, at most: for sets and processors where all of them take too long.
        again: measure folders anew that have been measured.
        data_dir: where the data lies, if not where it was in training.
        processes: that measure at the same time, with one thread each.
    """

    folders: Annotated[tuple[Path, ...], tyro.conf.Positional]
    radii: tuple[float, ...] = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5)
    draws: int = 4
    samples: int = 1500
    test_samples: int | None = None
    again: tyro.conf.FlagCreatePairsOff[bool] = False
    data_dir: Path | None = None
    processes: int = 2

    def __post_init__(self) -> None:
        """Refuse, before any run is measured, what no run can be measured with."""
        check_radii(self.radii)
        for name, least in {"draws": 1, "samples": 0, "test_samples": 1, "processes": 1}.items():
            count = getattr(self, name)
            if count is not None and count < least:
                raise SettingError(f"--{name.replace('_', '-')} must be {least} or more, not {count}")


def evaluate(model: nn.Module, data: DataSet, options: Options) -> dict[str, Any]:
    """Measure a network."""
    if options.test_samples is not None:
        data = data._replace(test=data.test.subset(torch.arange(min(options.test_samples, len(data.test)))))
    test_scores, labels = scores(model, data, data.test)
    calibration = multiclass_calibration_error(
        test_scores.softmax(dim=1), labels, num_classes=data.classes, n_bins=CALIBRATION_BINS
    )
    validation = None if data.validation is None else error_percent(*scores(model, data, data.validation))
    train_scores, train_labels = scores(model, data, data.train)
    return {
        "validation_error": validation,
        "test_error": error_percent(test_scores, labels),
        "exact_error": error_percent(*scores(with_exact_statistics(model, data), data, data.test)),
        "train_error": error_percent(train_scores, train_labels),
        "train_loss": F.cross_entropy(train_scores, train_labels).item(),
        "wrong": (test_scores.argmax(dim=1) != labels).nonzero().flatten().tolist(),
        "test_samples": len(labels),
        "loss": F.cross_entropy(test_scores, labels).item(),
        "ece": 100 * calibration.item(),
        **(when_shifted(model, data, options) if options.samples else {}),
    }


def when_shifted(model: nn.Module, data: DataSet, options: Options) -> dict[str, Any]:
    """Accuracy under shifted statistics, and error on corrupted samples."""
    few = data.test.subset(torch.arange(min(options.samples, len(data.test))))
    held_out = data.train if data.validation is None else data.validation
    some = held_out.subset(torch.arange(min(options.samples, len(held_out))))
    curves = robustness(
        model,
        F.cross_entropy,
        list(evaluation_batches(data, some, batch_size=BATCH_SIZE)),
        list(evaluation_batches(data, few, batch_size=BATCH_SIZE)),
        options.radii,
        draws=options.draws,
        layer_draws=0,
    )
    of_all = {"random": curves.random, "adversarial": curves.adversarial}
    return {
        "radii": curves.radii.tolist(),
        **{kind: _percent(curve) for kind, curve in of_all.items()},
        "area": {kind: 100 * area(curves.radii, curve).item() for kind, curve in of_all.items()},
        "corruptions": corrupted_errors(model, data, few),
        "layers": {name: _percent(curve) for name, curve in curves.layer_adversarial.items()},
    }


@torch.no_grad()
def scores(model: nn.Module, data: DataSet, split: Split) -> tuple[Tensor, Tensor]:
    """Class scores of samples, (N, classes), and their labels."""
    parts = [(model(x), y) for x, y in evaluation_batches(data, split, batch_size=BATCH_SIZE)]
    return torch.cat([part for part, _ in parts]), torch.cat([labels for _, labels in parts])


@torch.no_grad()
def with_exact_statistics(model: nn.Module, data: DataSet) -> nn.Module:
    """A copy of a network whose batch norm has the statistics of the training samples, as they are, for running ones.

    They are means over batches of one size, at most `EXACT_BATCH_SIZE`; all other layers are as in testing.
    """
    model = copy.deepcopy(model)
    layers = [layer for layer in model.modules() if isinstance(layer, _BatchNorm)]
    for layer in layers:
        layer.reset_running_stats()
        layer.momentum = None  # a mean over batches
        layer.train()
    size = math.ceil(len(data.train) / math.ceil(len(data.train) / EXACT_BATCH_SIZE))
    for samples, _ in evaluation_batches(data, data.train, batch_size=size):
        model(samples)
    return model.eval()


@torch.no_grad()
def corrupted_errors(model: nn.Module, data: DataSet, split: Split) -> dict[str, list[float]]:
    """Error in percent on corrupted samples, by name and severity."""
    samples, labels = zip(*evaluation_batches(data, split, batch_size=BATCH_SIZE), strict=True)
    clean, truth = torch.cat(samples), torch.cat(labels)

    def error(corrupted: Tensor) -> float:
        return error_percent(torch.cat([model(part) for part in corrupted.split(BATCH_SIZE)]), truth)

    return {
        name: [error(corrupt(clean, severity)) for severity in SEVERITIES]
        for name, corrupt in corruptions_of(data).items()
    }


def error_percent(scores: Tensor, labels: Tensor) -> float:
    """The share of samples that get a wrong label, in percent."""
    return 100 * (scores.argmax(dim=1) != labels).double().mean().item()


def load_network(folder: Path, settings: Settings, data: DataSet) -> nn.Module:
    """The network that a run has left, in evaluation mode, on the CPU."""
    model = make_network(settings.model.name, data, settings.model.width)
    load_state_(model, {}, load_file(folder / MODEL))
    order = torch.channels_last if settings.training.channels_last else torch.preserve_format
    return model.to(memory_format=order).eval()


@lru_cache(maxsize=1)
def load_data(settings: DataSettings) -> DataSet:
    """A data set; a worker goes from run to run and keeps it."""
    return load_dataset(settings)


def evaluate_run(folder: Path, options: Options) -> str | None:
    """Measure the network of a run and write its `evaluation.json`, in a worker."""
    try:
        settings = read_config(folder / CONFIG)
        data = load_data(replace(settings.data, folder=options.data_dir or settings.data.folder))
        result = evaluate(load_network(folder, settings, data), data, options)
        write_whole(folder / EVALUATION, json.dumps(result, indent=1).encode())
    except Exception as error:  # of any kind: it is told at the end
        return f"{type(error).__name__}: {error}"
    finally:
        tell(folder)
    return None


def evaluate_all(folders: Sequence[Path], options: Options) -> None:
    """Measure the runs that have not been measured yet, under a progress bar."""
    left = [folder for folder in folders if options.again or not (folder / EVALUATION).is_file()]
    print(f"{len(folders)} finished runs, {len(folders) - len(left)} of them measured already")
    with Progress(disable=not left) as progress:
        bar = progress.add_task("measuring", total=len(left))
        task = partial(evaluate_run, options=options)
        problems = run_in_workers(task, left, options.processes, lambda done: progress.advance(bar, len(done)))
    failed = [f"\n  {folder}: {problem}" for folder, problem in zip(left, problems, strict=True) if problem]
    if failed:
        raise FolderError(f"{len(failed)} of {len(left)} runs could not be measured:{''.join(failed)}")


def read_evaluation(folder: Path) -> dict[str, Any]:
    """What was measured on a run: the content of its `evaluation.json`."""
    path = folder / EVALUATION
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise FolderError(
            f"{path} cannot be read ({error}): python -m experiments evaluate --again {folder}"
        ) from error
    return content


def _percent(fractions: Tensor) -> list[float]:
    return (100 * fractions).tolist()


def main(arguments: Sequence[str]) -> None:
    """Run the command."""
    options = tyro.cli(Options, args=arguments, prog="python -m experiments evaluate", description=__doc__)
    evaluate_all(find_finished(options.folders), options)
