"""The networks that are measured, each with a batch: `make_case("resnet18", ...)`.

Wide and narrow, deep and shallow: in `resnet18` arithmetic is everything, in `overhead` what surrounds it. Those of
timm are made by it; all others need PyTorch alone. A name of `SETS` stands for several.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import NamedTuple

import torch
from experiments.resnets import ResNet, cifar_resnet, small_resnet
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
    return Case(model.to(device, memory_format=layout), (images, labels))  # type: ignore[call-overload]  # torch types no layout with a device


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


def wide_resnet(depth: int, widen: int) -> nn.Module:
    """A Wide ResNet (Zagoruyko and Komodakis, arXiv 1605.07146) of depth 6n + 4, as trained on CIFAR."""
    widths = [16 * widen, 32 * widen, 64 * widen]
    chain: list[nn.Module] = [nn.Conv2d(3, 16, 3, padding=1, bias=False)]
    channels = 16
    for width in widths:
        for block in range((depth - 4) // 6):
            chain.append(PreActBlock(channels, width, stride=2 if block == 0 and width != widths[0] else 1))
            channels = width
    head = [nn.BatchNorm2d(channels), nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(*chain, *head, nn.Linear(channels, CLASSES))


class PreActBlock(nn.Module):
    """Two convolutions, each after batch norm and ReLU, added to what comes in, adapted where its shape changes."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.activate = nn.Sequential(nn.BatchNorm2d(in_channels), nn.ReLU(inplace=True))
        self.residual = nn.Sequential(
            nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(inplace=True),
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
        )
        changes = stride != 1 or in_channels != channels
        self.adapt = nn.Conv2d(in_channels, channels, 1, stride, bias=False) if changes else None

    def forward(self, x: Tensor) -> Tensor:
        """The block's output, with `channels` channels."""
        activated = self.activate(x)
        shortcut = x if self.adapt is None else self.adapt(activated)
        out: Tensor = shortcut + self.residual(activated)
        return out


def from_timm(name: str) -> nn.Module:
    """A network of timm, not pretrained."""
    import timm  # importing it takes seconds

    model: nn.Module = timm.create_model(name, pretrained=False, num_classes=CLASSES)
    return model


NETWORKS = {
    "resnet18": Network(lambda: ResNet(3, CLASSES, width=64, stages=4, blocks_per_stage=2), (3, 32, 32), 128),
    "wrn_40_2": Network(lambda: wide_resnet(depth=40, widen=2), (3, 32, 32), 128),
    "cifar_resnet": Network(lambda: cifar_resnet(width=16, blocks_per_stage=2), (3, 32, 32), 128),
    "mlp": Network(multilayer_perceptron, (784,), 128),
    "overhead": Network(lambda: convolutions(layers=10, width=8), (3, 8, 8), 8),
    "tiny": Network(lambda: convolutions(layers=2, width=4), (3, 4, 4), 8),
    "digits": Network(lambda: small_resnet(in_channels=1, classes=CLASSES), (1, 8, 8), 64),
    "timm/test_resnet": Network(partial(from_timm, "test_resnet"), (3, 96, 96), 16),
    "timm/resnet18": Network(partial(from_timm, "resnet18"), (3, 32, 32), 16),
    "timm/lcnet_035": Network(partial(from_timm, "lcnet_035"), (3, 64, 64), 16),
    "timm/mobilenetv3_small_050": Network(partial(from_timm, "mobilenetv3_small_050"), (3, 64, 64), 16),
    "timm/efficientvit_b0": Network(partial(from_timm, "efficientvit_b0"), (3, 64, 64), 16),
}

# What people train on small machines, from the smallest work to the largest.
SETS = {
    "timm": (
        "overhead",
        "digits",
        *("timm/lcnet_035", "timm/mobilenetv3_small_050", "timm/efficientvit_b0"),
        *("timm/resnet18", "timm/test_resnet"),
    )
}


def expanded(names: Iterable[str]) -> tuple[str, ...]:
    """Names of networks, each once, with those of `SETS` written out."""
    return tuple(dict.fromkeys(network for name in names for network in SETS.get(name, (name,))))
