"""Measure what trained networks withstand: `python -m experiments evaluate runs/*`.

For every finished run, its network is measured on the test samples: error and calibration, error by exact statistics of
the training samples, accuracy when the running statistics are off, error when the samples are. Loss and error on the
training samples are measured in evaluation mode. The result is `evaluation.json` in the run's folder. Folders that have
one are passed over. A folder that holds run folders stands for all of them.

Corruptions are those of Hendrycks and Dietterich (arXiv 1903.12261). Colour images get those of CIFAR-10-C that need no
files, on pixels in [0, 1], with its severities. Other images and signals get blur, noise and loss of contrast, on
samples as the network sees them: noise is measured in deviations of the data and blur in sides of the image. Signals
have no limits, and nothing is clipped there.
"""

from __future__ import annotations

import copy
import io
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import tyro
from PIL import Image
from rich.progress import Progress
from safetensors.torch import load_file
from scipy.ndimage import gaussian_filter
from torch import Tensor, nn
from torch.nn.functional import interpolate
from torch.nn.modules.batchnorm import _BatchNorm
from torchmetrics.functional.classification import multiclass_calibration_error
from torchvision.transforms.v2 import functional as images_to

from apart_func import SettingError, load_state_
from apart_func.robustness import area, check_radii, robustness
from experiments.datasets import DataSet, Split, evaluation_batches, load_dataset
from experiments.machine import run_in_workers, tell
from experiments.networks import make_network
from experiments.runs import CONFIG, MODEL, FolderError, find_finished, read_config, write_whole
from experiments.settings import Settings

EVALUATION = "evaluation.json"
BATCH_SIZE = 256
CALIBRATION_BINS = 15
EXACT_BATCH_SIZE = 1000
Corruption = Callable[[Tensor, int], Tensor]
load_data = lru_cache(maxsize=1)(load_dataset)  # a worker goes from run to run and keeps its data

SEVERITIES = (1, 2, 3, 4, 5)
# Of grey images and signals: deviation of the Gaussian kernel as a share of the shortest side (0.3 to 0.8 pixels of a
# digit of 8 × 8); of the noise, where that of the data is 1; and, for colours too, what is left of a sample's distance
# from its own mean, as in CIFAR-10-C.
BLUR = (0.04, 0.055, 0.07, 0.085, 0.1)
NOISE = (0.2, 0.4, 0.6, 0.8, 1.0)
CONTRAST = (0.75, 0.5, 0.4, 0.3, 0.15)
# Of CIFAR-10-C: deviation of Gaussian noise, photons of shot noise, deviation of blur in pixels, what is added to the
# value, JPEG quality, and the share of the side that pixelation keeps.
COLOUR_NOISE = (0.04, 0.06, 0.08, 0.09, 0.10)
SHOTS = (500, 250, 100, 75, 50)
COLOUR_BLUR = (0.4, 0.6, 0.7, 0.8, 1.0)
BRIGHTNESS = (0.05, 0.1, 0.15, 0.2, 0.3)
QUALITY = (80, 65, 58, 50, 40)
PIXELS = (0.95, 0.9, 0.85, 0.75, 0.65)


@dataclass(frozen=True)
class Options:
    """What is measured."""

    folders: Annotated[tuple[Path, ...], tyro.conf.Positional]  # run folders, and folders of run folders.
    # of the shift in the running statistics, ascending, below 1; 0 is always measured.
    radii: tuple[float, ...] = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5)
    draws: int = 4  # random shifts at each radius.
    # test samples that accuracies under a shift and corrupted samples are measured on, at most; 0 leaves both out. All
    # other figures are from all of them.
    samples: int = 1500
    # the test samples themselves, at most: for sets and processors where all of them take too long.
    test_samples: int | None = None
    again: tyro.conf.FlagCreatePairsOff[bool] = False  # measure folders again that have been measured.
    data_dir: Path | None = None  # where the data lies, if not where it was in training.
    processes: int = 2  # that measure at the same time, with one thread each.

    def __post_init__(self) -> None:
        check_radii(self.radii)
        for name, least in {"draws": 1, "samples": 0, "test_samples": 1, "processes": 1}.items():
            count = getattr(self, name)
            if count is not None and count < least:
                raise SettingError(f"--{name.replace('_', '-')} must be {least} or more, not {count}")


def evaluate(model: nn.Module, data: DataSet, options: Options) -> dict[str, Any]:
    """Measure a network."""
    test_scores, labels = scores(model, data, data.test)
    train_scores, train_labels = scores(model, data, data.train)
    calibration = multiclass_calibration_error(
        test_scores.softmax(dim=1), labels, num_classes=data.classes, n_bins=CALIBRATION_BINS
    )
    return {
        "validation_error": None if data.validation is None else error_percent(*scores(model, data, data.validation)),
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
    held_out = data.train if data.validation is None else data.validation
    some, few = (split.subset(torch.arange(min(options.samples, len(split)))) for split in (held_out, data.test))
    towards, on = (list(evaluation_batches(data, split, batch_size=BATCH_SIZE)) for split in (some, few))
    curves = robustness(model, F.cross_entropy, towards, on, options.radii, draws=options.draws, layer_draws=0)
    of_all = {"random": curves.random, "adversarial": curves.adversarial}
    return {
        "radii": curves.radii.tolist(),
        **{kind: (100 * curve).tolist() for kind, curve in of_all.items()},
        "area": {kind: 100 * area(curves.radii, curve).item() for kind, curve in of_all.items()},
        "corruptions": corrupted_errors(model, data, few),
    }


@torch.no_grad()
def scores(model: nn.Module, data: DataSet, split: Split) -> tuple[Tensor, Tensor]:
    """Class scores of samples, (N, classes), and their labels."""
    parts = [(model(x), y) for x, y in evaluation_batches(data, split, batch_size=BATCH_SIZE)]
    return torch.cat([part for part, _ in parts]), torch.cat([labels for _, labels in parts])


@torch.no_grad()
def with_exact_statistics(model: nn.Module, data: DataSet) -> nn.Module:
    """A copy whose running statistics are those of the training samples: means over batches of one size."""
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

    corruptions = corruptions_of(data).items()
    return {name: [error(corrupt(clean, severity)) for severity in SEVERITIES] for name, corrupt in corruptions}


def error_percent(scores: Tensor, labels: Tensor) -> float:
    """The share of samples that get a wrong label, in percent."""
    return 100 * (scores.argmax(dim=1) != labels).double().mean().item()


def load_network(folder: Path, settings: Settings, data: DataSet) -> nn.Module:
    """The network that a run has left, in evaluation mode, on the CPU."""
    model = make_network(settings.model.name, data, settings.model.width)
    load_state_(model, {}, load_file(folder / MODEL))
    order = torch.channels_last if settings.training.channels_last else torch.preserve_format
    return model.to(memory_format=order).eval()


def evaluate_run(folder: Path, options: Options) -> str | None:
    """Measure the network of a run and write its `evaluation.json`, in a worker."""
    try:
        settings = read_config(folder / CONFIG)
        folder_of_data = options.data_dir or settings.data.folder
        few = options.test_samples or settings.data.test_samples
        data = load_data(replace(settings.data, folder=folder_of_data, test_samples=few))
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
        return content
    except (OSError, ValueError, RecursionError) as error:
        again = f"python -m experiments evaluate --again {folder}"
        raise FolderError(f"{path} cannot be read ({error}): {again}") from error


def main(arguments: Sequence[str]) -> None:
    """Run the command."""
    options = tyro.cli(Options, args=arguments, prog="python -m experiments evaluate", description=__doc__)
    evaluate_all(find_finished(options.folders), options)


def _generator() -> torch.Generator:
    """One that draws the same on every call."""
    return torch.Generator().manual_seed(0)


def blur(samples: Tensor, severity: int) -> Tensor:
    """Smooth every sample along its positions."""
    sigma = BLUR[severity - 1] * min(samples.shape[2:])
    return torch.from_numpy(gaussian_filter(samples.numpy(), sigma, axes=tuple(range(2, samples.dim()))))


def noise(samples: Tensor, severity: int) -> Tensor:
    """Add Gaussian noise."""
    return samples + NOISE[severity - 1] * torch.randn(samples.shape, generator=_generator())


def contrast(samples: Tensor, severity: int) -> Tensor:
    """Draw every sample towards its own mean."""
    mean = samples.flatten(1).mean(dim=1).view(-1, *[1] * (samples.dim() - 1))
    return mean + CONTRAST[severity - 1] * (samples - mean)


def _colour_blur(pixels: Tensor, severity: int) -> Tensor:
    return torch.from_numpy(gaussian_filter(pixels.numpy(), COLOUR_BLUR[severity - 1], axes=(2, 3), mode="nearest"))


def _colour_contrast(pixels: Tensor, severity: int) -> Tensor:
    mean = pixels.mean(dim=(2, 3), keepdim=True)
    return mean + CONTRAST[severity - 1] * (pixels - mean)


def _brightness(pixels: Tensor, severity: int) -> Tensor:
    """Add to the value of hue, saturation and value."""
    value = pixels.amax(dim=1, keepdim=True)
    raised = (value + BRIGHTNESS[severity - 1]).clamp(0, 1)
    return torch.where(value > 0, pixels * raised / value.clamp(min=1e-12), raised.expand_as(pixels))


def _jpeg(pixels: Tensor, severity: int) -> Tensor:
    coded = []
    for image in (255 * pixels).round().to(torch.uint8):
        with io.BytesIO() as file:
            images_to.to_pil_image(image).save(file, "jpeg", quality=QUALITY[severity - 1])
            coded.append(images_to.pil_to_tensor(Image.open(file)))
    return torch.stack(coded).float() / 255


def _pixelate(pixels: Tensor, severity: int) -> Tensor:
    size = list(pixels.shape[2:])
    few = interpolate(pixels, [max(1, int(side * PIXELS[severity - 1])) for side in size], mode="area")
    return interpolate(few, size, mode="nearest")


CORRUPTIONS: dict[str, Corruption] = {"blur": blur, "noise": noise, "contrast": contrast}
COLOUR_CORRUPTIONS: dict[str, Corruption] = {
    "noise": lambda pixels, grade: pixels + COLOUR_NOISE[grade - 1] * torch.randn(pixels.shape, generator=_generator()),
    "shot noise": lambda pixels, grade: torch.poisson(pixels * SHOTS[grade - 1], _generator()) / SHOTS[grade - 1],
    "blur": _colour_blur,
    "contrast": _colour_contrast,
    "brightness": _brightness,
    "jpeg": _jpeg,
    "pixelate": _pixelate,
}


def corruptions_of(data: DataSet) -> dict[str, Corruption]:
    """By name, functions of a data set's normalised samples and a severity from 1 to 5 to new ones."""
    if data.sample_shape[0] != 3 or len(data.sample_shape) != 3:
        return CORRUPTIONS
    mean, std = (part.view(-1, 1, 1) for part in (data.mean, data.std))

    def on_samples(corrupt: Corruption) -> Corruption:
        def corrupted(samples: Tensor, severity: int) -> Tensor:
            pixels = (samples * std + mean).clamp(0, 1)
            return (corrupt(pixels, severity).clamp(0, 1) - mean) / std

        return corrupted

    return {name: on_samples(corrupt) for name, corrupt in COLOUR_CORRUPTIONS.items()}
