"""The APART step in a loop of your own, on scikit-learn's digits: `python examples/functional_loop.py`.

Parameters and buffers go into the step, gradients and new buffers come out, and any `torch.optim` optimizer does
the rest.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import tyro
from experiments.datasets import evaluation_batches, load_dataset, training_batches
from experiments.resnets import small_resnet
from experiments.settings import DataSettings
from rich.progress import Progress

from apart_func import assign_grads_, load_state_, make_apart_step, split_state


def main(epochs: int = 60, seed: int = 0) -> float:
    """Train a small ResNet with APART and measure it.

    Args:
        epochs: passes over the 256 training images.
        seed: of the initial weights and the batches.

    Returns:
        The accuracy on the test images, from 0 to 1.
    """
    torch.manual_seed(seed)
    digits = load_dataset(DataSettings("digits"))
    model = small_resnet(in_channels=1, classes=digits.classes)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=epochs)

    params, buffers = split_state(model)  # the model's own tensors: the optimizer's updates show in `params`
    apart_step = make_apart_step(model, F.cross_entropy, epsilon=0.1, groups=4)
    with Progress() as progress:
        task = progress.add_task("training", total=epochs)
        for epoch in range(epochs):
            for batch in training_batches(digits, batch_size=64, seed=seed, epoch=epoch):
                out = apart_step(params, buffers, batch)
                buffers = out.buffers
                assign_grads_(model, out.grads)
                optimizer.step()
            schedule.step()
            progress.update(task, advance=1, description=f"loss {out.loss:.3f}, adversarial {out.adversarial_loss:.3f}")
    load_state_(model, params, buffers)

    model.eval()
    with torch.no_grad():
        batches = list(evaluation_batches(digits, digits.test, batch_size=256))
        right = sum(int((model(images).argmax(dim=1) == labels).sum()) for images, labels in batches)
    accuracy = right / len(digits.test)
    print(f"test accuracy: {accuracy:.2%} of {len(digits.test)} images")
    return accuracy


if __name__ == "__main__":
    tyro.cli(main)
