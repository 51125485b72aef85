"""CIFAR-10 and CIFAR-100 in their official Python form: pickles, read without running what is in them.

A pickle names functions and their arguments, and unpickling calls them. The unpickler here knows what rebuilds numpy
arrays, and refuses every other name.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from experiments.splits import DataError, locate

Share = tuple[Tensor, Tensor]  # images (N, 3, 32, 32), uint8, and labels (N,), int64


class Form(NamedTuple):
    """What the files of a data set are called."""

    folder: str
    train: tuple[str, ...]
    test: str
    labels: str
    classes: int


FORMS = {
    "cifar10": Form("cifar-10-batches-py", tuple(f"data_batch_{i}" for i in range(1, 6)), "test_batch", "labels", 10),
    "cifar100": Form("cifar-100-python", ("train",), "test", "fine_labels", 100),
}


def read_cifar(name: str, folder: Path) -> tuple[Share, Share]:
    """Read the training and the test images."""
    form = FORMS[name]
    root = locate(folder, form.folder, (*form.train, form.test))
    images, labels = zip(*(read_file(root / file, form) for file in form.train), strict=True)
    train, test = (torch.cat(images), torch.cat(labels)), read_file(root / form.test, form)
    if not len(train[1]) or not len(test[1]):
        raise DataError(f"{len(train[1])} training and {len(test[1])} test images in {root}")
    return train, test


def read_file(path: Path, form: Form) -> Share:
    """Read one file of images."""
    try:
        with path.open("rb") as file:
            content = ArrayUnpickler(file, encoding="bytes").load()
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


class ArrayUnpickler(pickle.Unpickler):
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
    _ALLOWED[f"{_core}.multiarray", "_reconstruct"] = np.empty(1).__reduce_ex__(2)[0]  # type: ignore[assignment]
    _ALLOWED[f"{_core}.multiarray", "scalar"] = np.int64(0).__reduce_ex__(2)[0]  # type: ignore[assignment]
    _ALLOWED[f"{_core}.numeric", "_frombuffer"] = np.empty(1).__reduce_ex__(5)[0]  # type: ignore[assignment]
