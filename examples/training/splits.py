"""Where the samples of a data set lie: in memory, or in image files that are decoded when a batch needs them.

Both give a batch as it is measured, or varied at random for training. The variation draws from torch's default CPU
generator, every sample by itself; whoever asks for the batch decides what that generator holds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional as images_to

# What the extensions of torchvision's image folders stand for; Pillow would hand others to outside programs.
FORMATS = ("JPEG", "PNG", "PPM", "BMP", "TIFF", "WEBP")


class DataError(ValueError):
    """Data is not as it must be; the message says what was looked for, where, and how to get it."""


def locate(folder: Path, official: str, parts: Sequence[str]) -> Path:
    """Find the official folder of a data set.

    Args:
        folder: that folder under any name, or the one that it lies in.
        official: its name.
        parts: files and folders that are in it.

    Returns:
        The folder.

    Raises:
        DataError: some of the parts are missing.
    """
    inner = folder / official
    root = inner if inner.is_dir() else folder
    missing = [part for part in parts if not (root / part).exists()]
    if missing:
        raise DataError(f"no {', '.join(missing)} in {root}" + ("" if root == inner else f", and no folder {inner}"))
    return root


class Split(Protocol):
    """One share of a data set."""

    def __len__(self) -> int:
        """How many samples there are."""

    def batch(self, indices: Sequence[int], augment: bool = False) -> tuple[Tensor, Tensor]:
        """Some of the samples.

        Args:
            indices: which, from 0.
            augment: whether they are varied at random, as for training.

        Returns:
            Samples, uint8 images (N, C, H, W) or float32, and labels, int64.
        """


@dataclass(frozen=True)
class InMemory:
    """Samples of one shape, in a tensor.

    Attributes:
        samples: all of them, the first dimension counts.
        labels: (N,), int64.
        vary: makes training samples of a batch; None leaves them as they are.
    """

    samples: Tensor
    labels: Tensor
    vary: Callable[[Tensor], Tensor] | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, indices: Sequence[int], augment: bool = False) -> tuple[Tensor, Tensor]:
        """See `Split`."""
        chosen = torch.as_tensor(indices)
        samples = self.samples[chosen]
        return self.vary(samples) if augment and self.vary else samples, self.labels[chosen]


@dataclass(frozen=True)
class InFiles:
    """Image files, in any of `FORMATS`.

    Attributes:
        paths: of the files.
        labels: (N,), int64.
        vary: from an image to a training sample.
        fit: from an image to a sample for measuring.
        side: height and width that every image must have; None takes any.
    """

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

    def _read(self, path: str) -> Tensor:
        """An image, of the right size."""
        image = read_image(path)
        if self.side and image.shape != (3, self.side, self.side):
            height, width = image.shape[1:]
            raise DataError(f"{path} has {height} × {width} pixels, where {self.side} × {self.side} are expected")
        return image


def read_image(path: str) -> Tensor:
    """Decode an image file.

    Args:
        path: of the file.

    Returns:
        The image, (3, H, W), uint8, whatever colours the file has.

    Raises:
        DataError: it is not an image, or a damaged one.
    """
    try:
        with Image.open(path, formats=FORMATS) as image:
            if image.mode[0] in "IF":
                raise ValueError(f"its pixels are {image.mode!r}, where 8 bits a channel are expected")
            decoded: Tensor = images_to.pil_to_tensor(image.convert("RGB"))
    except Exception as error:  # every decoder of Pillow has its own
        raise DataError(f"{path} cannot be decoded ({error}): mend it, or take it away") from error
    return decoded


def crop_and_flip(images: Tensor, margin: int = 4) -> Tensor:
    """Move every image by up to `margin` pixels, filling with black, and mirror half of them.

    `v2.RandomCrop` cuts one window for a whole batch, and sample by sample it takes nine times as long as this.

    Args:
        images: (N, C, H, W).
        margin: the furthest that an image moves.

    Returns:
        New images of the same shape.
    """
    count, _, height, width = images.shape
    windows = images_to.pad(images, [margin]).unfold(2, height, 1).unfold(3, width, 1)
    tops, lefts = torch.randint(2 * margin + 1, (2, count))
    moved: Tensor = windows[torch.arange(count), :, tops, lefts]
    mirrored = torch.rand(count) < 0.5
    moved[mirrored] = images_to.horizontal_flip(moved[mirrored])
    return moved
