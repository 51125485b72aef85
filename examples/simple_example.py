"""The loop of the original's simple example: plain training and APART in two passes, side by side.

    python examples/simple_example.py                        scikit-learn's digits, on a processor
    python examples/simple_example.py --cifar100 FOLDER      CIFAR-100 and ResNet-18, as in the original, on a GPU

Two copies of a network start from the same weights and see the same batches. `APART` is used as the original's class:
it moves the model to a device, returns its parameters, and its contexts and `set_epsilon` return the object.
"""

from __future__ import annotations

import argparse
import copy
from typing import Any

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset
from torchvision import datasets, transforms
from torchvision.models import resnet18

from apart_func import APART


def train(
    plain: nn.Module, apart: APART, loader: DataLoader[Any], epochs: int, ratio: float, device: str
) -> tuple[float, float]:
    """Train the plain network and that of `apart` on the same batches, and return their last losses."""
    criterion = nn.CrossEntropyLoss()
    plain, apart = plain.to(device), apart.to(device)
    plain_optimizer, apart_optimizer = (
        torch.optim.SGD(trained.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4) for trained in (plain, apart)
    )
    schedules = [
        torch.optim.lr_scheduler.MultiStepLR(optimizer, [epochs // 2, 3 * epochs // 4])
        for optimizer in (plain_optimizer, apart_optimizer)
    ]
    plain.train()
    apart.model.train()
    for _ in range(epochs):
        for x, y in loader:
            x, y = x.to(device), y.to(device)
            chosen = int(ratio * len(x))  # N of the M samples
            r = len(x) / (len(x) + chosen)

            plain_optimizer.zero_grad()
            plain_loss = criterion(plain(x), y)
            plain_loss.backward()
            plain_optimizer.step()

            apart_optimizer.zero_grad()
            with apart.to_proxy() as proxy:
                loss = criterion(proxy.model(x), y)
                (r * loss).backward()
            with apart.to_adver() as adver:
                ((1 - r) * criterion(adver.model(x[:chosen]), y[:chosen])).backward()
            apart_optimizer.step()
        for schedule in schedules:
            schedule.step()
    return plain_loss.item(), loss.item()


@torch.no_grad()
def accuracy(model: nn.Module, loader: DataLoader[Any], device: str) -> float:
    """The share of images that a model recognises."""
    model.eval()
    right = [model(x.to(device)).argmax(dim=1) == y.to(device) for x, y in loader]
    return torch.cat(right).double().mean().item()


def digits() -> tuple[Dataset[Any], Dataset[Any], nn.Module]:
    """Images to train on, images to test on, and a small network."""
    images, labels = load_digits(return_X_y=True)
    x, test_x, y, test_y = train_test_split(images / 16 - 0.3, labels, train_size=256, stratify=labels, random_state=0)
    train, test = (torch.tensor(part, dtype=torch.float32).view(-1, 1, 8, 8) for part in (x, test_x))
    model = nn.Sequential(
        *(nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()),
        *(nn.Conv2d(16, 32, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10)),
    )
    return TensorDataset(train, torch.tensor(y)), TensorDataset(test, torch.tensor(test_y)), model


def cifar100(folder: str) -> tuple[Dataset[Any], Dataset[Any], nn.Module]:
    """CIFAR-100 and ResNet-18 with the stem for small images."""
    normalise = [transforms.ToTensor(), transforms.Normalize((0.507, 0.487, 0.441), (0.267, 0.256, 0.276))]
    augment = transforms.Compose([transforms.RandomCrop(32, padding=4), transforms.RandomHorizontalFlip(), *normalise])
    train = datasets.CIFAR100(folder, train=True, transform=augment, download=True)
    test = datasets.CIFAR100(folder, train=False, transform=transforms.Compose(normalise), download=True)
    model = resnet18(num_classes=100)
    model.conv1, model.maxpool = nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.Identity()
    return train, test, model


def main(epochs: int, cifar_folder: str | None = None) -> tuple[float, float]:
    """Train both networks, and return their accuracies on the test images."""
    torch.manual_seed(0)
    train_images, test_images, plain = cifar100(cifar_folder) if cifar_folder else digits()
    batch, groups = (128, 16) if cifar_folder else (64, 4)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    apart = APART(copy.deepcopy(plain), 0.05, groups).set_epsilon(0.1)

    losses = train(plain, apart, DataLoader(train_images, batch, shuffle=True, drop_last=True), epochs, 1.0, device)
    plain_accuracy, apart_accuracy = (
        accuracy(model, DataLoader(test_images, 256), device) for model in (plain, apart.model)
    )
    print(f"plain: training loss {losses[0]:.3f}, test accuracy {plain_accuracy:.2%}")
    print(f"APART: training loss {losses[1]:.3f}, test accuracy {apart_accuracy:.2%}")
    return plain_accuracy, apart_accuracy


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, help="200 for CIFAR-100, 30 for the digits")
    parser.add_argument("--cifar100", metavar="FOLDER", help="where torchvision keeps CIFAR-100")
    arguments = parser.parse_args()
    main(arguments.epochs or (200 if arguments.cifar100 else 30), arguments.cifar100)
