"""Residual networks with batch normalization, for small images and for signals.

One class, four forms: `small_resnet` for 8 × 8 digits and their like, `mnist_resnet` for 28 × 28 images,
`cifar_resnet` for 32 × 32 colour images, `resnet1d` for signals. All are stages of residual blocks; every stage after
the first halves the resolution and doubles the width.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn


class Layers(NamedTuple):
    """The kinds of layer that the number of dimensions decides."""

    convolution: type[nn.Conv1d | nn.Conv2d]
    batch_norm: type[nn.BatchNorm1d | nn.BatchNorm2d]
    pool: type[nn.AdaptiveAvgPool1d | nn.AdaptiveAvgPool2d]


IMAGES = Layers(nn.Conv2d, nn.BatchNorm2d, nn.AdaptiveAvgPool2d)
SIGNALS = Layers(nn.Conv1d, nn.BatchNorm1d, nn.AdaptiveAvgPool1d)


def small_resnet(in_channels: int, classes: int, width: int = 8, blocks: int = 2) -> ResNet:
    """A ResNet that trains in seconds on a CPU: every stage is a single block.

    The default has two blocks, of width 8 and 16. On 8 × 8 digits they work on 8 × 8 and 4 × 4 positions, with 5122
    parameters.
    """
    return ResNet(in_channels, classes, width, stages=blocks, blocks_per_stage=1)


def mnist_resnet(in_channels: int, classes: int, width: int = 16) -> ResNet:
    """A ResNet for 28 × 28 images whose stem halves them, which saves much; each of its three stages is one block."""
    return ResNet(in_channels, classes, width, stages=3, blocks_per_stage=1, stem_stride=2)


def cifar_resnet(width: int = 16, blocks_per_stage: int = 2, classes: int = 10, in_channels: int = 3) -> ResNet:
    """The CIFAR form of ResNet: three stages, on 32 × 32, 16 × 16 and 8 × 8 positions."""
    return ResNet(in_channels, classes, width, stages=3, blocks_per_stage=blocks_per_stage)


def resnet1d(in_channels: int, classes: int, width: int = 16, blocks: int = 3) -> ResNet:
    """A small ResNet for signals: every stage is a single block."""
    return ResNet(in_channels, classes, width, stages=blocks, blocks_per_stage=1, layers=SIGNALS)


class ResNet(nn.Module):
    """A 3 × 3 stem, stages of residual blocks, global average pooling and a linear classifier."""

    def __init__(
        self,
        in_channels: int,
        classes: int,
        width: int,
        stages: int,
        blocks_per_stage: int,
        layers: Layers = IMAGES,
        stem_stride: int = 1,
    ) -> None:
        super().__init__()
        convolution = _conv3(layers, in_channels, width, stem_stride)
        self.stem = nn.Sequential(convolution, layers.batch_norm(width), nn.ReLU(inplace=True))
        self.stages = nn.Sequential(_stage(layers, width, width, blocks_per_stage, stride=1))
        for _ in range(1, stages):
            self.stages.append(_stage(layers, width, 2 * width, blocks_per_stage, stride=2))
            width *= 2
        self.head = nn.Sequential(layers.pool(1), nn.Flatten(), nn.Linear(width, classes))
        self.apply(initialise)

    def forward(self, x: Tensor) -> Tensor:
        """Class scores, (N, classes), for images (N, C, H, W) or signals (N, C, L)."""
        scores: Tensor = self.head(self.stages(self.stem(x)))
        return scores


class ResidualBlock(nn.Module):
    """Two 3 × 3 convolutions with batch normalization, added to their input."""

    def __init__(self, layers: Layers, in_channels: int, channels: int, stride: int = 1) -> None:
        super().__init__()
        self.residual = nn.Sequential(
            _conv3(layers, in_channels, channels, stride),
            layers.batch_norm(channels),
            nn.ReLU(inplace=True),
            _conv3(layers, channels, channels),
            layers.batch_norm(channels),
        )
        self.shortcut = nn.Sequential()
        if stride != 1 or in_channels != channels:
            self.shortcut.append(layers.convolution(in_channels, channels, kernel_size=1, stride=stride, bias=False))
            self.shortcut.append(layers.batch_norm(channels))
        self.activation = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        """The block's output, with `channels` channels."""
        out: Tensor = self.activation(self.residual(x) + self.shortcut(x))
        return out


def _stage(layers: Layers, in_channels: int, channels: int, blocks: int, stride: int) -> nn.Sequential:
    """Residual blocks of one width and resolution; the first one changes both."""
    first = ResidualBlock(layers, in_channels, channels, stride)
    return nn.Sequential(first, *(ResidualBlock(layers, channels, channels) for _ in range(blocks - 1)))


def _conv3(layers: Layers, in_channels: int, channels: int, stride: int = 1) -> nn.Module:
    """A convolution of size 3 that keeps the resolution at stride 1; batch normalization brings the bias."""
    return layers.convolution(in_channels, channels, kernel_size=3, stride=stride, padding=1, bias=False)


def initialise(module: nn.Module) -> None:
    """He initialisation of convolutions, the usual choice before ReLU."""
    if isinstance(module, nn.Conv1d | nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
