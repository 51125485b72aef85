"""Every data set behind one interface, and its batches.

`load_dataset(settings)` checks what is there and returns a `DataSet`; `training_batches(data, ...)` goes through it
once, shuffled and varied, and `evaluation_batches(data, split, ...)` through a split as it is. A training batch is a
function of the seed, the epoch and its number alone, whichever process makes it, so that a run can go on anywhere.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, TensorDataset
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.transforms import v2

from experiments import bundled
from experiments.cifar import FORMS, read_cifar
from experiments.folders import Files, find_class_folders, find_tiny_imagenet
from experiments.ranks import Share
from experiments.settings import DataSettings
from experiments.splits import DataError, InFiles, InMemory, Split, crop_and_flip, shares_of

HOW_TO_GET = {
    "cifar10": "Unpack https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz and give its folder cifar-10-batches-py",
    "cifar100": "Unpack https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz and give its folder cifar-100-python",
    "tiny-imagenet": "Unpack http://cs231n.stanford.edu/tiny-imagenet-200.zip and give its folder tiny-imagenet-200; "
    "val/ may be sorted into val/<wnid>/*",
    "imagenet": "Get ILSVRC 2012 from https://image-net.org, sort its images into train/<wnid>/*.JPEG and "
    "val/<wnid>/*.JPEG (these come in a single folder), and give the folder above train",
    "folder": "Sort images into train/<class>/* and test/<class>/* or val/<class>/* (with both, val is for choosing "
    f"settings) and give the folder above train; they end in {', '.join(IMG_EXTENSIONS)}",
}
ALL = Share()
BUNDLED = tuple(bundled.LOADERS)
NAMES = (*HOW_TO_GET, *BUNDLED)

# Height and width of the images that a network sees; those of two sets are cropped, to another size if so wished.
SIDES = {"cifar10": 32, "cifar100": 32, "tiny-imagenet": 64, "imagenet": 224, "folder": 224}
CROPPED = ("imagenet", "folder")

# Mean and deviation of the pixels, as the published experiments have them.
_OF_CIFAR = ((0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616))
_OF_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
COLOURS = {
    "cifar10": _OF_CIFAR,
    "cifar100": _OF_CIFAR,
    "tiny-imagenet": _OF_IMAGENET,
    "imagenet": _OF_IMAGENET,
    "folder": _OF_IMAGENET,
}
_OF_PRETRAINED = ((0.5,) * 3, (0.5,) * 3)  # what pretrained networks of CIFAR's enlarged images expect


class DataSet(NamedTuple):
    """A data set, checked.

    Attributes:
        name: one of `NAMES`.
        classes: number of classes.
        sample_shape: what the network sees, (C, H, W) for images and (C, L) for signals.
        train: what is trained on.
        validation: what settings are chosen on; None where the set has none.
        test: what a result is measured on.
        mean: of every channel: of images scaled to [0, 1], or of float samples as they are.
        std: standard deviation, likewise.
    """

    name: str
    classes: int
    sample_shape: tuple[int, ...]
    train: Split
    validation: Split | None
    test: Split
    mean: Tensor
    std: Tensor


def load_dataset(settings: DataSettings) -> DataSet:
    """Find a data set, check that it is complete, and divide it."""
    name, crop = settings.name, settings.crop
    if name not in NAMES:
        raise DataError(f"there is no data set {name!r}: choose one of {', '.join(NAMES)}")
    if crop is not None and crop != SIDES.get(name):
        if name not in CROPPED:
            raise DataError(f"{name} is not cropped to {crop}: leave the crop out, or take {' or '.join(CROPPED)}")
        if crop < 1:
            raise DataError(f"a crop of {crop} pixels is impossible")
    if settings.resize is not None and name not in FORMS:
        raise DataError(f"{name} is not enlarged to {settings.resize}: leave it out, or take {' or '.join(FORMS)}")
    data = _load(settings)
    few = torch.arange(min(settings.test_samples or len(data.test), len(data.test)))
    return data if settings.test_samples is None else data._replace(test=data.test.subset(few))


def _load(settings: DataSettings) -> DataSet:
    """A data set, with all of its test samples."""
    name, folder = settings.name, settings.folder
    if name in BUNDLED:
        return _load_bundled(settings)
    if folder is None or not folder.is_dir():
        missing = f"there is no folder {folder}" if folder else "the folder that it lies in is needed"
        raise _with_advice(name, DataError(missing))
    return (_load_cifar if name in FORMS else _load_folders)(settings, folder)


def _load_bundled(settings: DataSettings) -> DataSet:
    """A data set that comes with a Python package, normalised by its training samples."""
    if settings.folder is not None:
        raise DataError(
            f"{settings.name} comes with a Python package and is not read from {settings.folder}: give no folder"
        )
    shares = bundled.LOADERS[settings.name](settings)
    samples, labels = shares.train.batch(range(len(shares.train)))
    deviation, mean = torch.std_mean(samples)
    classes = int(labels.max()) + 1
    return DataSet(settings.name, classes, tuple(samples.shape[1:]), *shares, mean.view(1), deviation.view(1))


def _load_cifar(settings: DataSettings, folder: Path) -> DataSet:
    """CIFAR-10 or CIFAR-100, in memory."""
    name = settings.name
    try:
        train, test = read_cifar(name, folder)
    except DataError as error:
        raise _with_advice(name, error) from error
    side = settings.resize
    mean, std = map(torch.tensor, _OF_PRETRAINED if side else COLOURS[name])
    shares = shares_of(InMemory(*train, crop_and_flip, side), InMemory(*test, side=side), settings)
    return DataSet(name, FORMS[name].classes, (3, side or 32, side or 32), *shares, mean, std)


def _load_folders(settings: DataSettings, folder: Path) -> DataSet:
    """A data set of image files."""
    name, side = settings.name, settings.crop or SIDES[settings.name]
    crop: v2.Transform
    fit: v2.Transform
    try:
        if name == "tiny-imagenet":
            found, native = find_tiny_imagenet(folder), side
            crop, fit = v2.RandomCrop(side, padding=4), v2.Identity()
        else:
            found, native = find_class_folders(folder, ("val",) if name == "imagenet" else ("val", "test")), None
            crop, fit = (
                v2.RandomResizedCrop(side),
                v2.Compose([v2.Resize(round(side * 256 / 224)), v2.CenterCrop(side)]),
            )
    except DataError as error:
        raise _with_advice(name, error) from error
    vary = v2.Compose([crop, v2.RandomHorizontalFlip()])

    def split(files: Files) -> InFiles:
        return InFiles(*files, vary, fit, native)

    if found.validation is not None and settings.validation_samples is not None:
        raise DataError(f"{name} has validation images of its own, in {folder / 'val'}: ask for no others")
    mean, std = map(torch.tensor, COLOURS[name])
    shares = shares_of(split(found.train), split(found.test), settings)
    if found.validation is not None:
        shares = shares._replace(validation=split(found.validation))
    return DataSet(name, len(found.classes), (3, side, side), *shares, mean, std)


def _with_advice(name: str, error: DataError) -> DataError:
    """The same error, with how to get the data."""
    return DataError(f"{name}: {error}. {HOW_TO_GET[name]}.")


def steps_per_epoch(data: DataSet, batch_size: int) -> int:
    """The number of full batches in the training samples, at least one."""
    if not 1 <= batch_size <= len(data.train):
        raise DataError(f"no batch of {batch_size} can be made from {len(data.train)} training samples ({data.name})")
    return len(data.train) // batch_size


def training_batches(
    data: DataSet,
    *,
    batch_size: int,
    seed: int,
    epoch: int,
    first: int = 0,
    workers: int = 0,
    pin_memory: bool = False,
    augment: bool = True,
    share: Share = ALL,
) -> Iterator[tuple[Tensor, Tensor]]:
    """One epoch of training batches, all of them full, each a function of seed, epoch and its number alone.

    A rank gets its share of every batch, varied by draws of its own.

    Raises:
        DataError: there are too few samples for a single batch; while iterating, that a file cannot be decoded.
    """
    steps = steps_per_epoch(data, batch_size)
    order = torch.randperm(len(data.train), generator=torch.Generator().manual_seed(mix(seed, epoch, 0)))
    chosen = [share.of(indices.tolist()) for indices in order.split(batch_size)[:steps]]
    of_rank = (share.rank,) if share.rank else ()
    seeds = [mix(seed, epoch, 1 + number, *of_rank) for number in range(steps)] if augment else None
    return _iterate(_Batches(data.train, data.mean, data.std, chosen, seeds), first, workers, pin_memory)


def evaluation_batches(
    data: DataSet, split: Split, *, batch_size: int, workers: int = 0, pin_memory: bool = False, share: Share = ALL
) -> Iterator[tuple[Tensor, Tensor]]:
    """A split as it is, or a share of it: in order, not varied, every sample once; the last batch may be smaller."""
    samples = share.of(range(len(split)))
    chosen = [samples[start : start + batch_size] for start in range(0, len(samples), batch_size)]
    return _iterate(_Batches(split, data.mean, data.std, chosen, None), 0, workers, pin_memory)


def whole(data: DataSet, split: Split) -> TensorDataset:
    """A split as it is, in memory: what a `DataLoader` takes."""
    ((samples, labels),) = evaluation_batches(data, split, batch_size=len(split))
    return TensorDataset(samples, labels)


@dataclass(frozen=True)
class _Batches(Dataset[tuple[Tensor, Tensor] | DataError]):
    """Batches by their number.

    Attributes:
        split: where the samples are.
        mean: see `DataSet`.
        std: see `DataSet`.
        chosen: the samples of every batch.
        seeds: of the variation of every batch; None varies nothing.
    """

    split: Split
    mean: Tensor
    std: Tensor
    chosen: Sequence[Sequence[int]]
    seeds: Sequence[int] | None

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitem__(self, number: int) -> tuple[Tensor, Tensor] | DataError:
        """A batch, or what is wrong with it: an error raised in a worker would come wrapped in its traceback."""
        try:
            if self.seeds is None:
                samples, labels = self.split.batch(self.chosen[number])
            else:
                with _default_generator_at(self.seeds[number]):
                    samples, labels = self.split.batch(self.chosen[number], augment=True)
        except DataError as error:
            return error
        return _normalise(samples, self.mean, self.std), labels


def _iterate(batches: _Batches, first: int, workers: int, pin_memory: bool) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches from number `first` on."""
    loader = DataLoader(
        batches,
        batch_size=None,  # what the loader takes for a sample is a batch
        sampler=range(first, len(batches)),
        num_workers=workers,
        pin_memory=pin_memory,
        worker_init_fn=_obey_the_parent_alone,
        generator=torch.Generator(),  # the loader draws a seed for its workers, which they do not need
    )
    for batch in loader:
        if isinstance(batch, DataError):
            raise batch
        yield batch


def _normalise(samples: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Bring samples to mean 0 and deviation 1 in every channel, by the statistics of the data set."""
    scale = 255 if samples.dtype == torch.uint8 else 1
    shape = (-1, *[1] * (samples.dim() - 2))
    return samples.to(torch.float32).sub(scale * mean.view(shape)).div_(scale * std.view(shape))


def mix(*parts: int) -> int:
    """A seed that depends on all parts."""
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0])


@contextmanager
def _default_generator_at(seed: int) -> Iterator[None]:
    """Seed torch's default CPU generator, and put it back where it was; `torch.manual_seed` would seed devices too."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


def _obey_the_parent_alone(worker: int) -> None:
    """Ctrl-C and a batch system's SIGTERM reach all processes of a run; the parent decides when its workers stop."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_await_the_parents_signal, daemon=True).start()


def _await_the_parents_signal() -> None:
    """End this process when the parent says so, as it does when it ends itself."""
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)
