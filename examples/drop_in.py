"""APART in an ordinary training loop, beside the same loop without it: `python examples/drop_in.py`.

Two small ResNets start from the same weights and see the same batches. One is trained plainly; the other with the
four lines that `APART` adds to a loop built on `loss.backward()`. For a comparison with intervals see `compare.py`.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable

import torch
import tyro
from experiments.datasets import DataSet, evaluation_batches, load_dataset, training_batches
from experiments.resnets import small_resnet
from experiments.settings import DataSettings
from torch import Tensor, nn

from apart_func import APART

Step = Callable[[Tensor, Tensor], Tensor]


def plain_step(model: nn.Module, optimizer: torch.optim.Optimizer, criterion: nn.Module) -> Step:
    """The loop's body as everyone has it."""

    def step(x: Tensor, y: Tensor) -> Tensor:
        optimizer.zero_grad()
        loss: Tensor = criterion(model(x), y)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def apart_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, criterion: nn.Module, epsilon: float = 0.1, groups: int = 4
) -> Step:
    """The loop's body with APART: both contexts, and the weights of both losses."""
    apart, ratio = APART(model, epsilon=epsilon, groups=groups), 1.0

    def step(x: Tensor, y: Tensor) -> Tensor:
        chosen = int(ratio * len(x))  # N of the M samples
        r = len(x) / (len(x) + chosen)
        optimizer.zero_grad()
        with apart.to_proxy():
            loss: Tensor = criterion(model(x), y)
            (r * loss).backward()
        with apart.to_adver():
            ((1 - r) * criterion(model(x[:chosen]), y[:chosen])).backward()
        optimizer.step()
        return loss.detach()

    return step


def train(name: str, initial: nn.Module, data: DataSet, epochs: int, seed: int) -> float:
    """Train a copy of a network by a method, print what became of it, and return its accuracy, from 0 to 1."""
    model, criterion, start = copy.deepcopy(initial), nn.CrossEntropyLoss(), time.perf_counter()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=epochs)
    step = {"plain": plain_step, "APART": apart_step}[name](model, optimizer, criterion)
    for epoch in range(epochs):
        losses = [step(x, y) for x, y in training_batches(data, batch_size=64, seed=seed, epoch=epoch)]
        schedule.step()
    seconds = time.perf_counter() - start

    model.eval()
    with torch.no_grad():
        batches = evaluation_batches(data, data.test, batch_size=256)
        accuracy = sum(int((model(x).argmax(dim=1) == y).sum()) for x, y in batches) / len(data.test)
    print(f"{name:>5}: training loss {torch.stack(losses).mean():.3f}, test accuracy {accuracy:.2%}, {seconds:.0f} s")
    return accuracy


def main(epochs: int = 60, seed: int = 0) -> dict[str, float]:
    """Train both networks on scikit-learn's digits.

    Args:
        epochs: passes over the 256 training images.
        seed: of the initial weights and the batches.

    Returns:
        Their accuracies.
    """
    torch.manual_seed(seed)
    data = load_dataset(DataSettings("digits"))
    initial = small_resnet(in_channels=1, classes=data.classes)
    return {name: train(name, initial, data, epochs, seed) for name in ("plain", "APART")}


if __name__ == "__main__":
    tyro.cli(main)
    print("One seed says little: examples/compare.py trains many, and gives intervals.")
