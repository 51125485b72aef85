"""Every data set behind one interface, and its batches.

`load_dataset(name, folder)` checks what is in the folder and returns a `DataSet`; `training_batches(data, ...)` goes
through it once, shuffled and varied, and `evaluation_batches(data, split, ...)` through a split as it is. A training
batch is a function of the seed, the epoch and its number alone, whichever worker process makes it, so that a run can go
on in the middle of an epoch.
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

import data as bundled
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.transforms import v2

from training.cifar import FORMS, read_cifar
from training.folders import Files, find_class_folders, find_tiny_imagenet
from training.splits import DataError, InFiles, InMemory, Split, crop_and_flip

__all__ = [
    "BUNDLED",
    "NAMES",
    "DataError",
    "DataSet",
    "Split",
    "evaluation_batches",
    "load_dataset",
    "steps_per_epoch",
    "training_batches",
]

HOW_TO_GET = {
    "cifar10": "Unpack https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz and give its folder cifar-10-batches-py",
    "cifar100": "Unpack https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz and give its folder cifar-100-python",
    "tiny-imagenet": "Unpack http://cs231n.stanford.edu/tiny-imagenet-200.zip and give its folder tiny-imagenet-200",
    "imagenet": "Get ILSVRC 2012 from https://image-net.org, sort its images into train/<wnid>/*.JPEG and "
    "val/<wnid>/*.JPEG (these come in a single folder), and give the folder above train",
    "folder": "Sort images into train/<class>/* and test/<class>/* or val/<class>/* (with both, val is for choosing "
    f"settings) and give the folder above train; they end in {', '.join(IMG_EXTENSIONS)}",
}
BUNDLED = tuple(bundled.LOADERS)
NAMES = (*HOW_TO_GET, *BUNDLED)

# Height and width of the images that a network sees; those of two sets are cropped, to another size if so wished.
SIDES = {"cifar10": 32, "cifar100": 32, "tiny-imagenet": 64, "imagenet": 224, "folder": 224}
CROPPED = ("imagenet", "folder")

# Mean and deviation of the pixels of the whole training sets, as they are commonly given.
COLOURS = {
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    "tiny-imagenet": ((0.4802, 0.4481, 0.3975), (0.2770, 0.2691, 0.2821)),
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "folder": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}


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


def load_dataset(name: str, folder: Path | None, crop: int | None = None) -> DataSet:
    """Find a data set and check that it is complete.

    Args:
        name: one of `NAMES`.
        folder: where it lies; None for those of `BUNDLED`, which come with Python packages.
        crop: side of the images that the network sees, where the set leaves a choice.

    Returns:
        The data set.

    Raises:
        DataError: it is not there, or not whole.
    """
    if name not in NAMES:
        raise DataError(f"there is no data set {name!r}: choose one of {', '.join(NAMES)}")
    if crop is not None and crop != SIDES.get(name):
        if name not in CROPPED:
            raise DataError(f"{name} is not cropped to {crop}: leave the crop out, or take {' or '.join(CROPPED)}")
        if crop < 1:
            raise DataError(f"a crop of {crop} pixels is impossible")
    if name in BUNDLED:
        return _load_bundled(name, folder)
    try:
        if folder is None or not folder.is_dir():
            raise DataError(f"there is no folder {folder}" if folder else "the folder that it lies in is needed")
        return _load_cifar(name, folder) if name in FORMS else _load_folders(name, folder, crop or SIDES[name])
    except DataError as error:
        raise DataError(f"{name}: {error}. {HOW_TO_GET[name]}.") from error


def steps_per_epoch(data: DataSet, batch_size: int) -> int:
    """The number of full batches in the training samples, at least one.

    Args:
        data: the data set.
        batch_size: samples in a batch.

    Returns:
        How many batches `training_batches` yields from the first one on.

    Raises:
        DataError: there are too few samples for a single batch.
    """
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
) -> Iterator[tuple[Tensor, Tensor]]:
    """One epoch of training batches, all of them full, each a function of seed, epoch and its number alone.

    Args:
        data: the data set.
        batch_size: samples in a batch.
        seed: of the run, not negative.
        epoch: decides order and variation, together with the seed.
        first: number of the first batch that is wanted; the ones before it are not made.
        workers: processes that make batches; 0 makes them in this one.
        pin_memory: whether they come in pinned memory, from which copies to a device need not be waited for.
        augment: whether samples are varied at random, in the way of the data set.

    Returns:
        An iterator over normalised float32 samples and int64 labels. No global random generator is changed.

    Raises:
        DataError: there are too few samples for a single batch; while iterating, that a file cannot be decoded.
    """
    steps = steps_per_epoch(data, batch_size)
    order = torch.randperm(len(data.train), generator=torch.Generator().manual_seed(_mix(seed, epoch, 0)))
    chosen = [indices.tolist() for indices in order.split(batch_size)[:steps]]
    seeds = [_mix(seed, epoch, 1 + number) for number in range(steps)] if augment else None
    return _iterate(_Batches(data.train, data.mean, data.std, chosen, seeds), first, workers, pin_memory)


def evaluation_batches(
    data: DataSet, split: Split, *, batch_size: int, workers: int = 0, pin_memory: bool = False
) -> Iterator[tuple[Tensor, Tensor]]:
    """A split as it is: in order, not varied, every sample once; the last batch may be smaller.

    Args:
        data: the data set, whose mean and deviation normalise.
        split: one of its splits.
        batch_size: samples in a batch.
        workers: processes that make batches; 0 makes them in this one.
        pin_memory: whether they come in pinned memory.

    Returns:
        An iterator over normalised float32 samples and int64 labels.

    Raises:
        DataError: while iterating, that a file cannot be decoded.
    """
    chosen = [range(len(split))[start : start + batch_size] for start in range(0, len(split), batch_size)]
    return _iterate(_Batches(split, data.mean, data.std, chosen, None), 0, workers, pin_memory)


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


def _mix(*parts: int) -> int:
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


def _load_bundled(name: str, folder: Path | None) -> DataSet:
    """A data set that comes with a Python package."""
    if folder is not None:
        raise DataError(f"{name} comes with a Python package and is not read from {folder}: give no folder")
    try:
        loaded = bundled.load(name)
    except ImportError as error:
        raise DataError(str(error)) from error
    train, validation, test = (InMemory(split.images, split.labels) for split in loaded[1:])
    shape = tuple(train.samples.shape[1:])
    mean, std = torch.zeros(shape[0]), torch.ones(shape[0])  # its samples come normalised
    return DataSet(name, loaded.classes, shape, train, validation, test, mean, std)


def _load_cifar(name: str, folder: Path) -> DataSet:
    """CIFAR-10 or CIFAR-100, in memory."""
    train, test = read_cifar(name, folder)
    mean, std = map(torch.tensor, COLOURS[name])
    splits = InMemory(*train, crop_and_flip), None, InMemory(*test)
    return DataSet(name, FORMS[name].classes, tuple(train[0].shape[1:]), *splits, mean, std)


def _load_folders(name: str, folder: Path, side: int) -> DataSet:
    """A data set of image files."""
    crop: v2.Transform
    fit: v2.Transform
    if name == "tiny-imagenet":
        found, native = find_tiny_imagenet(folder), side
        crop, fit = v2.RandomCrop(side, padding=4), v2.Identity()
    else:
        found, native = find_class_folders(folder, ("val",) if name == "imagenet" else ("val", "test")), None
        crop, fit = v2.RandomResizedCrop(side), v2.Compose([v2.Resize(round(side * 256 / 224)), v2.CenterCrop(side)])
    vary = v2.Compose([crop, v2.RandomHorizontalFlip()])

    def split(files: Files) -> InFiles:
        return InFiles(*files, vary, fit, native)

    mean, std = map(torch.tensor, COLOURS[name])
    splits = split(found.train), split(found.validation) if found.validation else None, split(found.test)
    return DataSet(name, len(found.classes), (3, side, side), *splits, mean, std)
