"""Small data sets, written in the exact on-disk formats of the large ones."""

from __future__ import annotations

import pickle
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from experiments import datasets
from experiments.settings import DataSettings
from torchvision.transforms.v2.functional import to_pil_image

CIFAR10_FILES = [*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"]
WNIDS = ["n02124075", "n04067472", "n01443537"]  # the official list is not sorted either


class Python2Pickler(pickle._Pickler):
    """Writes pickles as Python 2 and its numpy did: byte strings, old module names, integers for dtype's flags."""

    dispatch: ClassVar = dict(pickle._Pickler.dispatch)
    dispatch_table: ClassVar = {
        type(np.dtype(np.uint8)): lambda dtype: (np.dtype, ("u1", 0, 1), (3, "|", None, None, None, -1, -1, 0))
    }

    def save_string(self, value: str | bytes) -> None:
        data = value if isinstance(value, bytes) else value.encode("latin1")
        short = len(data) < 256
        self.write(pickle.SHORT_BINSTRING + bytes([len(data)]) if short else b"T" + struct.pack("<i", len(data)))
        self.write(data)
        self.memoize(value)

    dispatch[bytes] = dispatch[str] = save_string

    def save_function(self, value: object) -> None:
        self.write(pickle.GLOBAL + f"{value.__module__}\n{value.__qualname__}\n".replace("_core", "core").encode())
        self.memoize(value)

    dispatch[type(np.empty(0).__reduce__()[0])] = save_function


def random_images(count: int, side: int = 32, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, (count, 3, side, side), dtype=torch.uint8, generator=generator)


def write_pickle(path: Path, content: object, protocol: int | None = None) -> None:
    """As Python 2 would, or by a protocol of this Python."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        if protocol is None:
            Python2Pickler(file, 2).dump(content)
        else:
            pickle.dump(content, file, protocol)


def cifar10_content(images: torch.Tensor, labels: Sequence[int]) -> dict[bytes, object]:
    return {
        b"batch_label": b"training batch 1 of 5",
        b"labels": list(labels),
        b"data": images.flatten(1).numpy(),
        b"filenames": [b"leptodactylus_pentadactylus_s_000004.png"] * len(labels),
    }


def write_cifar10(parent: Path, per_file: int = 4, protocol: int | None = None) -> Path:
    """Label i % 10 for image i of the training set, and the images of seeds 1 to 5 and, for testing, 6."""
    folder = parent / "cifar-10-batches-py"
    for number, file in enumerate(CIFAR10_FILES):
        labels = [(number * per_file + i) % 10 for i in range(per_file)]
        write_pickle(folder / file, cifar10_content(random_images(per_file, seed=number + 1), labels), protocol)
    meta = {b"num_cases_per_batch": 10000, b"label_names": [b"airplane", b"automobile"], b"num_vis": 3072}
    write_pickle(folder / "batches.meta", meta, protocol)
    return folder


def write_cifar100(parent: Path, train: int = 20, test: int = 6) -> Path:
    folder = parent / "cifar-100-python"
    for file, count, seed in (("train", train, 1), ("test", test, 2)):
        content = {
            b"filenames": [b"bos_taurus_s_000507.png"] * count,
            b"batch_label": b"training batch 1 of 1",
            b"fine_labels": [(99 - i) % 100 for i in range(count)],
            b"coarse_labels": [i % 20 for i in range(count)],
            b"data": random_images(count, seed=seed).flatten(1).numpy(),
        }
        write_pickle(folder / file, content)
    write_pickle(folder / "meta", {b"fine_label_names": [b"apple"], b"coarse_label_names": [b"fish"]})
    return folder


def write_image(path: Path, image: torch.Tensor) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    to_pil_image(image).save(path, quality=95)


def write_tiny_imagenet(parent: Path, per_class: int = 4) -> Path:
    """Plain colours, so that labels can be told from images: class i is bright in channel i. Some are greyscale."""
    folder = parent / "tiny-imagenet-200"
    folder.mkdir(parents=True)
    (folder / "wnids.txt").write_text("".join(f"{wnid}\n" for wnid in WNIDS))
    (folder / "words.txt").write_text("".join(f"{wnid}\tsome words\n" for wnid in WNIDS))
    for wnid in WNIDS:
        for i in range(per_class):
            write_image(folder / "train" / wnid / "images" / f"{wnid}_{i}.JPEG", coloured(wnid))
        boxes = "".join(f"{wnid}_{i}.JPEG\t0\t10\t62\t60\n" for i in range(per_class))
        (folder / "train" / wnid / f"{wnid}_boxes.txt").write_text(boxes)
    lines = []
    for i in range(2 * len(WNIDS)):
        wnid = WNIDS[i % len(WNIDS)]
        write_image(folder / "val" / "images" / f"val_{i}.JPEG", coloured(wnid))
        lines.append(f"val_{i}.JPEG\t{wnid}\t0\t32\t44\t62\n")
    (folder / "val" / "val_annotations.txt").write_text("".join(lines))
    write_image(folder / "test" / "images" / "test_0.JPEG", coloured(WNIDS[0]))
    return folder


def coloured(wnid: str, height: int = 64, width: int = 64) -> torch.Tensor:
    """A picture of one colour, by the rank of its class."""
    image = torch.zeros(3, height, width, dtype=torch.uint8)
    image[sorted(WNIDS).index(wnid)] = 200
    return image


def write_class_folders(
    folder: Path, shares: Sequence[str] = ("train", "val"), per_class: int = 4, side: int | None = None
) -> Path:
    """JPEG files of different sizes, or of one, in one sub-folder a class."""
    for share in shares:
        for wnid in WNIDS:
            for i in range(per_class):
                size = (side, side) if side else (70 + 10 * i, 90)
                write_image(folder / share / wnid / f"{wnid}_{i}.JPEG", coloured(wnid, *size))
    return folder


WRITERS = {
    "cifar10": write_cifar10,
    "cifar100": write_cifar100,
    "tiny-imagenet": write_tiny_imagenet,
    "imagenet": write_class_folders,
    "folder": write_class_folders,
}


def write_all(parent: Path) -> dict[str, Path]:
    """One of each data set."""
    return {name: write(parent / name) for name, write in WRITERS.items()}


def load_dataset(name: str, folder: Path | None, crop: int | None = None, **changes: Any) -> datasets.DataSet:
    return datasets.load_dataset(DataSettings(name, folder, crop, **changes))
