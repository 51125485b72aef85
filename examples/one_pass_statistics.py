"""What perturbed samples would add to the running statistics: `python examples/one_pass_statistics.py runs/*`.

In one pass, the library's running statistics are those of the clean samples. For finished runs of that method, the
training samples go through the trained network once more, half of the ghost groups perturbed as in training, and every
batch-norm layer's statistics are taken from the clean samples, from the perturbed ones, and from both. The table says
how far they lie apart, and the test error with each; the last column is plain batch norm on whole batches.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import torch.nn.functional as F
import tyro
from compare_report import format_error
from evaluate import error_percent, load_data, load_network, scores
from groups import group_runs
from paired import estimate
from rich.progress import track
from tables import Cell, ResultTable, print_table
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.swa_utils import update_bn
from training.datasets import DataSet, training_batches
from training.loop import CONFIG, read_config
from training.runs import FinishedRun, FolderError, find_finished, read_run
from training.settings import Settings

from apart_func import APART, ApartError

EPOCHS = 3  # through the training samples, so that statistics have settled


@dataclass(frozen=True)
class Options:
    """What is measured.

    Attributes:
        folders: run folders, and folders of run folders; those of other methods are left out.
    """

    folders: Annotated[tuple[Path, ...], tyro.conf.Positional]


class Moments(NamedTuple):
    """Sums over the samples that a layer has seen, float64.

    Attributes:
        size: values a channel.
        first: Σ x, `(C,)`.
        second: Σ x², `(C,)`.
    """

    size: int
    first: Tensor
    second: Tensor

    def __add__(self, other: Any) -> Moments:
        """Those of the samples of both."""
        return Moments(*(mine + theirs for mine, theirs in zip(self, other, strict=True)))

    @property
    def mean(self) -> Tensor:
        """μ, `(C,)`."""
        return self.first / self.size

    @property
    def var(self) -> Tensor:
        """σ², `(C,)`."""
        return self.second / self.size - self.mean.square()


class Compared(NamedTuple):
    """One network.

    Attributes:
        mean_shift: distance between the means of perturbed and clean samples, in clean deviations; root mean square
            over the channels of all layers.
        scale_shift: relative difference of their deviations, likewise.
        errors: test error in percent by the source of the statistics.
    """

    mean_shift: float
    scale_shift: float
    errors: Mapping[str, float]


def compare(model: nn.Module, data: DataSet, settings: Settings) -> Compared:
    """Take a network's statistics from clean and perturbed samples.

    Args:
        model: trained.
        data: what it was trained on.
        settings: of its run.

    Returns:
        How far they lie apart, and what they do to the error.
    """
    clean, perturbed = _moments(model.train(), data, settings)
    both = {layer: clean[layer] + perturbed[layer] for layer in clean}
    samples, labels = data.test.batch(range(len(data.test)))
    errors = {}
    for name, moments in {"clean": clean, "perturbed": perturbed, "both": both}.items():
        for layer, of_layer in moments.items():
            _layers(model)[layer].running_mean.copy_(of_layer.mean)
            _layers(model)[layer].running_var.copy_(of_layer.var)
        errors[name] = error_percent(scores(model.eval(), samples), labels)
    update_bn((batch for batch, _ in _batches(data, settings)), model.train())
    errors["whole batches"] = error_percent(scores(model.eval(), samples), labels)
    shifts = [(perturbed[layer].mean - of_clean.mean) / of_clean.var.sqrt() for layer, of_clean in clean.items()]
    scales = [(perturbed[layer].var / of_clean.var).sqrt() - 1 for layer, of_clean in clean.items()]
    return Compared(_root_mean_square(shifts), _root_mean_square(scales), errors)


def _moments(model: nn.Module, data: DataSet, settings: Settings) -> tuple[dict[str, Moments], dict[str, Moments]]:
    """Of clean and of perturbed samples, by layer, with the network in training mode."""
    method = settings.method
    apart = APART(model, method.epsilon, method.groups)
    parts: list[dict[str, list[Moments]]] = [{}, {}]
    is_counted = False  # no perturbation is known in the first step

    def seen(name: str, x: Tensor) -> None:
        is_clean = torch.arange(len(x)) % method.groups < round(method.clean_fraction * method.groups)
        for part, chosen in zip(parts, (x[is_clean], x[~is_clean]), strict=True):
            rows = chosen.detach().double().transpose(0, 1).flatten(1)
            part.setdefault(name, []).append(Moments(rows.shape[1], rows.sum(1), rows.square().sum(1)))

    hooks = [
        layer.register_forward_pre_hook(lambda _, inputs, name=name: seen(name, inputs[0]) if is_counted else None)
        for name, layer in _layers(model).items()
    ]
    for samples, labels in _batches(data, settings):
        model.zero_grad()
        with apart.one_pass(method.clean_fraction):
            F.cross_entropy(model(samples), labels).backward()
        is_counted = True
    for hook in hooks:
        hook.remove()
    clean, perturbed = ({name: _sum(moments) for name, moments in part.items()} for part in parts)
    return clean, perturbed


def _batches(data: DataSet, settings: Settings) -> Iterator[Any]:
    for epoch in range(EPOCHS):
        size, seed = settings.training.batch_size, settings.seed
        yield from training_batches(data, batch_size=size, seed=seed, epoch=epoch, first=0, augment=False)


def _layers(model: nn.Module) -> dict[str, Any]:
    return {name: module for name, module in model.named_modules() if isinstance(module, _BatchNorm)}


def _sum(moments: Sequence[Moments]) -> Moments:
    total = moments[0]
    for one in moments[1:]:
        total = total + one
    return total


def _root_mean_square(vectors: Sequence[Tensor]) -> float:
    return torch.cat(list(vectors)).square().mean().sqrt().item()


def print_errors(runs: Sequence[FinishedRun]) -> None:
    """Measure all runs of a data set, under a progress bar, and print a row for each group that differs in seeds alone.

    Args:
        runs: of one data set, all by one pass.
    """
    data = load_data(runs[0].settings["data.name"])
    measured = {
        run.folder: compare(load_network(run.folder, settings), data, settings)
        for run in track(runs, description="measuring")
        for settings in [read_config(run.folder / CONFIG)]
    }
    sources = list(next(iter(measured.values())).errors)
    columns = ("method", "seeds", "means apart, σ", "deviations apart, %", *sources)
    table = []
    for group in group_runs(runs):
        rows = [measured[run.folder] for run in group.runs.values()]
        shifts = [estimate([row.mean_shift for row in rows]), estimate([100 * row.scale_shift for row in rows])]
        errors = [estimate([row.errors[source] for row in rows]) for source in sources]
        texts = (group.label, str(len(rows)), *(format_error(each) for each in (*shifts, *errors)))
        table.append([Cell(text) for text in texts])
    title = f"{runs[0].settings['data.name']}: test error % by the source of statistics"
    print_table(ResultTable(title, columns, table, notes="Means over seeds ± standard error."))


def main(options: Options) -> None:
    """Measure.

    Args:
        options: from the command line.

    Raises:
        FolderError: there is no run of one pass.
    """
    runs = [read_run(folder, "test") for folder in find_finished(options.folders)]
    runs = [run for run in runs if run.settings["method.name"] == "one_pass"]
    if not runs:
        raise FolderError("none of these runs was trained by one pass: expected some of train.py --method one_pass")
    for data in dict.fromkeys(run.settings["data.name"] for run in runs):
        print_errors([run for run in runs if run.settings["data.name"] == data])


if __name__ == "__main__":
    try:
        main(tyro.cli(Options, description=__doc__))
    except (FolderError, ApartError) as error:
        sys.exit(f"error: {error}")
