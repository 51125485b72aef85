"""APART in the `Trainer` of transformers, on scikit-learn's digits: `python examples/transformers_trainer.py`.

Question: what does the `Trainer` need for APART? Method: a subclass puts a context around `training_step`, which runs
forward and backward of one micro-batch. A small ResNet of transformers is trained plainly and so, in bfloat16, with
accumulation and clipping. Result: two methods of a few lines. Test errors are printed; one seed says little
(`examples/compare.py` has intervals).
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import tyro
from experiments.datasets import load_dataset, whole
from experiments.settings import DataSettings
from torch import Tensor
from torch.utils.data import TensorDataset
from transformers import ResNetConfig, ResNetForImageClassification, Trainer, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from apart_func import APART


class ApartTrainer(Trainer):  # type: ignore[misc]  # mypy does not look into transformers
    """A `Trainer` whose every micro-batch is a pass of clean and perturbed samples."""

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """Set up APART too: the model is there now, in its wrappers."""
        optimizer: torch.optim.Optimizer = super().create_optimizer(model)
        several = self.args.world_size > 1
        self.apart = APART(self.model, epsilon=0.2, groups=4, process_group="world" if several else None)
        return optimizer

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """Forward and backward of a micro-batch."""
        with self.apart.one_pass():
            loss: Tensor = super().training_step(*args, **kwargs)
        return loss


def dataset(images: TensorDataset) -> list[dict[str, Tensor]]:
    """Images of 32 × 32 as the model takes them."""
    return [
        {"pixel_values": F.interpolate(x[None], scale_factor=4)[0], "labels": y}
        for x, y in zip(*images.tensors, strict=True)
    ]


def network(seed: int) -> ResNetForImageClassification:
    """A ResNet of two stages with two blocks each, without weights from elsewhere."""
    torch.manual_seed(seed)
    model = ResNetForImageClassification(
        ResNetConfig(
            num_channels=1, num_labels=10, embedding_size=8, hidden_sizes=[8, 16], depths=[2, 2], layer_type="basic"
        )
    )
    model.accepts_loss_kwargs = False  # its loss is a mean; else the Trainer would add up those of micro-batches
    return model


def settings(folder: Path, epochs: int, seed: int) -> TrainingArguments:
    """SGD with a cosine schedule: 64 images a step, in two micro-batches."""
    return TrainingArguments(
        folder,
        num_train_epochs=epochs,
        per_device_train_batch_size=32,
        gradient_accumulation_steps=2,
        per_device_eval_batch_size=256,
        dataloader_drop_last=True,  # the ghost groups divide every batch
        learning_rate=0.1,
        weight_decay=5e-4,
        lr_scheduler_type="cosine",
        optim="sgd",
        optim_args="momentum=0.9,nesterov=True",
        max_grad_norm=5.0,
        bf16=True,
        use_cpu=True,
        seed=seed,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )


def main(epochs: int = 30, seed: int = 0) -> dict[str, float]:
    """Train the network plainly and with APART.

    Args:
        epochs: passes over the 256 training images.
        seed: of the initial weights and the batches.

    Returns:
        Test errors, from 0 to 1.
    """
    data, errors = load_dataset(DataSettings("digits")), {}
    for name, kind in {"plain": Trainer, "APART in one pass": ApartTrainer}.items():
        with tempfile.TemporaryDirectory() as folder:
            trainer = kind(
                network(seed),
                settings(Path(folder), epochs, seed),
                train_dataset=dataset(whole(data, data.train)),
                eval_dataset=dataset(whole(data, data.test)),
                compute_metrics=lambda p: {"error": float((p.predictions.argmax(axis=1) != p.label_ids).mean())},
            )
            trainer.remove_callback(PrinterCallback)
            trainer.train()
            errors[name] = trainer.evaluate()["eval_error"]
        print(f"{name:>20}: test error {errors[name]:.2%}")
    return errors


if __name__ == "__main__":
    tyro.cli(main)
