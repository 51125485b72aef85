"""The networks that are measured, each with a batch: `make_case("resnet18", ...)`.

Wide and narrow, deep and shallow: in `resnet18` arithmetic is everything, in `overhead` what surrounds it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torchvision
from models import cifar_resnet
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


def resnet18() -> nn.Module:
    """ResNet-18 in its CIFAR form: a 3 × 3 stem at stride 1, and no pooling after it."""
    model = torchvision.models.resnet18(num_classes=CLASSES)
    model.conv1 = nn.Conv2d(3, 64, kernel_size=3, padding=1, bias=False)
    model.maxpool = nn.Identity()
    return model  # type: ignore[no-any-return]


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


class WideResNet(nn.Module):
    """The wide residual network of Zagoruyko and Komodakis (2016), with batch norm before each convolution.

    Args:
        depth: number of layers with weights, 6n + 4.
        widen: width, as a multiple of that of the original residual network.
    """

    def __init__(self, depth: int, widen: int) -> None:
        super().__init__()
        assert depth % 6 == 4, "every block has two convolutions, in three stages of as many blocks"
        self.stem = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        blocks: list[nn.Module] = []
        channels = 16
        for width, stride in ((16 * widen, 1), (32 * widen, 2), (64 * widen, 2)):
            for _ in range((depth - 4) // 6):
                blocks.append(_WideBlock(channels, width, stride if channels != width else 1))
                channels = width
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Sequential(
            nn.BatchNorm2d(channels), nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(1), nn.Flatten()
        )
        self.classifier = nn.Linear(channels, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        """Class scores, (N, classes), for images (N, 3, H, W)."""
        scores: Tensor = self.classifier(self.head(self.blocks(self.stem(images))))
        return scores


class _WideBlock(nn.Module):
    """Two convolutions, each after batch norm and ReLU, added to what comes in."""

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.activate = nn.Sequential(nn.BatchNorm2d(channels), nn.ReLU(inplace=True))
        self.residual = nn.Sequential(
            nn.Conv2d(channels, width, 3, stride, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
            nn.Conv2d(width, width, 3, padding=1, bias=False),
        )
        self.adapt = nn.Conv2d(channels, width, 1, stride, bias=False) if channels != width else None

    def forward(self, x: Tensor) -> Tensor:
        activated = self.activate(x)
        shortcut = x if self.adapt is None else self.adapt(activated)
        out: Tensor = shortcut + self.residual(activated)
        return out


NETWORKS = {
    "resnet18": Network(resnet18, (3, 32, 32), 128),
    "wrn_40_2": Network(lambda: WideResNet(depth=40, widen=2), (3, 32, 32), 128),
    "cifar_resnet": Network(lambda: cifar_resnet(width=16, blocks_per_stage=2), (3, 32, 32), 128),
    "mlp": Network(multilayer_perceptron, (784,), 128),
    "overhead": Network(lambda: convolutions(layers=10, width=8), (3, 8, 8), 8),
    "tiny": Network(lambda: convolutions(layers=2, width=4), (3, 4, 4), 8),
}
