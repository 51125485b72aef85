"""Plain training against APART on real images: `python examples/compare.py`.

Every seed trains the same small ResNet three times, from the same weights and on the same batches: plainly, plainly
for twice the epochs (an APART step costs two passes), and with APART. The paired differences in test error, a table
of them, and the learning curves are written to `--out`. The intervals speak of new weights and batches on this
split of the data, not of other splits.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Literal, TypeAlias

import torch
import torch.nn.functional as F
import tyro
from compare_report import Run, draw, gain, print_table, summarise, verdict, write_json
from data import ImageData, Split, load, shuffled_batches
from environment import environment
from models import small_resnet
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from torch import Tensor, nn
from workers import run_in_workers, tell

from apart_func import ApartError, assign_grads_, functionalize, make_apart_step, split_state

Buffers: TypeAlias = dict[str, Tensor]
Step: TypeAlias = Callable[[Buffers, Split], tuple[Buffers, Tensor]]
MakeStep: TypeAlias = "Callable[[nn.Module, torch.optim.Optimizer, Settings], Step]"

CURVE_POINTS = 20


@dataclass(frozen=True)
class Settings:
    """What is compared, and on what.

    Attributes:
        data: bundled data set; nothing is downloaded.
        measure_on: images that measure the error. Choose settings on validation images.
        seeds: number of paired runs, at least two.
        epochs: passes over the training images; the second plain run takes twice as many.
        epsilon: APART's perturbation radius.
        groups: APART's ghost groups in the adversarial pass; they divide ratio × batch size.
        ratio: share of the batch that goes through the adversarial pass.
        width: channels of the network's first block.
        blocks: its residual blocks; each after the first halves the resolution and doubles the width.
        lr: learning rate at the start; it falls to zero along a cosine.
        momentum: momentum of SGD.
        weight_decay: weight decay of SGD, on all parameters.
        batch_size: images in a batch; an incomplete last batch is dropped.
        workers: processes that train at the same time, with one thread each.
        out: folder for compare.json and compare.png.
    """

    data: Literal["digits", "mnist5k"] = "digits"
    measure_on: Literal["test", "validation"] = "test"
    seeds: int = 12
    epochs: int = 60
    epsilon: float = 0.1
    groups: int = 4
    ratio: float = 1.0
    width: int = 8
    blocks: int = 2
    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 5e-4
    batch_size: int = 64
    workers: int = 2
    out: Path = Path("runs/compare")

    def __post_init__(self) -> None:
        """Refuse what cannot be measured."""
        if self.seeds < 2:
            raise ValueError(f"an interval over seeds needs at least two of them: seeds is {self.seeds}")
        if self.epochs < 1 or self.workers < 1:
            raise ValueError(f"at least one is needed: epochs is {self.epochs}, workers is {self.workers}")


def plain_step(model: nn.Module, optimizer: torch.optim.Optimizer, settings: Settings) -> Step:
    """The ordinary training step. The model updates its own running statistics, in place.

    Args:
        model: the network, in training mode.
        optimizer: over its parameters.
        settings: not needed here.

    Returns:
        A step that takes buffers and batch and returns the buffers and the loss.
    """

    def step(buffers: Buffers, batch: Split) -> tuple[Buffers, Tensor]:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(batch.images), batch.labels)
        loss.backward()
        optimizer.step()
        return buffers, loss.detach()

    return step


def apart_step(model: nn.Module, optimizer: torch.optim.Optimizer, settings: Settings) -> Step:
    """The APART step. It returns new buffers; `params` share storage with the model, so the optimizer moves them.

    Args:
        model: the network, in training mode.
        optimizer: over its parameters.
        settings: radius, groups and ratio.

    Returns:
        A step that takes buffers and batch and returns the new buffers and the clean loss.
    """
    params, _ = split_state(model)
    compute = make_apart_step(
        model, F.cross_entropy, epsilon=settings.epsilon, groups=settings.groups, ratio=settings.ratio
    )

    def step(buffers: Buffers, batch: Split) -> tuple[Buffers, Tensor]:
        out = compute(params, buffers, (batch.images, batch.labels))
        assign_grads_(model, out.grads)
        optimizer.step()
        return out.buffers, out.loss

    return step


@dataclass(frozen=True)
class Method:
    """One way to train.

    Attributes:
        make_step: builds the function that updates the model with one batch.
        epoch_factor: its epochs, as a multiple of the setting.
        adversarial: whether its step has a second, adversarial pass.
    """

    make_step: MakeStep
    epoch_factor: int = 1
    adversarial: bool = False

    def epochs(self, settings: Settings) -> int:
        """Epochs of one run."""
        return self.epoch_factor * settings.epochs

    def passes_per_epoch(self, settings: Settings) -> float:
        """Forward-backward passes over the training images in an epoch."""
        return 1 + settings.ratio if self.adversarial else 1


METHODS = {
    "plain": Method(plain_step),
    "plain 2x epochs": Method(plain_step, epoch_factor=2),
    "APART": Method(apart_step, adversarial=True),
}


def train(method: Method, data: ImageData, settings: Settings, seed: int, report: Callable[[float], None]) -> Run:
    """Train one network and measure its error on the way.

    The seed alone decides the initial weights and the batches, so that all methods share them.

    Args:
        method: how to train.
        data: what to train and measure on.
        settings: everything else.
        seed: of the initial weights and the batches.
        report: is told the mean training loss of every epoch.

    Returns:
        Losses, the learning curve, which ends with the final error, and the time of every step.
    """
    torch.manual_seed(seed)
    model = small_resnet(data.train.images.shape[1], data.classes, settings.width, settings.blocks)
    predict = functionalize(model)
    params, buffers = split_state(model)
    optimizer = torch.optim.SGD(
        model.parameters(), settings.lr, momentum=settings.momentum, weight_decay=settings.weight_decay
    )
    step = method.make_step(model, optimizer, settings)

    epochs = method.epochs(settings)
    steps_per_epoch = len(data.train.labels) // settings.batch_size
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=epochs * steps_per_epoch)
    measured = data.validation if settings.measure_on == "validation" else data.test

    batches = torch.Generator().manual_seed(seed)
    run = Run()
    for epoch in range(1, epochs + 1):
        losses = []
        for batch in shuffled_batches(data.train, settings.batch_size, batches):
            start = time.perf_counter()
            buffers, loss = step(buffers, batch)
            run.step_seconds.append(time.perf_counter() - start)
            losses.append(loss)
            schedule.step()
        run.losses.append(torch.stack(losses).mean().item())
        report(run.losses[-1])
        if epoch % max(1, epochs // CURVE_POINTS) == 0 or epoch == epochs:
            run.passes.append(epoch * method.passes_per_epoch(settings))
            run.errors.append(error_rate(partial(predict, params, buffers, training=False), measured))
    return run


def error_rate(classify: Callable[[Tensor], Tensor], split: Split, chunk: int = 500) -> float:
    """The share of images that get a wrong label, in percent.

    Args:
        classify: from images to class scores.
        split: images and their true labels.
        chunk: images to classify at a time, which bounds the memory.

    Returns:
        The error, from 0 to 100.
    """
    with torch.no_grad():
        predicted = torch.cat([classify(images).argmax(dim=1) for images in torch.split(split.images, chunk)])
    return 100 * int((predicted != split.labels).sum()) / len(split.labels)


def train_seed(settings: Settings, seed: int) -> dict[str, Run]:
    """Train all methods on one seed, one after the other in this process, so that their times can be compared.

    Args:
        settings: what to train.
        seed: of the initial weights and the batches.

    Returns:
        A run for every method.
    """
    data = load(settings.data)

    def train_and_tell(name: str) -> Run:
        return train(METHODS[name], data, settings, seed, report=lambda loss: tell((name, loss)))

    return {name: train_and_tell(name) for name in METHODS}


def train_all(settings: Settings) -> dict[str, list[Run]]:
    """Train all seeds, `workers` at a time, under a progress bar.

    Args:
        settings: what to train.

    Returns:
        For every method its runs, in the order of the seeds.
    """
    with progress_bar(settings) as show:
        seeds = run_in_workers(partial(train_seed, settings), range(settings.seeds), settings.workers, show)
    return {name: [runs[name] for runs in seeds] for name in METHODS}


@contextmanager
def progress_bar(settings: Settings) -> Iterator[Callable[[list[tuple[str, float]]], None]]:
    """A bar over all passes of all runs, with the latest loss of each method.

    Args:
        settings: say how much there is to do.

    Yields:
        A function that takes (method, mean loss of an epoch) pairs and moves the bar.
    """
    columns = [
        BarColumn(bar_width=None),
        TaskProgressColumn(),
        TimeRemainingColumn(compact=True, elapsed_when_finished=True),
        TextColumn("{task.description}"),
    ]
    total = settings.seeds * sum(m.epochs(settings) * m.passes_per_epoch(settings) for m in METHODS.values())
    losses: dict[str, float] = {}
    with Progress(*columns, expand=True) as progress:
        task = progress.add_task("", total=total)

        def show(epochs: list[tuple[str, float]]) -> None:
            for method, loss in epochs:
                losses[method] = loss
                progress.advance(task, METHODS[method].passes_per_epoch(settings))
            running = ", ".join(f"{method} {loss:.3f}" for method, loss in losses.items())
            progress.update(task, description=f"loss: {running}" if running else "starting")

        yield show
        progress.update(task, completed=total)


def main(settings: Settings) -> None:
    """Train all pairs, print the table, and write it and the figure.

    Args:
        settings: from the command line.
    """
    start = time.perf_counter()
    runs = train_all(settings)
    rows = summarise(runs, plain="plain")
    gains = {other: gain(runs["APART"], runs[other]) for other in METHODS if other != "APART"}
    machine = {**environment(), "processes": settings.workers, "threads_per_process": 1}

    error_name = f"{settings.measure_on} error"
    print_table(
        rows,
        title=f"{settings.data}: {error_name}, mean ± standard error of {settings.seeds} paired seeds",
        caption="loss: in training, last epoch; time a step: median, relative to plain\n"
        f"torch {machine['torch']}, {machine['hardware']}, {settings.workers} processes of one thread",
    )
    for other, difference in gains.items():
        print(verdict("APART", other, difference))
    draw(settings.out / "compare.png", runs, "plain", error_name)
    table = {
        "settings": asdict(settings),
        "n": settings.seeds,
        "methods": [asdict(row) for row in rows],
        "gains_of_apart": {other: asdict(difference) for other, difference in gains.items()},
        "environment": machine,
        "wall_seconds": time.perf_counter() - start,
    }
    write_json(settings.out / "compare.json", table)
    print(f"Took {table['wall_seconds']:.0f} s. Table and figure: {settings.out}/compare.json, compare.png")


if __name__ == "__main__":
    try:
        main(tyro.cli(Settings, description=__doc__))
    except ApartError as error:
        sys.exit(f"error: {error}")
