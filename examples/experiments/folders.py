"""Data sets of image files: Tiny-ImageNet in its official layout, and any set with one sub-folder a class."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torchvision.datasets.folder import IMG_EXTENSIONS

from experiments.splits import DataError, locate


class Files(NamedTuple):
    """Image files of one share of a data set.

    Attributes:
        paths: of the files.
        labels: (N,), int64.
    """

    paths: list[str]
    labels: Tensor


class Folders(NamedTuple):
    """The files of a data set.

    Attributes:
        classes: their names, in the order of the labels.
        train: files for training.
        validation: files for choosing settings; None where there are none.
        test: files for measuring.
    """

    classes: list[str]
    train: Files
    validation: Files | None
    test: Files


def find_class_folders(folder: Path, measured: Sequence[str]) -> Folders:
    """List the images of a set with one sub-folder a class.

    Args:
        folder: the one that train/ lies in.
        measured: what may lie beside it. The last that is there is for testing, one before it for choosing settings.

    Raises:
        DataError: a folder is missing or empty, or the classes of two shares differ.
    """
    there = [share for share in measured if (folder / share).is_dir()]
    if not (folder / "train").is_dir() or not there:
        raise DataError(f"no train/ with {' or '.join(f'{share}/' for share in measured)} beside it in {folder}")
    classes = sorted(entry.name for entry in os.scandir(folder / "train") if _is_class(entry))
    if len(classes) < 2:
        raise DataError(f"{len(classes)} sub-folders in {folder / 'train'}, where one a class is expected")
    train, *others = (_list_images(folder / share, classes) for share in ("train", *there))
    return Folders(classes, train, others[0] if len(others) == 2 else None, others[-1])


def find_tiny_imagenet(folder: Path) -> Folders:
    """List the images of Tiny-ImageNet; its validation images are for testing.

    Their classes are in a file, as it is delivered, or sorted into a folder a class, as the original program has it.
    """
    inner = folder / "tiny-imagenet-200"
    val = (inner if inner.is_dir() else folder) / "val"
    if val.is_dir() and not ((val / "images").exists() or (val / "val_annotations.txt").exists()):
        return find_class_folders(val.parent, ("val",))
    root = locate(folder, "tiny-imagenet-200", ("wnids.txt", "train", "val/images", "val/val_annotations.txt"))
    classes = sorted(_read_text(root / "wnids.txt").split())
    if len(classes) < 2:
        raise DataError(f"{len(classes)} classes in {root / 'wnids.txt'}")
    return Folders(classes, _list_images(root / "train", classes), None, _read_annotations(root / "val", classes))


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
    return Files([path for path, _ in found], torch.tensor([label for _, label in found]))


def _read_annotations(folder: Path, classes: Sequence[str]) -> Files:
    """The images of Tiny-ImageNet's val folder: a line of `val_annotations.txt` is a file, its class and a box."""
    labels = {wnid: label for label, wnid in enumerate(classes)}
    there = set(os.listdir(folder / "images"))
    annotations = folder / "val_annotations.txt"
    paths, chosen = [], []
    for number, line in enumerate(_read_text(annotations).splitlines(), start=1):
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
    return Files(paths, torch.tensor(chosen))


def _read_text(path: Path) -> str:
    """A text file; bytes that are no text become something that is found nowhere."""
    return path.read_text(encoding="utf-8", errors="replace")


def _is_class(entry: os.DirEntry[str]) -> bool:
    """Whether a folder is that of a class; programs leave hidden ones behind."""
    return entry.is_dir() and not entry.name.startswith(".")


def _some(names: Sequence[str]) -> str:
    """A few of many names."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
