"""APART in the `Trainer` of transformers, on scikit-learn's digits: `python examples/transformers_trainer.py`.

A small ResNet of transformers is trained by the `Trainer` itself and by `OnePassTrainer`, in bfloat16, with gradient
accumulation, clipping, and an evaluation after every epoch.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor
from transformers import ResNetConfig, ResNetForImageClassification, Trainer, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from apart_func.integrations.transformers import OnePassTrainer


def digits() -> tuple[list[dict[str, Tensor]], list[dict[str, Tensor]]]:
    """256 images to train on and 500 to test on, enlarged to 32 × 32, as the model takes them."""
    images, labels = load_digits(return_X_y=True)
    x, test_x, y, test_y = train_test_split(
        images, labels, train_size=256, test_size=500, stratify=labels, random_state=0
    )

    def dataset(part: object, labels: object) -> list[dict[str, Tensor]]:
        normalised = ((torch.tensor(part) - x.mean()) / x.std()).float().view(-1, 1, 8, 8)
        pairs = zip(F.interpolate(normalised, scale_factor=4), torch.tensor(labels), strict=True)
        return [{"pixel_values": image, "labels": label} for image, label in pairs]

    return dataset(x, y), dataset(test_x, test_y)


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
        eval_strategy="epoch",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )


def main(epochs: int = 20, seed: int = 0) -> dict[str, float]:
    """Train the network plainly and with APART, and return the test errors."""
    (images, test), errors = digits(), {}
    with tempfile.TemporaryDirectory() as folder:
        options = {
            "args": settings(Path(folder), epochs, seed),
            "train_dataset": images,
            "eval_dataset": test,
            "compute_metrics": lambda p: {"error": float((p.predictions.argmax(axis=1) != p.label_ids).mean())},
        }
        for trainer in (
            Trainer(network(seed), **options),
            OnePassTrainer(network(seed), **options, epsilon=0.2, groups=4),
        ):
            trainer.remove_callback(PrinterCallback)
            trainer.train()
            name = type(trainer).__name__
            errors[name] = trainer.evaluate()["eval_error"]
            print(f"{name:>14}: test error {errors[name]:.2%}")
    return errors


if __name__ == "__main__":
    main()
