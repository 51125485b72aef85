"""APART under Lightning's own optimisation, on scikit-learn's digits: `python examples/lightning_fit.py`.

The `LightningModule` below knows nothing of APART. It is trained three times, from the same weights and on the same
batches: plainly, with the callback for one pass, and with the callback for two.
"""

from __future__ import annotations

import copy
import logging
import warnings

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from apart_func.integrations.lightning import OnePassApart, TwoPassApart


class Digits(LightningModule):
    """A classifier as anyone writes it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """The plain loss, in all three runs."""
        images, labels = batch
        loss = F.cross_entropy(self.model(images), labels)
        self.log("loss", loss)
        return loss

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Log the share of images that are taken for another digit."""
        images, labels = batch
        wrong = self.model(images).argmax(dim=1) != labels
        self.log("test error", wrong.float().mean(), batch_size=len(labels))

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """SGD with a cosine schedule."""
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=self.trainer.max_epochs or 1)
        return {"optimizer": optimizer, "lr_scheduler": schedule}


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
    """Train three copies of a network, and return their test errors."""
    warnings.filterwarnings("ignore", module="lightning")  # advice about workers, and a call that torch has deprecated
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    torch.manual_seed(seed)
    (images, test), initial = digits(), network()
    ways: dict[str, list[Callback]] = {
        "plain": [],
        "APART in one pass": [OnePassApart(epsilon=0.2, groups=4)],
        "APART in two passes": [TwoPassApart(epsilon=0.1, groups=4)],
    }
    errors = {}
    for name, callbacks in ways.items():
        module = Digits(copy.deepcopy(initial))
        trainer = Trainer(
            callbacks=callbacks,
            max_epochs=epochs,
            gradient_clip_val=5.0,
            accelerator="cpu",
            log_every_n_steps=1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        order = torch.Generator().manual_seed(seed)
        trainer.fit(module, DataLoader(images, 64, shuffle=True, drop_last=True, generator=order))
        (result,) = trainer.test(module, DataLoader(test, 256), verbose=False)
        errors[name] = result["test error"]
        print(f"{name:>20}: test error {errors[name]:.2%}")
    return errors


if __name__ == "__main__":
    main()
