"""APART in one pass, in an ordinary training loop on scikit-learn's digits: `python examples/drop_in.py`.

Two networks start from the same weights and see the same batches. One is trained plainly; for the other the loop has
one `with` more. `simple_example.py` has the loop of two passes.
"""

from __future__ import annotations

import copy
from contextlib import nullcontext

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from apart_func import APART


def train(model: nn.Module, images: TensorDataset, epochs: int, seed: int, *, with_apart: bool) -> None:
    """Train a model, plainly or with APART."""
    loader = DataLoader(images, 64, shuffle=True, drop_last=True, generator=torch.Generator().manual_seed(seed))
    criterion, apart = nn.CrossEntropyLoss(), APART(model, epsilon=0.2, groups=4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=epochs)
    model.train()
    for _ in range(epochs):
        for x, y in loader:
            optimizer.zero_grad()
            with apart.one_pass() if with_apart else nullcontext():
                criterion(model(x), y).backward()
            optimizer.step()
        schedule.step()


@torch.no_grad()
def accuracy(model: nn.Module, images: TensorDataset) -> float:
    """The share of images that a model recognises."""
    x, y = images.tensors
    return float((model.eval()(x).argmax(dim=1) == y).double().mean())


def digits() -> tuple[TensorDataset, TensorDataset]:
    """256 images of 8 × 8 to train on, and 1541 to test on."""
    images, labels = load_digits(return_X_y=True)
    x, test_x, y, test_y = train_test_split(images, labels, train_size=256, stratify=labels, random_state=0)

    def dataset(part: object, labels: object) -> TensorDataset:
        normalised = (torch.tensor(part) - x.mean()) / x.std()
        return TensorDataset(normalised.float().view(-1, 1, 8, 8), torch.tensor(labels))

    return dataset(x, y), dataset(test_x, test_y)


def network() -> nn.Sequential:
    """Three convolutions with batch norm."""
    layers: list[nn.Module] = []
    for inputs, outputs, stride in ((1, 16, 1), (16, 32, 2), (32, 32, 2)):
        layers += [nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))


def main(epochs: int = 30, seed: int = 0) -> dict[str, float]:
    """Train both networks, and return their accuracies on the test images."""
    torch.manual_seed(seed)
    (images, test), initial, accuracies = digits(), network(), {}
    for name in ("plain", "APART in one pass"):
        model = copy.deepcopy(initial)
        train(model, images, epochs, seed, with_apart=name != "plain")
        accuracies[name] = accuracy(model, test)
        print(f"{name:>17}: test accuracy {accuracies[name]:.2%}")
    return accuracies


if __name__ == "__main__":
    main()
    print("One seed says little: examples/compare.py trains many, and gives intervals.")
