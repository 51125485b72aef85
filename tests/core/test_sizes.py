"""Layers of all sizes in one network: each has the moments that are fastest for it, and all agree."""

import torch
from test_against_oracle import assert_agree, take_step
from torch import nn


def test_layers_of_few_and_of_many_activations_stand_in_one_network() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.BatchNorm2d(3),
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.MaxPool2d(8),
        nn.BatchNorm2d(8),
        nn.Flatten(),
        nn.Linear(128, 3),
    )
    batch = torch.randn(16, 3, 32, 32) + 0.5, torch.arange(16) % 3
    step = take_step(model, batch, groups=4, tolerance=1e-4)
    assert_agree(step)
