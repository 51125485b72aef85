"""APART in a loop of Accelerate, on scikit-learn's digits: `python examples/accelerate_loop.py`.

Question: do autocast, accumulation, clipping and checkpoints of an `Accelerator` go with APART? Method: a loop with all
four of them, in bfloat16, plainly and with the perturbation of one pass; the run with APART is stopped halfway, and a
new one goes on from its checkpoint. Result: they do, with a `with` around forward and backward; the checkpoint has the
generator that the signs of the perturbation are drawn from. Test errors are printed; one seed says little
(`examples/compare.py` has intervals).
"""

from __future__ import annotations

import copy
import tempfile
from contextlib import nullcontext

import torch
import torch.nn.functional as F
import tyro
from accelerate import Accelerator
from experiments.datasets import load_dataset, whole
from experiments.resnets import small_resnet
from experiments.settings import DataSettings
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


def main(epochs: int = 60, seed: int = 0) -> dict[str, float]:
    """Train a small ResNet plainly and with APART.

    Args:
        epochs: passes over the 256 training images.
        seed: of the initial weights and the batches.

    Returns:
        Test errors, from 0 to 1.
    """
    torch.manual_seed(seed)
    data = load_dataset(DataSettings("digits"))
    initial, images, test = small_resnet(1, data.classes), whole(data, data.train), whole(data, data.test)
    half = epochs // 2

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
    print("the resumed run ends", "bit for bit" if all(torch.equal(*pair) for pair in same) else "NOT", "as the other")
    errors = {"plain": plain.error(test), "APART in one pass": resumed.error(test)}
    for name, error in errors.items():
        print(f"{name:>20}: test error {error:.2%}")
    return errors


if __name__ == "__main__":
    tyro.cli(main)
