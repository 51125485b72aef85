"""The networks that are measured, each with a batch: `make_case("resnet18")`.

In `resnet` and `resnet18` arithmetic is everything; in `digits` and `ten_layers`, whose steps take a few milliseconds,
it is the start of operators. Those of timm are made by it; all others need PyTorch alone.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

CLASSES = 10


class Case(NamedTuple):
    """A model in training mode, and a batch for it.

    Attributes:
        model: the network.
        batch: images and labels.
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


class ResNet(nn.Module):
    """A 3 × 3 stem, stages of residual blocks, global average pooling and a linear classifier."""

    def __init__(self, width: int, stages: int, blocks: int, in_channels: int = 3) -> None:
        super().__init__()
        layers: list[nn.Module] = [convolution(in_channels, width), nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
        channels = width
        for stage in range(stages):
            for block in range(blocks):
                layers.append(Block(channels, width * 2**stage, stride=2 if stage and not block else 1))
                channels = width * 2**stage
        self.layers = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        """Class scores `(N, 10)` of images `(N, C, H, W)`."""
        scores: Tensor = self.layers(x)
        return scores


class Block(nn.Module):
    """Two 3 × 3 convolutions with batch norm, added to their input."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        first = [convolution(in_channels, channels, stride), nn.BatchNorm2d(channels), nn.ReLU(inplace=True)]
        self.residual = nn.Sequential(*first, convolution(channels, channels), nn.BatchNorm2d(channels))
        self.shortcut = nn.Sequential()
        if stride != 1 or in_channels != channels:
            self.shortcut.append(nn.Conv2d(in_channels, channels, 1, stride, bias=False))
            self.shortcut.append(nn.BatchNorm2d(channels))
        self.activation = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        """The block's output, with `channels` channels."""
        out: Tensor = self.activation(self.residual(x) + self.shortcut(x))
        return out


def convolution(in_channels: int, channels: int, stride: int = 1) -> nn.Module:
    """A 3 × 3 convolution without bias, with He's initialisation."""
    made = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
    nn.init.kaiming_normal_(made.weight, mode="fan_out", nonlinearity="relu")
    return made


def chain(layers: int, width: int) -> nn.Module:
    """Convolutions with batch norm and ReLU one after another, pooled and classified."""
    parts: list[nn.Module] = []
    for channels in [3, *[width] * (layers - 1)]:
        parts += [convolution(channels, width), nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
    return nn.Sequential(*parts, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, CLASSES))


def from_timm(name: str) -> nn.Module:
    """A network of timm with random weights."""
    import timm  # importing it takes seconds

    model: nn.Module = timm.create_model(name, pretrained=False, num_classes=CLASSES)
    return model


IMAGES = (3, 32, 32)
NETWORKS = {
    "resnet": Network(partial(ResNet, 16, stages=3, blocks=2), IMAGES, 128),
    "timm/test_resnet": Network(partial(from_timm, "test_resnet"), (3, 96, 96), 16),
    "timm/resnet18": Network(partial(from_timm, "resnet18"), IMAGES, 16),
    "timm/lcnet_035": Network(partial(from_timm, "lcnet_035"), (3, 64, 64), 16),
    "digits": Network(partial(ResNet, 8, stages=2, blocks=1, in_channels=1), (1, 8, 8), 64),
    "ten_layers": Network(partial(chain, layers=10, width=8), (3, 8, 8), 8),
    "resnet18": Network(partial(ResNet, 64, stages=4, blocks=2), IMAGES, 32),
    "tiny": Network(partial(chain, layers=2, width=4), (3, 4, 4), 8),
}
STEPS = tuple(NETWORKS)[:6]  # what a step costs is measured on these

# The first network, with one of its sizes changed.
GROWTH: dict[str, dict[str, Network]] = {
    "batch": {f"batch {n}": NETWORKS["resnet"]._replace(samples=n) for n in (8, 32, 128)},
    "depth": {f"{n} blocks a stage": Network(partial(ResNet, 16, stages=3, blocks=n), IMAGES, 16) for n in (1, 2, 4)},
    "width": {f"width {n}": Network(partial(ResNet, n, stages=3, blocks=2), IMAGES, 16) for n in (8, 16, 32)},
}
ALL = NETWORKS | {name: network for networks in GROWTH.values() for name, network in networks.items()}


def make_case(name: str, device: str = "cpu", samples: int | None = None, channels_last: bool = False) -> Case:
    """Make a network and a batch, the same at every call.

    Args:
        name: a key of `ALL`.
        device: where both live.
        samples: batch size; None takes the network's own.
        channels_last: memory format of images and convolutions.

    Returns:
        The network and the batch.
    """
    torch.manual_seed(0)
    network, layout = ALL[name], torch.channels_last if channels_last else torch.contiguous_format
    samples = samples or network.samples
    to: dict[str, Any] = {"device": device, "memory_format": layout}
    images, labels = torch.randn(samples, *network.sample).to(**to), torch.randint(CLASSES, (samples,), device=device)
    return Case(network.make().to(**to), (images, labels))


def ghost_groups(samples: int) -> int:
    """The ghost groups of the measured steps: 16, where that leaves two samples in each."""
    return min(16, samples // 2)
