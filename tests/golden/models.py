"""The models of the golden cases, in plain torch. `MODELS` is keyed as the recorded `model` entries."""

from torch import nn


def conv2d() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1, bias=False),
        nn.BatchNorm2d(6),
        nn.ReLU(inplace=True),
        nn.Conv2d(6, 8, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(inplace=True),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 5),
    )


def mlp1d() -> nn.Module:
    return nn.Sequential(
        nn.Linear(7, 16),
        nn.BatchNorm1d(16, momentum=0.3),
        nn.Tanh(),
        nn.Linear(16, 12),
        nn.BatchNorm1d(12, eps=1e-3),
        nn.ReLU(),
        nn.Linear(12, 4),
    )


def conv1d() -> nn.Module:
    return nn.Sequential(
        nn.Conv1d(2, 6, 3, padding=1),
        nn.BatchNorm1d(6),
        nn.ReLU(),
        nn.Conv1d(6, 6, 3, padding=1),
        nn.BatchNorm1d(6),
        nn.ReLU(),
        nn.AdaptiveAvgPool1d(1),
        nn.Flatten(),
        nn.Linear(6, 3),
    )


MODELS = {"conv2d": conv2d, "mlp1d": mlp1d, "conv1d": conv1d}
