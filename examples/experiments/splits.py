"""Where samples lie, in memory or in image files, and which are trained on, validated on and tested on.

Image files are decoded when a batch needs them. Both give a batch as it is measured, or varied at random for training.
The variation draws from torch's default CPU generator, every sample by itself; whoever asks for the batch decides what
that generator holds.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple, Protocol, TypeVar

import torch
from PIL import Image
from sklearn.model_selection import train_test_split
from torch import Tensor
from torchvision.transforms.v2 import functional as images_to

from experiments.settings import DataSettings

# What the extensions of torchvision's image folders stand for; Pillow would hand others to outside programs.
FORMATS = ("JPEG", "PNG", "PPM", "BMP", "TIFF", "WEBP")


class DataError(ValueError):
    """Data is not as it must be; the message says what was looked for, where, and how to get it."""


def locate(folder: Path, official: str, parts: Sequence[str]) -> Path:
    """Find the official folder of a data set."""
    inner = folder / official
    root = inner if inner.is_dir() else folder
    missing = [part for part in parts if not ((root / part).is_file() or (root / part).is_dir())]
    if missing:
        raise DataError(f"no {', '.join(missing)} in {root}" + ("" if root == inner else f", and no folder {inner}"))
    return root


Self = TypeVar("Self", bound="Split")


class Split(Protocol):
    """One share of a data set."""

    @property
    def labels(self) -> Tensor:
        """Of all samples: (N,), int64."""

    def __len__(self) -> int:
        """How many samples there are."""

    def batch(self, indices: Sequence[int], augment: bool = False) -> tuple[Tensor, Tensor]:
        """Some of the samples."""

    def subset(self: Self, indices: Tensor) -> Self:
        """Some of the samples, as a share of their own."""


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


class Shares(NamedTuple):
    """A data set, divided into what is trained on, what settings are chosen on, if anything, and what is tested on."""

    train: Split
    validation: Split | None
    test: Split


def shares_of(pool: Split, test: Split, settings: DataSettings, validation_samples: int = 0) -> Shares:
    """Divide a set that has test samples of its own."""
    asked = settings.validation_samples
    train, validation = divided(pool, validation_samples if asked is None else asked, settings.split_seed)
    if settings.train_samples is not None:
        _, train = divided(train, settings.train_samples, settings.split_seed)
    return Shares(train, validation if len(validation) else None, test)


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


def read_image(path: str) -> Tensor:
    """Decode an image file."""
    if not os.path.isfile(path):  # to open a pipe would wait for ever
        raise DataError(f"{path} is no file with an image: take it away")
    try:
        with Image.open(path, formats=FORMATS) as image:
            if image.mode[0] in "IF":
                raise ValueError(f"its pixels are {image.mode!r}, where 8 bits a channel are expected")
            decoded: Tensor = images_to.pil_to_tensor(image.convert("RGB"))
    except Exception as error:  # every decoder of Pillow has its own
        raise DataError(f"{path} cannot be decoded ({error}): mend it, or take it away") from error
    return decoded


def crop_and_flip(images: Tensor, margin: int = 4) -> Tensor:
    """Move every image by up to `margin` pixels, on black, and mirror half: nine times as fast as `v2.RandomCrop`."""
    count, _, height, width = images.shape
    windows = images_to.pad(images, [margin]).unfold(2, height, 1).unfold(3, width, 1)
    tops, lefts = torch.randint(2 * margin + 1, (2, count))
    moved: Tensor = windows[torch.arange(count), :, tops, lefts]
    mirrored = torch.rand(count) < 0.5
    moved[mirrored] = images_to.horizontal_flip(moved[mirrored])
    return moved
