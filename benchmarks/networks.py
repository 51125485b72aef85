"""The networks that are measured, each with a batch: `make_case("resnet18", ...)`.

Wide and narrow, deep and shallow: in `resnet18` arithmetic is everything, in `overhead` what surrounds it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from experiments.networks import torchvision_resnet, wide_resnet
from experiments.resnets import cifar_resnet
from torch import Tensor, nn

CLASSES = 10


class Case(NamedTuple):
    """A model in training mode, and a batch of images and labels for it.

    Attributes:
        model: the network.
        batch: images (or vectors) and labels.
    """

    model: nn.Module
    batch: tuple[Tensor, Tensor]


class Network(NamedTuple):
    """How to make a case.

    Attributes:
        make: the network.
        sample: shape of a sample.
        samples: batch size.
    """

    make: Callable[[], nn.Module]
    sample: tuple[int, ...]
    samples: int


def make_case(name: str, device: str = "cpu", samples: int | None = None, channels_last: bool = False) -> Case:
    """Make a network and a batch, always the same.

    Args:
        name: one of `NETWORKS`.
        device: where both live.
        samples: batch size; None takes the network's own.
        channels_last: the memory format of images and convolutions.

    Returns:
        The network and the batch.
    """
    network = NETWORKS[name]
    torch.manual_seed(0)
    return case_of(network.make(), network.sample, samples or network.samples, device, channels_last)


def case_of(model: nn.Module, sample: tuple[int, ...], samples: int, device: str, channels_last: bool = False) -> Case:
    """A model with a random batch."""
    layout = torch.channels_last if channels_last and len(sample) == 3 else torch.contiguous_format
    images = torch.randn(samples, *sample).to(device, memory_format=layout)
    labels = torch.randint(CLASSES, (samples,)).to(device)
    return Case(model.to(device, memory_format=layout), (images, labels))  # type: ignore[call-overload]


def convolutions(layers: int, width: int) -> nn.Module:
    """A chain of 3 × 3 convolutions with batch norm and ReLU, pooled and classified."""
    chain: list[nn.Module] = []
    for channels in [3, *[width] * (layers - 1)]:
        chain += [nn.Conv2d(channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
    return nn.Sequential(*chain, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, CLASSES))


def multilayer_perceptron(inputs: int = 784, width: int = 512, layers: int = 3) -> nn.Module:
    """Linear layers with BatchNorm1d and ReLU."""
    chain: list[nn.Module] = []
    for features in [inputs, *[width] * (layers - 1)]:
        chain += [nn.Linear(features, width, bias=False), nn.BatchNorm1d(width), nn.ReLU(inplace=True)]
    return nn.Sequential(*chain, nn.Linear(width, CLASSES))


NETWORKS = {
    "resnet18": Network(lambda: torchvision_resnet("resnet18", 3, CLASSES, small=True), (3, 32, 32), 128),
    "wrn_40_2": Network(lambda: wide_resnet(depth=40, widen=2), (3, 32, 32), 128),
    "cifar_resnet": Network(lambda: cifar_resnet(width=16, blocks_per_stage=2), (3, 32, 32), 128),
    "mlp": Network(multilayer_perceptron, (784,), 128),
    "overhead": Network(lambda: convolutions(layers=10, width=8), (3, 8, 8), 8),
    "tiny": Network(lambda: convolutions(layers=2, width=4), (3, 4, 4), 8),
}
