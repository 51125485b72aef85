"""APART under Lightning's own optimisation, on scikit-learn's digits: `python examples/lightning_fit.py`.

Question: what does a `LightningModule` need for APART? Method: the module below knows nothing of it. It is trained
three times, from the same weights and on the same batches: plainly, with a callback for one pass, and with one for two.
Result: nothing; test errors of the three are printed, and one seed says little (`examples/compare.py` has intervals).
"""

from __future__ import annotations

import copy
import logging
import warnings
from typing import Any

import torch
import torch.nn.functional as F
import tyro
from experiments.datasets import load_dataset, whole
from experiments.resnets import small_resnet
from experiments.settings import DataSettings
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from apart_func.integrations.lightning import OnePassApart, TwoPassApart

BATCH = 64


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


def loader(images: TensorDataset, seed: int | None = None) -> DataLoader[Any]:
    """Batches in an order of a seed, all of one size; or all images, in their order."""
    if seed is None:
        return DataLoader(images, batch_size=256)
    return DataLoader(images, BATCH, shuffle=True, drop_last=True, generator=torch.Generator().manual_seed(seed))


def main(epochs: int = 60, seed: int = 0) -> dict[str, float]:
    """Train a small ResNet three times.

    Args:
        epochs: passes over the 256 training images.
        seed: of the initial weights and the batches.

    Returns:
        Test errors, from 0 to 1.
    """
    warnings.filterwarnings("ignore", module="lightning")  # advice about workers, and a call that torch has deprecated
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    torch.manual_seed(seed)
    data = load_dataset(DataSettings("digits"))
    initial = small_resnet(in_channels=1, classes=data.classes)
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
        trainer.fit(module, loader(whole(data, data.train), seed))
        (result,) = trainer.test(module, loader(whole(data, data.test)), verbose=False)
        errors[name] = result["test error"]
        print(f"{name:>20}: test error {errors[name]:.2%}")
    return errors


if __name__ == "__main__":
    tyro.cli(main)
