"""Small models and batches that several tests share."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

CLASSES = 3


class Parts(nn.Module):
    """A model of some parts by name, in float64, whose forward is a function of the model and its inputs."""

    def __init__(self, function: Callable[..., Any], **parts: Any) -> None:
        super().__init__()
        self.function = function
        for name, part in parts.items():
            setattr(self, name, part)
        self.double()

    def forward(self, *inputs: Any, **named: Any) -> Any:
        return self.function(self, *inputs, **named)


def signs_differ(one: Any, other: Any) -> bool:
    """Whether two perturbations of the same layers have other signs anywhere."""
    return any(bool((a.sign() != b.sign()).any()) for name in one for a, b in zip(one[name], other[name], strict=True))


class Counting(nn.Module):
    """Counts its calls in two buffers: in place, and by putting another tensor there."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("in_place", torch.tensor(0))
        self.register_buffer("replaced", torch.tensor(0))

    def forward(self, x: Tensor) -> Tensor:
        self.in_place += 1
        self.replaced = self.replaced + 1
        return x


def convolutional(momentum: float | None = 0.1, dtype: torch.dtype = torch.float64) -> nn.Sequential:
    """Two convolutions with batch norm and an in-place activation, seeded, in training mode."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1, bias=False),
        nn.BatchNorm2d(4, momentum=momentum),
        nn.ReLU(inplace=True),
        nn.Conv2d(4, 5, 3, padding=1, bias=False),
        nn.BatchNorm2d(5, momentum=momentum),
        nn.ReLU(inplace=True),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(5, CLASSES),
    ).to(dtype)


def smooth(seed: int = 0, dtype: torch.dtype = torch.float64) -> nn.Sequential:
    """The same without flat directions: no statistic gradient is zero but for rounding, and no sign a coin toss."""
    model = convolutional()
    model[2], model[5] = nn.SiLU(inplace=True), nn.SiLU(inplace=True)
    torch.manual_seed(seed)
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    return model.to(dtype)


def one_layer(width: int = 4) -> nn.Sequential:
    """Little to trace for a compiler: one batch norm, of some width."""
    torch.manual_seed(width)
    layers = nn.Conv2d(2, width, 3), nn.BatchNorm2d(width), nn.Tanh(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    return nn.Sequential(*layers, nn.Linear(width, CLASSES)).double()


def images(samples: int = 8, dtype: torch.dtype = torch.float64, seed: int = 1) -> tuple[Tensor, Tensor]:
    """A batch for `convolutional`."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(samples, 2, 4, 4, generator=generator, dtype=torch.float64)
    return x.to(dtype), torch.randint(CLASSES, (samples,), generator=generator)
