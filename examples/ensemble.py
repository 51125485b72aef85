"""Many networks trained at a time, in one compiled program: `python examples/ensemble.py`.

    step    = make_apart_step(model, loss)                             one network, one batch
    members = vmap(step)                                               all networks, each with batch and radius
    torch.compile(members)                                             one program for all of them

The networks are small ResNets on a bundled data set, of several seeds at each radius ε. A seed decides initial weights
and batches, so the networks of a seed differ by ε alone. The learning curves are drawn into `--out`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
import tyro
from compare_report import write_json
from data import ImageData, Split, load, shuffled_batches
from environment import environment
from models import mnist_resnet, resnet1d, small_resnet
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from torch import Tensor, nn
from torch.func import stack_module_state, vmap

from apart_func import FunctionalModel, functionalize, make_apart_step

Tensors = dict[str, Tensor]

NETWORKS = {"digits": small_resnet, "digits640": small_resnet, "mnist5k": mnist_resnet, "mnist1d": resnet1d}


@dataclass(frozen=True)
class Settings:
    """What is trained.

    Attributes:
        data: bundled data set; nothing is downloaded.
        epsilons: perturbation radii; ε = 0 is the control with two passes and no perturbation.
        seeds: networks at each radius.
        epochs: passes over the training samples.
        groups: ghost groups of the adversarial pass; they divide the batch size.
        width: channels of the networks' first block.
        lr: learning rate at the start; it falls to zero along a cosine.
        momentum: momentum of SGD.
        weight_decay: weight decay of SGD, on all parameters.
        batch_size: images in a batch.
        compile: whether the step of all networks is compiled, which takes a minute.
        threads: of the CPU.
        out: folder for ensemble.json and ensemble.png.
    """

    data: Literal["digits", "digits640", "mnist5k", "mnist1d"] = "digits"
    epsilons: tuple[float, ...] = (0.0, 0.1)
    seeds: int = 4
    epochs: int = 60
    groups: int = 4
    width: int = 8
    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 5e-4
    batch_size: int = 64
    compile: bool = True
    threads: int = 1
    out: Path = Path("runs/ensemble")

    def __post_init__(self) -> None:
        """Refuse what cannot be trained."""
        if not self.epsilons or self.seeds < 1 or self.epochs < 1:
            raise ValueError("at least one radius, one seed and one epoch are needed")


class Members(NamedTuple):
    """The state of all networks, in stacked tensors: entry i belongs to network i.

    Attributes:
        params: trained tensors by name.
        buffers: all others.
        momenta: of SGD, keyed as `params`.
    """

    params: Tensors
    buffers: Tensors
    momenta: Tensors


# From the members' state, their radii, batches (members, batch, ...) and a learning rate to new state and losses.
Update = Callable[[Members, Tensor, Split, Tensor], tuple[Members, Tensor]]


def make_models(settings: Settings) -> list[nn.Module]:
    """The networks: for each radius those of all seeds, equal for equal seeds."""
    models: list[nn.Module] = []
    for _ in settings.epsilons:
        for seed in range(settings.seeds):
            torch.manual_seed(seed)
            models.append(NETWORKS[settings.data](1, 10, settings.width))
    return models


def stack(models: Sequence[nn.Module]) -> Members:
    """The state of networks of one architecture, before the first step."""
    params, buffers = stack_module_state(list(models))
    params = {name: tensor.detach() for name, tensor in params.items()}
    return Members(params, buffers, {name: torch.zeros_like(tensor) for name, tensor in params.items()})


def make_update(model: nn.Module | FunctionalModel, settings: Settings) -> Update:
    """The training step of all networks at once: APART's gradients under vmap, and SGD with momentum.

    Args:
        model: a network of their architecture.
        settings: of APART and SGD.

    Returns:
        A pure function; SGD works on stacked tensors as on any.
    """
    apart_step = make_apart_step(model, F.cross_entropy, groups=settings.groups)

    def one(params: Tensors, buffers: Tensors, batch: Split, epsilon: Tensor) -> tuple[Tensors, Tensors, Tensor]:
        out = apart_step(params, buffers, (batch.images, batch.labels), epsilon=epsilon)
        return out.grads, out.buffers, out.loss

    def update(members: Members, epsilons: Tensor, batches: Split, lr: Tensor) -> tuple[Members, Tensor]:
        grads, buffers, losses = vmap(one)(members.params, members.buffers, batches, epsilons)
        momenta = {
            name: settings.momentum * members.momenta[name] + grads[name] + settings.weight_decay * param
            for name, param in members.params.items()
        }
        params = {name: param - lr * momenta[name] for name, param in members.params.items()}
        return Members(params, buffers, momenta), losses

    return update


def batches_of_all(data: ImageData, settings: Settings) -> Iterator[Split]:
    """Batches for an epoch and its successors, (members, batch, ...), each seed's in its own order."""
    generators = [torch.Generator().manual_seed(seed) for seed in range(settings.seeds)]
    for _ in range(settings.epochs):
        for batches in zip(
            *(shuffled_batches(data.train, settings.batch_size, generator) for generator in generators), strict=True
        ):
            everyone = list(batches) * len(settings.epsilons)
            yield Split(
                torch.stack([batch.images for batch in everyone]), torch.stack([batch.labels for batch in everyone])
            )


def errors_of_all(fmodel: FunctionalModel, members: Members, split: Split) -> Tensor:
    """The error of every network, in percent."""

    def scores(params: Tensors, buffers: Tensors) -> Tensor:
        output: Tensor = fmodel(params, buffers, split.images, training=False)
        return output

    with torch.no_grad():
        predicted = vmap(scores)(members.params, members.buffers).argmax(dim=-1)
    return 100 * (predicted != split.labels).double().mean(dim=1)


class Curves(NamedTuple):
    """How training went.

    Attributes:
        losses: mean training loss, (epochs, members).
        errors: test error in percent after each epoch, likewise.
        first_step_seconds: time of the first step, which compiles.
        step_seconds: mean time of the others, for all networks together.
    """

    losses: Tensor
    errors: Tensor
    first_step_seconds: float
    step_seconds: float


def train(settings: Settings) -> Curves:
    """Train all networks together, under a progress bar.

    Args:
        settings: what to train.

    Returns:
        Losses and errors; the networks of the first radius come first.
    """
    torch.set_num_threads(settings.threads)
    data = load(settings.data)
    models = make_models(settings)
    members = stack(models)
    epsilons = torch.tensor(settings.epsilons).repeat_interleave(settings.seeds)
    update = make_update(models[0], settings)
    if settings.compile:
        update = torch.compile(update, fullgraph=True, dynamic=False)
    predict = functionalize(models[0])

    per_epoch = len(data.train.labels) // settings.batch_size
    total = settings.epochs * per_epoch
    losses: list[Tensor] = []
    errors: list[Tensor] = []
    seconds: list[float] = []
    with progress_bar() as progress:
        task = progress.add_task("compiling" if settings.compile else "starting", total=total)
        for number, batches in enumerate(batches_of_all(data, settings)):
            lr = settings.lr * (1 + torch.cos(torch.tensor(torch.pi * number / total))) / 2
            start = time.perf_counter()
            members, loss = update(members, epsilons, batches, lr)
            seconds.append(time.perf_counter() - start)
            losses.append(loss)
            if (number + 1) % per_epoch == 0:
                errors.append(errors_of_all(predict, members, data.test))
                description = f"loss {loss.mean():.3f}, test error {errors[-1].mean():.1f} %"
                progress.update(task, description=description)
            progress.advance(task)
    mean_losses = torch.stack(losses).view(settings.epochs, per_epoch, -1).mean(dim=1)
    later = seconds[1:] or seconds
    return Curves(mean_losses, torch.stack(errors), seconds[0], sum(later) / len(later))


def progress_bar() -> Progress:
    """A bar over the steps, with the time left."""
    return Progress(
        BarColumn(bar_width=None),
        TaskProgressColumn(),
        TimeRemainingColumn(compact=True, elapsed_when_finished=True),
        TextColumn("{task.description}"),
        expand=True,
    )


def draw(path: Path, curves: Curves, epsilons: Sequence[float]) -> None:
    """Draw learning curves of every network and their means, and the final errors.

    Args:
        path: the PNG file.
        curves: what was trained.
        epsilons: the radii, in the order of the networks.
    """
    figure, (over_epochs, over_radii) = plt.subplots(1, 2, figsize=(10, 4.2), layout="constrained")
    epochs = torch.arange(1, len(curves.errors) + 1)
    finals = []
    for number, (epsilon, errors) in enumerate(zip(epsilons, curves.errors.chunk(len(epsilons), dim=1), strict=True)):
        colour = plt.get_cmap("viridis")(0.85 * number / max(len(epsilons) - 1, 1))
        over_epochs.plot(epochs, errors, color=colour, alpha=0.25, linewidth=0.8)
        over_epochs.plot(epochs, errors.mean(dim=1), color=colour, label=f"ε = {epsilon:g}")
        over_radii.scatter([epsilon] * errors.shape[1], errors[-1], color=colour, alpha=0.6)
        finals.append(errors[-1].mean())
    over_radii.plot(epsilons, finals, color="grey", marker="_", markersize=14, label="mean")
    over_epochs.set_yscale("log")
    over_epochs.set(title="Each network, and the mean of a radius", xlabel="epoch", ylabel="test error (%)")
    over_radii.set(title="Final test error", xlabel="perturbation radius ε")
    over_epochs.legend(frameon=False)
    over_radii.legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main(settings: Settings) -> Curves:
    """Train, and write the errors and the figure.

    Args:
        settings: from the command line.

    Returns:
        What was written.
    """
    curves = train(settings)
    finals = curves.errors[-1].view(len(settings.epsilons), settings.seeds)
    for epsilon, errors in zip(settings.epsilons, finals, strict=True):
        spread = f" ± {errors.std() / len(errors) ** 0.5:.2f}" if len(errors) > 1 else ""
        print(f"ε = {epsilon:g}: test error {errors.mean():.2f}{spread} %, mean of {len(errors)} seeds")
    print(
        f"{finals.numel()} networks at a time: {1000 * curves.step_seconds:.1f} ms a step for all, "
        f"the first one {curves.first_step_seconds:.0f} s"
    )
    draw(settings.out / "ensemble.png", curves, settings.epsilons)
    table = {
        "settings": asdict(settings),
        "test_errors": dict(zip(map(str, settings.epsilons), finals.tolist(), strict=True)),
        "step_seconds": curves.step_seconds,
        "first_step_seconds": curves.first_step_seconds,
        "environment": environment(),
    }
    write_json(settings.out / "ensemble.json", table)
    print(f"Errors and figure: {settings.out}/ensemble.json, ensemble.png")
    return curves


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
