"""Data sets on disk, in their official forms: what is looked for, how it is read, and what is refused.

CIFAR is read from its pickles. A pickle names functions, and unpickling calls them; the unpickler here knows those that
rebuild numpy arrays, and refuses every other. Image files are listed here, and decoded one by one when they are needed.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.transforms.v2.functional import pil_to_tensor

# What the extensions of torchvision's image folders stand for; Pillow would hand others to outside programs.
FORMATS = ("JPEG", "PNG", "PPM", "BMP", "TIFF", "WEBP")

Images = tuple[Tensor, Tensor]  # images (N, 3, 32, 32), uint8, and labels (N,), int64
Files = tuple[list[str], Tensor]  # paths of images, and labels (N,), int64
# The names of the classes, in the order of the labels, and what is for training, for choosing settings where there is
# such a share, and for measuring.
Folders = tuple[list[str], list[Files]]


class DataError(ValueError):
    """Data is not as it must be; the message says what was looked for, where, and how to get it."""


def locate(folder: Path, official: str, parts: Sequence[str]) -> Path:
    """Find the official folder of a data set, which is this one or lies in it."""
    inner = folder / official
    root = inner if inner.is_dir() else folder
    missing = [part for part in parts if not ((root / part).is_file() or (root / part).is_dir())]
    if missing:
        raise DataError(f"no {', '.join(missing)} in {root}" + ("" if root == inner else f", and no folder {inner}"))
    return root


class Form(NamedTuple):
    """What the files of CIFAR are called."""

    folder: str
    train: tuple[str, ...]
    test: str
    labels: str
    classes: int


FORMS = {
    "cifar10": Form("cifar-10-batches-py", tuple(f"data_batch_{i}" for i in range(1, 6)), "test_batch", "labels", 10),
    "cifar100": Form("cifar-100-python", ("train",), "test", "fine_labels", 100),
}


def read_cifar(name: str, folder: Path) -> tuple[Images, Images]:
    """Read the training and the test images of CIFAR-10 or CIFAR-100."""
    form = FORMS[name]
    root = locate(folder, form.folder, (*form.train, form.test))
    images, labels = zip(*(_read_pickle(root / file, form) for file in form.train), strict=True)
    train, test = (torch.cat(images), torch.cat(labels)), _read_pickle(root / form.test, form)
    if not len(train[1]) or not len(test[1]):
        raise DataError(f"{len(train[1])} training and {len(test[1])} test images in {root}")
    return train, test


def _read_pickle(path: Path, form: Form) -> Images:
    """Read one file of images."""
    try:
        with path.open("rb") as file:
            content = _ArrayUnpickler(file, encoding="bytes").load()
    except Exception as error:  # a damaged pickle raises whatever its bytes happen to mean
        raise DataError(f"{path} cannot be read as a file of {form.folder}: {error}") from error

    entries = content if isinstance(content, dict) else {}
    images, labels = (entries.get(key.encode(), entries.get(key)) for key in ("data", form.labels))  # bytes: Python 2
    if not (isinstance(images, np.ndarray) and images.dtype == np.uint8 and images.shape[1:] == (3 * 32 * 32,)):
        raise DataError(f"{path}: 'data' is {_described(images)}, not a uint8 array (N, 3072)")
    count = len(images)
    if not (isinstance(labels, list) and len(labels) == count and all(isinstance(n, int | np.integer) for n in labels)):
        raise DataError(f"{path}: '{form.labels}' is {_described(labels)}, not a list of {count} integers")
    outside = sorted({int(label) for label in labels if not 0 <= label < form.classes})
    if outside:
        raise DataError(f"{path}: labels {outside[:5]} are not among the {form.classes} classes")
    return torch.tensor(images).view(count, 3, 32, 32), torch.tensor(labels, dtype=torch.int64)


def _described(value: Any) -> str:
    if isinstance(value, np.ndarray):
        return f"a {value.dtype} array {value.shape}"
    if isinstance(value, list):
        return f"a list of {len(value)} values"
    return "missing" if value is None else f"a {type(value).__name__}"


class _ArrayUnpickler(pickle.Unpickler):
    """Reads numbers, strings, plain containers and numpy arrays."""

    def find_class(self, module: str, name: str) -> Any:
        """What a pickle may call."""
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"it calls {module}.{name}, where only numpy arrays are expected")
        return _ALLOWED[module, name]


def _dtype(kind: str | bytes, align: int = 0, copy: int = 1) -> np.dtype[Any]:
    """`np.dtype`, which no longer takes the bytes and integers that Python 2 has pickled."""
    return np.dtype(kind.decode() if isinstance(kind, bytes) else kind, align=bool(align), copy=bool(copy))


def _encode(text: str, encoding: str | bytes) -> bytes:
    """How Python 3 writes bytes into a pickle that Python 2 can read, and no other encoding."""
    if encoding not in ("latin1", b"latin1"):
        raise pickle.UnpicklingError(f"it encodes text as {encoding!r}")
    return text.encode("latin1")


_ALLOWED: dict[tuple[str, str], Callable[..., Any]] = {
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): _dtype,
    ("_codecs", "encode"): _encode,
}
for _core in ("numpy.core", "numpy._core"):  # private functions of numpy, whose module has changed its name
    _ALLOWED[f"{_core}.multiarray", "_reconstruct"] = np.empty(1).__reduce_ex__(2)[0]  # type: ignore[assignment]  # str, says typeshed
    _ALLOWED[f"{_core}.multiarray", "scalar"] = np.int64(0).__reduce_ex__(2)[0]  # type: ignore[assignment]  # str, says typeshed
    _ALLOWED[f"{_core}.numeric", "_frombuffer"] = np.empty(1).__reduce_ex__(5)[0]  # type: ignore[assignment]  # str, says typeshed


def find_class_folders(folder: Path, measured: Sequence[str]) -> Folders:
    """List images with a sub-folder a class, in train/ and what is `measured`, of which the last is for testing."""
    there = [share for share in measured if (folder / share).is_dir()]
    if not (folder / "train").is_dir() or not there:
        raise DataError(f"no train/ with {' or '.join(f'{share}/' for share in measured)} beside it in {folder}")
    classes = _classes_in(folder / "train")
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


def _classes_in(folder: Path) -> list[str]:
    """The sub-folders; hidden ones are what programs leave behind."""
    return sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith("."))


def _list_images(folder: Path, classes: Sequence[str]) -> Files:
    """The images in the sub-folders of a folder, which are those of the classes."""
    unknown = [name for name in _classes_in(folder) if name not in classes]
    if unknown:
        raise DataError(f"{_some(unknown)} in {folder}: not among the {len(classes)} classes")
    found = [
        (str(below / file), label)
        for label, name in enumerate(classes)
        for below, files in walk(folder / name)
        for file in files
        if file.lower().endswith(IMG_EXTENSIONS)
    ]
    filled = {label for _, label in found}
    empty = [str(folder / name) for label, name in enumerate(classes) if label not in filled]
    if empty:
        raise DataError(f"no images in {_some(empty)}")
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


def read_image(path: str) -> Tensor:
    """Decode an image file: (3, H, W), uint8."""
    if not os.path.isfile(path):  # to open a pipe would wait for ever
        raise DataError(f"{path} is no file with an image: take it away")
    try:
        with Image.open(path, formats=FORMATS) as image:
            if image.mode[0] in "IF":
                raise ValueError(f"its pixels are {image.mode!r}, where 8 bits a channel are expected")
            decoded: Tensor = pil_to_tensor(image.convert("RGB"))
    except Exception as error:  # every decoder of Pillow has its own
        raise DataError(f"{path} cannot be decoded ({error}): mend it, or take it away") from error
    return decoded
