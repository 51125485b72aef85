"""Runs that differ in their seed alone, trained at the same time in one program: `train_together(runs)`.

    one    = the method's step                                one network, one batch
    all    = vmap(one), and SGD on the stacked tensors        every network, each on the batches of its own seed

Each run starts from the weights and gets the batches that `train.py` gives it, and ends with the folder that `train.py`
leaves, TensorBoard aside: the numbers agree up to rounding. Where steps draw at random, the draws are others. Until all
have finished, one checkpoint of all of them lies in the folder of the first.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import vmap

from apart_func import Perturbation, load_state_, split_state
from apart_func.pytrees import PerturbationTree, stack_trees
from training.checkpoints import Checkpoints, State
from training.datasets import (
    BUNDLED,
    DataSet,
    Split,
    evaluation_batches,
    steps_per_epoch,
    training_batches,
)
from training.interrupts import Interrupted, noted_signals
from training.logs import Metrics, Row
from training.loop import (
    EVALUATION_FACTOR,
    METRICS,
    SHOW_SECONDS,
    Place,
    epoch_row,
    full_disk_explained,
    initial_network,
    is_measured,
    learning_rate,
    prepared,
    random_state,
    set_random_state,
    write_config,
    write_network,
)
from training.methods import Batch, Step, Tensors, initially_carried, make_step
from training.nonfinite import NonFiniteError, Start, nonfinite_error
from training.settings import Settings, SettingsError, TrainingSettings

TOGETHER = "checkpoints-together"

# What the program of one run has beyond this one, and its value where it is not used.
ALONE = {"amp": None, "clip": None, "ema": None, "channels_last": False}


def train_together(runs: Sequence[Settings], show: Callable[[float], None]) -> None:
    """Train runs to their ends; where the same runs were interrupted, they go on from their last checkpoint.

    Args:
        runs: settings that differ in `seed` and `out` alone.
        show: is told a few times a second which share of the steps is done.

    Raises:
        SettingsError: these runs cannot be trained together; nothing has been written.
        ValueError: their settings do not fit together; likewise.
        Interrupted: SIGINT or SIGTERM came; a checkpoint was written.
        NonFiniteError: a loss or gradient of one of them was infinite or not a number.
        RunError: the disk is full.
    """
    check_fit(runs)
    data, learner = prepared(runs[0])
    models = [initial_network(run, data).to(learner.device) for run in runs]
    with full_disk_explained(runs[0].out), noted_signals() as noted, ExitStack() as stack:
        for run in runs:
            write_config(run)
        _Group(runs, data, models, show, noted, stack).to_the_end()


def check_fit(runs: Sequence[Settings]) -> None:
    """Make sure that runs can be trained together.

    Raises:
        SettingsError: they cannot.
    """
    first = runs[0]
    if any(replace(run, seed=first.seed, out=first.out) != first for run in runs):
        raise SettingsError("only runs that differ in their seed alone can be trained together.")
    if first.data.name not in BUNDLED:
        raise SettingsError(
            f"runs on {first.data.name} cannot be trained together, those on {', '.join(BUNDLED)} can. "
            "Train each by itself."
        )
    for name, unused in ALONE.items():
        value = getattr(first.training, name)
        if value != unused:
            raise SettingsError(
                f"runs with {name} {value} cannot be trained together. Leave it out, or train each by itself."
            )


class Members(NamedTuple):
    """The state of all networks, in stacked tensors: entry i belongs to run i.

    Attributes:
        params: trained tensors by name.
        buffers: all others.
        carried: what the method hands from step to step.
        momenta: of SGD, keyed as `params`.
    """

    params: Tensors
    buffers: Tensors
    carried: PerturbationTree
    momenta: Tensors


class Counted(NamedTuple):
    """What a step tells of all networks.

    Attributes:
        sums: loss, second loss, wrong labels, and one, (runs, 4).
        all_finite: (runs,).
    """

    sums: Tensor
    all_finite: Tensor


Update = Callable[[Members, Batch, Tensor], tuple[Members, Counted]]


def make_update(step: Step, training: TrainingSettings) -> Update:
    """Make the training step of all networks: the method's under vmap, and SGD.

    Args:
        step: of the method.
        training: momentum and weight decay.

    Returns:
        A pure function of members, stacked batches and a 0-d learning rate.
    """

    def one(
        params: Tensors, buffers: Tensors, carried: PerturbationTree, samples: Tensor, labels: Tensor
    ) -> tuple[Tensors, Tensors, PerturbationTree, Counted]:
        out, carried = step(params, buffers, (samples, labels), carried)
        wrong = (out.output.argmax(dim=1) != labels).sum()
        sums = torch.stack([out.loss, out.adversarial_loss, wrong.to(out.loss.dtype), torch.ones_like(out.loss)])
        return out.grads, out.buffers, carried, Counted(sums, out.all_finite)

    def update(members: Members, batches: Batch, lr: Tensor) -> tuple[Members, Counted]:
        grads, buffers, carried, counted = vmap(one, randomness="different")(
            members.params, members.buffers, members.carried, *batches
        )
        momenta = {
            name: training.momentum * members.momenta[name] + (grads[name] + training.weight_decay * param)
            for name, param in members.params.items()
        }
        params = {name: param - lr * momenta[name] for name, param in members.params.items()}
        return Members(params, buffers, carried, momenta), counted

    return update


class _Group:
    """Runs under way.

    Args:
        runs: their settings.
        data: what they train and measure on.
        models: their networks before the first step.
        show: is told how they get on.
        noted: the signal that asks them to stop, or None.
        stack: closes what this opens.
    """

    def __init__(
        self,
        runs: Sequence[Settings],
        data: DataSet,
        models: Sequence[nn.Module],
        show: Callable[[float], None],
        noted: Callable[[], int | None],
        stack: ExitStack,
    ) -> None:
        self.runs, self.data, self.model, self.show, self.noted = runs, data, models[0], show, noted
        self.training, self.method, self.machine = runs[0].training, runs[0].method, runs[0].machine
        self.steps = steps_per_epoch(data, self.training.batch_size)
        self.device = next(self.model.parameters()).device
        states = [(*split_state(model), initially_carried(model, self.method)) for model in models]
        params, buffers, carried = stack_trees(states)
        self.members = Members(params, buffers, carried, {name: torch.zeros_like(p) for name, p in params.items()})
        self.place = self._at_epoch(0)
        self.rows: list[list[Row]] = [[] for _ in runs]
        self.update = make_update(make_step(self.model, self.method), self.training)
        if self.training.compile:
            self.update = torch.compile(self.update, fullgraph=True, dynamic=False)
        self.checkpoints = Checkpoints(runs[0].out / TOGETHER)
        self._restore(self.checkpoints.load())
        self.saved_at = self.shown_at = time.monotonic()
        self.metrics = [
            stack.enter_context(closing(Metrics(run.out / METRICS, rows)))
            for run, rows in zip(runs, self.rows, strict=True)
        ]

    @property
    def step(self) -> int:
        """Steps that every run has taken."""
        return self.place.epoch * self.steps + self.place.batch

    def to_the_end(self) -> None:
        """Train the epochs that are left, and write the networks."""
        while self.place.epoch < self.training.epochs:
            self._train_epoch()
            self._add_rows()
            self.place = self._at_epoch(self.place.epoch + 1)
            every = self.machine.checkpoint_epochs
            if every and self.place.epoch % every == 0:
                self._save()
        for number, run in enumerate(self.runs):
            write_network(run.out, *self._state(number))
        shutil.rmtree(self.checkpoints.folder, ignore_errors=True)

    def _train_epoch(self) -> None:
        """Take the steps of the epoch that are left."""
        batches = self._batches()
        clock = time.perf_counter()
        while self.place.batch < self.steps:
            batch = next(batches)
            self.place.waiting_seconds += time.perf_counter() - clock
            self._take_step(batch)
            if time.monotonic() - self.shown_at > SHOW_SECONDS:
                self.show(self.step / (self.steps * self.training.epochs))
                self.shown_at = time.monotonic()
            self._stop_if_asked()
            if time.monotonic() - self.saved_at > self.machine.checkpoint_seconds:
                self._save()
            before, clock = clock, time.perf_counter()
            self.place.seconds += clock - before

    def _take_step(self, batches: Batch) -> None:
        """Train every network on its batch, and count what came of it."""
        lr = torch.tensor(learning_rate(self.training, self.step / (self.steps * self.training.epochs)))
        before = self.members
        self.members, counted = self.update(before, batches, lr.to(self.device))
        if not counted.all_finite.all():
            raise self._explained(int(counted.all_finite.int().argmin()), before, batches)
        self.place.batch += 1
        self.place.sums += counted.sums.cpu()

    def _batches(self) -> Iterator[Batch]:
        """The batches of the epoch that are left, stacked. Bundled samples are not varied."""
        size, place = self.training.batch_size, self.place
        each = [
            training_batches(
                self.data, batch_size=size, seed=run.seed, epoch=place.epoch, first=place.batch, augment=False
            )
            for run in self.runs
        ]
        for batches in zip(*each, strict=True):
            samples, labels = zip(*batches, strict=True)
            yield torch.stack(samples).to(self.device), torch.stack(labels).to(self.device)

    def _add_rows(self) -> None:
        """Write down what the epoch came to."""
        new = []
        for number, run in enumerate(self.runs):
            start = time.perf_counter()
            errors = self._errors(number) if is_measured(self.training, self.place.epoch) else (None, None)
            new.append(epoch_row(run, self.steps, self._share(number), errors, time.perf_counter() - start))
            self._stop_if_asked()
        for metrics, rows, row in zip(self.metrics, self.rows, new, strict=True):
            rows.append(row)
            metrics.add(row)

    def _share(self, number: int) -> Place:
        """What of the counted belongs to one run."""
        place, count = self.place, len(self.runs)
        return replace(
            place,
            sums=place.sums[number],
            seconds=place.seconds / count,
            waiting_seconds=place.waiting_seconds / count,
        )

    @torch.no_grad()
    def _errors(self, number: int) -> tuple[float | None, float]:
        """Errors of a network on validation samples, where there are some, and on test samples, in percent."""
        load_state_(self.model, *self._state(number))
        self.model.eval()
        validation = None if self.data.validation is None else self._error(self.data.validation)
        test = self._error(self.data.test)
        self.model.train()
        return validation, test

    def _error(self, split: Split) -> float:
        size = EVALUATION_FACTOR * self.training.batch_size
        wrong = 0
        for samples, labels in evaluation_batches(self.data, split, batch_size=size):
            scores = self.model(samples.to(self.device))
            wrong += int((scores.argmax(dim=1) != labels.to(self.device)).sum())
        return 100 * wrong / len(split)

    def _state(self, number: int, members: Members | None = None) -> tuple[Tensors, Tensors]:
        """Parameters and buffers of one network."""
        params, buffers = (members or self.members)[:2]
        return _entry(params, number), _entry(buffers, number)

    def _explained(self, number: int, before: Members, batches: Batch) -> NonFiniteError:
        """The error for a step of a run that was not finite."""
        samples, labels = (part[number] for part in batches)
        carried = {layer: Perturbation(*(part[number] for part in shift)) for layer, shift in before.carried.items()}
        params, buffers = self._state(number, before)
        start = Start(self.step + 1, params, buffers, (samples, labels), carried, None, torch.get_rng_state())
        error = nonfinite_error(self.model, self.method, None, start)
        return NonFiniteError(f"of the runs that are trained together, that of seed {self.runs[number].seed}: {error}")

    def _at_epoch(self, epoch: int) -> Place:
        return Place(epoch, sums=torch.zeros(len(self.runs), 4, dtype=torch.float64))

    def _stop_if_asked(self) -> None:
        number = self.noted()
        if number is not None:
            self._save()
            raise Interrupted(number)

    def _save(self) -> None:
        """Write a checkpoint of this moment, between two steps."""
        carried = {layer: tuple(shift) for layer, shift in self.members.carried.items()}  # plain, as checkpoints are
        state = {
            "seeds": [run.seed for run in self.runs],
            "members": self.members._asdict() | {"carried": carried},
            "place": vars(self.place),
            "rows": self.rows,
            "random": random_state(self.device),
        }
        self.checkpoints.save(self.step, state)
        self.saved_at = time.monotonic()

    def _restore(self, state: State | None) -> None:
        """Go on from a checkpoint, if there is one of the same runs; that their settings agree is known."""
        if state is None or state["seeds"] != [run.seed for run in self.runs]:
            return
        members: dict[str, Any] = state["members"]
        carried = {
            layer: Perturbation(*(part.to(self.device) for part in shift))
            for layer, shift in members.pop("carried").items()
        }
        stacks = {kind: {name: t.to(self.device) for name, t in tensors.items()} for kind, tensors in members.items()}
        self.members = Members(carried=carried, **stacks)
        self.place, self.rows = Place(**state["place"]), state["rows"]
        set_random_state(state["random"], self.device)


def _entry(stacked: Tensors, number: int) -> Tensors:
    return {name: tensor[number] for name, tensor in stacked.items()}
