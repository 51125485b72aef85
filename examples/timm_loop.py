"""APART in timm's training loop, on scikit-learn's digits: `python examples/timm_loop.py`.

Question: which lines of timm's `train.py` change for APART? Method: its `train_one_epoch`, with its optimizer,
schedule, Mixup, loss scaler, clipping and weight averaging in bfloat16, where two passes stand for one; a network with
norm-act layers (`BatchNormAct2d`) is trained with it and without. Result: the four lines of the drop-in; the scaler
updates with the second loss alone. Test errors of the averaged weights are printed; one seed says little
(`examples/compare.py` has intervals).
"""

from __future__ import annotations

import copy

import timm
import torch
import torch.nn.functional as F
import tyro
from experiments.datasets import load_dataset, whole
from experiments.settings import DataSettings
from timm.data import Mixup
from timm.loss import SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3, NativeScaler
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from apart_func import APART

BATCH, CLASSES = 64, 10


def train(model: nn.Module, images: TensorDataset, epochs: int, seed: int, apart: APART | None) -> ModelEmaV3:
    """Train a model in timm's way, plainly or with APART.

    Args:
        model: what is trained.
        images: of 32 × 32, with their digits.
        epochs: passes over them.
        seed: of the batches.
        apart: the model's drop-in, or None.

    Returns:
        The average of its weights.
    """
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
            if apart is None:
                with torch.autocast("cpu", torch.bfloat16):
                    loss = criterion(model(x), y)
                scaler(loss, optimizer, **clipping)
            else:
                with apart.to_proxy():
                    with torch.autocast("cpu", torch.bfloat16):
                        loss = criterion(model(x), y)
                    scaler(0.5 * loss, optimizer, need_update=False)
                with apart.to_adver():
                    with torch.autocast("cpu", torch.bfloat16):
                        loss = criterion(model(x), y)
                    scaler(0.5 * loss, optimizer, **clipping)
            updates += 1
            average.update(model, step=updates)
    return average


@torch.no_grad()
def error_of(model: nn.Module, images: TensorDataset) -> float:
    """The share of images that are taken for another digit."""
    model.eval()
    wrong = [model(x).argmax(dim=1) != labels for x, labels in DataLoader(images, 256)]
    return torch.cat(wrong).float().mean().item()


def enlarged(images: TensorDataset) -> TensorDataset:
    """Images of 32 × 32."""
    x, labels = images.tensors
    return TensorDataset(F.interpolate(x, scale_factor=4), labels)


def main(epochs: int = 40, seed: int = 0) -> dict[str, float]:
    """Train a small EfficientNet plainly and with APART.

    Args:
        epochs: passes over the 256 training images.
        seed: of the initial weights, the batches and Mixup.

    Returns:
        Test errors, from 0 to 1.
    """
    data, errors = load_dataset(DataSettings("digits")), {}
    images, test = enlarged(whole(data, data.train)), enlarged(whole(data, data.test))
    torch.manual_seed(seed)
    initial = timm.create_model("test_efficientnet", in_chans=1, num_classes=CLASSES)
    for name in ("plain", "APART in two passes"):
        model = copy.deepcopy(initial)
        apart = APART(model, epsilon=0.1, groups=4) if name != "plain" else None
        errors[name] = error_of(train(model, images, epochs, seed, apart).module, test)
        print(f"{name:>20}: test error {errors[name]:.2%}")
    return errors


if __name__ == "__main__":
    tyro.cli(main)
