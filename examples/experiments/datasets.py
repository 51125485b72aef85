"""Every data set behind one interface: `load_dataset(settings)` checks what is there and returns a `DataSet`."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.transforms import v2

from experiments import bundled
from experiments.cifar import FORMS, read_cifar
from experiments.folders import Files, find_class_folders, find_tiny_imagenet
from experiments.settings import DataSettings
from experiments.splits import DataError, InFiles, InMemory, Split, crop_and_flip, shares_of

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
    """Find a data set, check that it is complete, and divide it.

    Args:
        settings: which set, where it lies, and how many samples of it.

    Raises:
        DataError: it is not there, not whole, or too small.
    """
    name, folder, crop = settings.name, settings.folder, settings.crop
    if name not in NAMES:
        raise DataError(f"there is no data set {name!r}: choose one of {', '.join(NAMES)}")
    if crop is not None and crop != SIDES.get(name):
        if name not in CROPPED:
            raise DataError(f"{name} is not cropped to {crop}: leave the crop out, or take {' or '.join(CROPPED)}")
        if crop < 1:
            raise DataError(f"a crop of {crop} pixels is impossible")
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
    mean, std = map(torch.tensor, COLOURS[name])
    shares = shares_of(InMemory(*train, crop_and_flip), InMemory(*test), settings)
    return DataSet(name, FORMS[name].classes, tuple(train[0].shape[1:]), *shares, mean, std)


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
