"""APART in a loop of Accelerate, on scikit-learn's digits: `python examples/accelerate_loop.py`.

A loop with autocast, gradient accumulation, clipping and checkpoints of an `Accelerator`, plainly and with APART in one
pass. The run with APART is stopped halfway, and another one resumes from its checkpoint. It ends bit for bit as the
first one, since `save_state` keeps the generator that the random signs are drawn from.
"""

from __future__ import annotations

import copy
import tempfile
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from apart_func import APART

BATCH, ACCUMULATED = 32, 2


class Run:
    """A model, and what trains it.

    Args:
        initial: the network before training; the run has a copy.
        images: what it is trained on.
        epochs: until the learning rate is zero.
        seed: of the batches.
        with_apart: or plainly.
    """

    def __init__(self, initial: nn.Module, images: TensorDataset, epochs: int, seed: int, *, with_apart: bool) -> None:
        self.accelerator = Accelerator(cpu=True, mixed_precision="bf16", gradient_accumulation_steps=ACCUMULATED)
        model = copy.deepcopy(initial)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=epochs)
        self.images, self.seed = images, seed
        self.model, self.optimizer = self.accelerator.prepare(model, optimizer)
        self.schedule = schedule
        self.accelerator.register_for_checkpointing(schedule)
        self.apart = APART(self.model, epsilon=0.2, groups=4) if with_apart else None

    def train(self, epochs: range) -> None:
        """Train for some epochs, each of which has its batches from the seed."""
        self.model.train()
        for epoch in epochs:
            order = torch.Generator().manual_seed(1000 * self.seed + epoch)
            for x, y in DataLoader(self.images, BATCH, shuffle=True, drop_last=True, generator=order):
                with self.accelerator.accumulate(self.model):
                    with self.apart.one_pass() if self.apart else nullcontext():
                        self.accelerator.backward(F.cross_entropy(self.model(x), y))
                    if self.accelerator.sync_gradients:
                        self.accelerator.clip_grad_norm_(self.model.parameters(), 5.0)
                    self.optimizer.step()
                    self.optimizer.zero_grad()
            self.schedule.step()

    @torch.no_grad()
    def error(self, images: TensorDataset) -> float:
        """The share of images that are taken for another digit."""
        self.model.eval()
        x, y = images.tensors
        return float((self.model(x).argmax(dim=1) != y).float().mean())


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
    """Train plainly and with APART, and return the test errors."""
    torch.manual_seed(seed)
    (images, test), initial, half = digits(), network(), epochs // 2

    plain = Run(initial, images, epochs, seed, with_apart=False)
    plain.train(range(epochs))
    with tempfile.TemporaryDirectory() as folder:
        stopped = Run(initial, images, epochs, seed, with_apart=True)
        stopped.train(range(half))
        stopped.accelerator.save_state(folder)
        stopped.train(range(half, epochs))  # as if it had not been
        resumed = Run(initial, images, epochs, seed, with_apart=True)
        resumed.accelerator.load_state(folder)
        resumed.train(range(half, epochs))

    same = zip(stopped.model.parameters(), resumed.model.parameters(), strict=True)
    print("the resumed run ends", "bit for bit" if all(torch.equal(*pair) for pair in same) else "NOT", "as the first")
    errors = {"plain": plain.error(test), "APART in one pass": resumed.error(test)}
    for name, error in errors.items():
        print(f"{name:>20}: test error {error:.2%}")
    return errors


if __name__ == "__main__":
    main()
