"""APART in an ordinary training loop, beside the same loop without it: `python examples/drop_in.py`.

Two small ResNets start from the same weights and see the same batches. One is trained plainly; the other with the
four lines that `APART` adds to a loop built on `loss.backward()`. For a comparison with intervals see `compare.py`.
"""

from __future__ import annotations

import copy
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
import tyro
from data import ImageData, Split, load
from models import small_resnet
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from apart_func import APART, ApartError


@dataclass(frozen=True)
class Settings:
    """What is trained, and how.

    Attributes:
        data: bundled data set; nothing is downloaded.
        epochs: passes over the training images.
        batch_size: images in a batch; an incomplete last one is dropped.
        lr: highest learning rate; it rises to it and falls again.
        weight_decay: weight decay of SGD.
        width: channels of the network's first block.
        epsilon: APART's perturbation radius.
        groups: APART's ghost groups in the adversarial pass; they divide ratio × batch size.
        ratio: share of the batch that goes through the adversarial pass.
        seed: of the initial weights and the batches.
    """

    data: Literal["digits", "mnist5k"] = "digits"
    epochs: int = 100
    batch_size: int = 64
    lr: float = 0.1
    weight_decay: float = 5e-4
    width: int = 8
    epsilon: float = 0.1
    groups: int = 4
    ratio: float = 1.0
    seed: int = 0


Batches = DataLoader[tuple[Tensor, Tensor]]
Step = Callable[[Tensor, Tensor], Tensor]


def plain_step(model: nn.Module, optimizer: torch.optim.Optimizer, criterion: nn.Module) -> Step:
    """The loop's body as everyone has it."""

    def step(x: Tensor, y: Tensor) -> Tensor:
        optimizer.zero_grad()
        loss: Tensor = criterion(model(x), y)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def apart_step(model: nn.Module, optimizer: torch.optim.Optimizer, criterion: nn.Module, settings: Settings) -> Step:
    """The loop's body with APART: both contexts, and the weights of both losses."""
    apart = APART(model, epsilon=settings.epsilon, groups=settings.groups)
    chosen = int(settings.ratio * settings.batch_size)  # N of the M samples
    r = settings.batch_size / (settings.batch_size + chosen)

    def step(x: Tensor, y: Tensor) -> Tensor:
        optimizer.zero_grad()
        with apart.to_proxy():
            loss: Tensor = criterion(model(x), y)
            (r * loss).backward()
        with apart.to_adver():
            ((1 - r) * criterion(model(x[:chosen]), y[:chosen])).backward()
        optimizer.step()
        return loss.detach()

    return step


@dataclass
class Run:
    """One network in training.

    Attributes:
        name: of the method.
        model: the network.
        step: trains it on one batch and returns the clean loss.
        schedule: of the learning rate, moved after every step.
        batches: its training images.
        loss: mean clean loss of the last epoch.
        accuracy: on the test images after that epoch, from 0 to 1.
        seconds: spent in training.
    """

    name: str
    model: nn.Module
    step: Step
    schedule: torch.optim.lr_scheduler.LRScheduler
    batches: Batches
    loss: float = float("nan")
    accuracy: float = float("nan")
    seconds: float = 0.0


class Shifted(Dataset[tuple[Tensor, Tensor]]):
    """Training images, each moved by a few pixels whenever it is drawn.

    Args:
        split: images and labels.
        generator: draws the moves; equal generators give equal images.
    """

    def __init__(self, split: Split, generator: torch.Generator) -> None:
        self.size = split.images.shape[-1]
        self.margin = max(1, self.size // 14)
        self.padded = F.pad(split.images, [self.margin] * 4, value=split.images.min().item())
        self.labels, self.generator = split.labels, generator

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        top, left = torch.randint(2 * self.margin + 1, (2,), generator=self.generator).tolist()
        image = self.padded[index, :, top : top + self.size, left : left + self.size]
        return image, self.labels[index]


def start(data: ImageData, settings: Settings) -> Iterator[Run]:
    """Both networks, with equal weights and equal batches to come."""
    torch.manual_seed(settings.seed)
    initial = small_resnet(data.train.images.shape[1], data.classes, settings.width)
    criterion = nn.CrossEntropyLoss(label_smoothing=0.1)
    for name in ("plain", "APART"):
        model = copy.deepcopy(initial)
        generator = torch.Generator().manual_seed(settings.seed)
        batches = DataLoader(
            Shifted(data.train, generator), settings.batch_size, shuffle=True, drop_last=True, generator=generator
        )
        optimizer = torch.optim.SGD(
            model.parameters(), settings.lr, momentum=0.9, nesterov=True, weight_decay=settings.weight_decay
        )
        steps = settings.epochs * len(batches)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, settings.lr, total_steps=steps, cycle_momentum=False)
        step = (
            plain_step(model, optimizer, criterion)
            if name == "plain"
            else apart_step(model, optimizer, criterion, settings)
        )
        yield Run(name, model, step, schedule, batches)


def train_epoch(run: Run, advance: Callable[[], None]) -> None:
    """One pass over the training images.

    Args:
        run: what to train.
        advance: is called after every batch.
    """
    run.model.train()
    losses = []
    for x, y in run.batches:
        began = time.perf_counter()
        losses.append(run.step(x, y))
        run.schedule.step()
        run.seconds += time.perf_counter() - began
        advance()
    run.loss = torch.stack(losses).mean().item()


@torch.no_grad()
def accuracy(model: nn.Module, split: Split) -> float:
    """The share of images that get their label, from 0 to 1."""
    model.eval()
    correct = [
        (model(images).argmax(dim=1) == labels).sum()
        for images, labels in zip(split.images.split(500), split.labels.split(500), strict=True)
    ]
    return int(torch.stack(correct).sum()) / len(split.labels)


def progress_bars() -> Progress:
    """One line for each method: its progress, time and latest numbers."""
    return Progress(
        TextColumn("{task.fields[method]:>5}"),
        BarColumn(bar_width=None),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("loss {task.fields[loss]:.3f}  test accuracy {task.fields[accuracy]:.2%}"),
        expand=True,
    )


def main(settings: Settings) -> dict[str, Run]:
    """Train both networks, epoch by epoch in turn, and print what became of them.

    Args:
        settings: from the command line.

    Returns:
        Both runs, by the name of their method.
    """
    data = load(settings.data)
    runs = list(start(data, settings))
    with progress_bars() as progress:

        def add_bar(run: Run) -> TaskID:
            total = settings.epochs * len(run.batches)
            return progress.add_task("", total=total, method=run.name, loss=run.loss, accuracy=run.accuracy)

        bars = {run.name: add_bar(run) for run in runs}
        for _ in range(settings.epochs):
            for run in runs:
                bar = bars[run.name]
                train_epoch(run, advance=partial(progress.advance, bar))
                run.accuracy = accuracy(run.model, data.test)
                progress.update(bar, loss=run.loss, accuracy=run.accuracy)
    print_table(runs, settings, len(data.test.labels))
    return {run.name: run for run in runs}


def print_table(runs: list[Run], settings: Settings, test_images: int) -> None:
    """Final numbers, a line for each method."""
    table = Table(title=f"{settings.data}, {settings.epochs} epochs, seed {settings.seed}: {test_images} test images")
    for heading in ("method", "training loss", "test accuracy", "training time"):
        table.add_column(heading, justify="left" if heading == "method" else "right")
    for run in runs:
        table.add_row(run.name, f"{run.loss:.3f}", f"{run.accuracy:.2%}", f"{run.seconds:.0f} s")
    Console().print(table)
    print("One seed says little: examples/compare.py trains many, and gives intervals.")


if __name__ == "__main__":
    try:
        main(tyro.cli(Settings, description=__doc__))
    except ApartError as error:
        sys.exit(f"error: {error}")
