"""APART in timm's training loop, on scikit-learn's digits: `python examples/timm_loop.py`.

The loop is timm's `train_one_epoch`, with its optimizer, schedule, Mixup, loss scaler, clipping and weight averaging,
in bfloat16. A network with norm-act layers (`BatchNormAct2d`) is trained plainly and with APART in one pass, for which
the loop has one `with` more. `docs/recipes/frameworks.md` has the lines of two passes.
"""

from __future__ import annotations

import copy
from contextlib import nullcontext

import timm
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from timm.data import Mixup
from timm.loss import SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3, NativeScaler
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from apart_func import APART

BATCH, CLASSES = 64, 10


def train(model: nn.Module, images: TensorDataset, epochs: int, seed: int, *, with_apart: bool) -> ModelEmaV3:
    """Train a model in timm's way, plainly or with APART, and return the average of its weights."""
    apart = APART(model, epsilon=0.2, groups=4)
    loader = DataLoader(images, BATCH, shuffle=True, drop_last=True, generator=torch.Generator().manual_seed(seed))
    optimizer = create_optimizer_v2(model, opt="sgd", lr=0.1, weight_decay=5e-4, momentum=0.9)
    schedule, _ = create_scheduler_v2(optimizer, sched="cosine", num_epochs=epochs, warmup_epochs=2, warmup_lr=0.01)
    criterion, mixup = SoftTargetCrossEntropy(), Mixup(mixup_alpha=0.1, label_smoothing=0.0, num_classes=CLASSES)
    average, scaler, updates = ModelEmaV3(model, decay=0.95), NativeScaler("cpu"), 0
    clipping = {"clip_grad": 5.0, "parameters": list(model.parameters())}
    for epoch in range(epochs):
        model.train()
        schedule.step(epoch)
        for x, labels in loader:
            x, y = mixup(x, labels)
            optimizer.zero_grad()
            with apart.one_pass() if with_apart else nullcontext():
                with torch.autocast("cpu", torch.bfloat16):
                    loss = criterion(model(x), y)
                scaler(loss, optimizer, **clipping)
            updates += 1
            average.update(model, step=updates)
    return average


@torch.no_grad()
def error_of(model: nn.Module, images: TensorDataset) -> float:
    """The share of images that are taken for another digit."""
    model.eval()
    wrong = [model(x).argmax(dim=1) != labels for x, labels in DataLoader(images, 256)]
    return torch.cat(wrong).float().mean().item()


def digits() -> tuple[TensorDataset, TensorDataset]:
    """256 images to train on and 500 to test on, enlarged to 32 × 32."""
    images, labels = load_digits(return_X_y=True)
    x, test_x, y, test_y = train_test_split(
        images, labels, train_size=256, test_size=500, stratify=labels, random_state=0
    )

    def dataset(part: object, labels: object) -> TensorDataset:
        normalised = ((torch.tensor(part) - x.mean()) / x.std()).float().view(-1, 1, 8, 8)
        return TensorDataset(F.interpolate(normalised, scale_factor=4), torch.tensor(labels))

    return dataset(x, y), dataset(test_x, test_y)


def main(epochs: int = 20, seed: int = 0) -> dict[str, float]:
    """Train a small EfficientNet plainly and with APART, and return the test errors."""
    (images, test), errors = digits(), {}
    torch.manual_seed(seed)
    initial = timm.create_model("test_efficientnet", in_chans=1, num_classes=CLASSES)
    for name in ("plain", "APART in one pass"):
        model = copy.deepcopy(initial)
        average = train(model, images, epochs, seed, with_apart=name != "plain")
        errors[name] = error_of(average.module, test)
        print(f"{name:>17}: test error {errors[name]:.2%}")
    return errors


if __name__ == "__main__":
    main()
