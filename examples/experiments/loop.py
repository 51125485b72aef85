"""The runner: `train([settings])` runs a run, or goes on with one, and leaves its folder behind (see runs.py).

Runs that differ in their seed alone can be trained at the same time: `train(many)`. Until all of them have finished,
one checkpoint of all lies in the folder of the first. A checkpoint holds everything that the rest of the run depends
on, so a resumed run is the undisturbed one, bit for bit; it holds the settings too, and goes on with no others.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from apart_func import ApartError, split_state
from experiments import logs, ranks, runs
from experiments.datasets import DataSet, evaluation_batches, load_dataset, mix, steps_per_epoch, training_batches
from experiments.learner import Learner
from experiments.logs import Place, Progress, Show, learning_rate
from experiments.machine import Interrupted, Noted, noted_signals, prepared_device, random_state, set_random_state
from experiments.networks import NetworkError, drop_features, make_network
from experiments.ranks import Share
from experiments.runs import CheckpointError, State
from experiments.settings import Settings, SettingsError, as_json, decisive_only, differences, from_json
from experiments.splits import Split

SHOW_SECONDS = 0.2
EVALUATION_FACTOR = 4  # an evaluation batch needs less memory than a training batch of the same size
TOP5_CLASSES = 50  # from so many on, the error of the five best guesses is measured too


def train(many: Sequence[Settings], show: Show | None = None, *, resume: bool = True) -> list[str]:
    """Run a run to its end, or several that differ in their seed alone; those that were interrupted go on.

    Processes that torchrun has started take a run together. Those it starts again, after one was killed, go on with it.

    Returns:
        What there is to say of a run's end, see `harm`; of those that had come to it before, nothing.

    Raises:
        ValueError: the settings do not fit together; nothing has been written.
        Interrupted: SIGINT or SIGTERM came; a checkpoint was written.
        RunError, CheckpointError, NonFiniteError, OSError: see there. The checkpoints that are there are whole.
    """
    device = prepared_device(many[0].machine, many[0].training.amp)
    with ranks.joined(device):
        resume = resume or ranks.is_restarted()
        # Each looks at its folder, and may refuse it.
        if all(ranks.from_first(lambda: [runs.is_complete(run, resume) for run in many])):
            return []
        data, learner = prepared(many, device)
        with noted_signals() as noted, ExitStack() as stack:
            ranks.from_first(lambda: _begin(many, stack))
            told = show or (stack.enter_context(logs.progress_bar()) if ranks.is_first() else lambda progress: None)
            running = _Running(many, data, learner, told, noted)
            running.to_the_end()
        ends = [rows[-1]["train_loss"] for rows in running.place.rows]
        return list(filter(None, (runs.harm(run, loss, data.classes) for run, loss in zip(many, ends, strict=True))))


def _begin(many: Sequence[Settings], stack: ExitStack) -> None:
    for run in many:
        stack.enter_context(runs.held(run.out))
        runs.write_config(run)


def prepared(many: Sequence[Settings], device: torch.device) -> tuple[DataSet, Learner]:
    """Find the data and make the networks. Whatever does not fit is refused here, before there is a run."""
    settings = many[0]
    share = ranks.training_share(settings)
    data = load_dataset(settings.data)
    steps_per_epoch(data, settings.training.batch_size)  # refuses a batch that cannot be filled
    models = [ranks.synchronised(initial_network(run, data), settings, device).to(device) for run in many]
    if ranks.rank():
        torch.manual_seed(mix(settings.seed, ranks.rank()))  # what steps draw is each rank's own
    learner = Learner(models, many)
    if ranks.count() > 1:
        text = repr(decisive_only(settings)).encode()
        own = {
            "the settings": [torch.frombuffer(bytearray(text), dtype=torch.uint8)],
            "the training samples": [data.train.labels],
            "the values of params and buffers": models[0].state_dict().values(),
        }
        ranks.agree(own, "Start all with the same command, versions and data.")
    size = len(share.of(range(settings.training.batch_size)))
    blank = torch.zeros(size, *data.sample_shape), torch.zeros(size, dtype=torch.int64)
    try:
        learner.rehearse(blank)
    except ApartError as error:
        if ranks.count() == 1:
            raise
        raise SettingsError(f"of {ranks.count()} processes, each with {size} samples of a batch: {error}") from error
    except (RuntimeError, AssertionError) as error:
        problem = str(error).splitlines()[0]
        raise NetworkError(
            f"{settings.model.name} cannot take a step on {size} samples {data.sample_shape} of {data.name}: "
            f"{problem}. Choose another network, batch size or crop."
        ) from error
    return data, learner


def initial_network(settings: Settings, data: DataSet) -> nn.Module:
    """The network of a run before its first step. Torch's default generator is seeded, and goes on from there."""
    torch.manual_seed(settings.seed)
    model = make_network(settings.model.name, data, settings.model.width)
    return drop_features(model, settings.model.dropout) if settings.model.dropout else model


class _Running:
    """Runs under way."""

    def __init__(self, many: Sequence[Settings], data: DataSet, learner: Learner, show: Show, noted: Noted) -> None:
        self.runs, self.data, self.learner, self.show, self.noted = many, data, learner, show, noted
        self.training, self.machine, out = many[0].training, many[0].machine, many[0].out
        self.steps = steps_per_epoch(data, self.training.batch_size)
        self.total = self.steps * self.training.epochs
        self.is_single = len(many) == 1
        self.checkpoints = out / (runs.CHECKPOINTS if self.is_single else runs.TOGETHER)
        self.place = Place(sums=torch.zeros(len(many), 4, dtype=torch.float64), rows=[[] for _ in many])
        self._restore(ranks.from_first(lambda: runs.load_checkpoint(self.checkpoints)))
        self.share = ranks.training_share(many[0])
        workers = -(-self.machine.workers // ranks.on_this_machine())
        self.loading: dict[str, Any] = {"workers": workers, "pin_memory": learner.device.type == "cuda"}
        self.saved_at = self.shown_at = time.monotonic()
        self._write_metrics()

    @property
    def step(self) -> int:
        """Steps that every run has taken."""
        return self.place.epoch * self.steps + self.place.batch

    def to_the_end(self) -> None:
        """Train the epochs that are left, and write the networks."""
        while self.place.epoch < self.training.epochs:
            self._train_epoch()
            self._add_rows()
            self._tell()
            every = self.machine.checkpoint_epochs
            if every and self.place.epoch % every == 0:
                self._save()
        for number, run in enumerate(self.runs if ranks.is_first() else ()):
            runs.write_network(run.out, *split_state(self.learner.evaluated(number)))
        if not self.is_single:
            shutil.rmtree(self.checkpoints, ignore_errors=True)

    def _train_epoch(self) -> None:
        """Take the steps of the epoch that are left."""
        self.place.sums = self.place.sums.to(self.learner.device)
        size, augment, place = self.training.batch_size, self.runs[0].data.augment, self.place
        where = {"epoch": place.epoch, "first": place.batch, "share": self.share, **self.loading}
        each = [
            training_batches(self.data, batch_size=size, seed=run.seed, augment=augment, **where) for run in self.runs
        ]
        clock = time.perf_counter()
        while self.place.batch < self.steps:
            batches = [next(batches) for batches in each]
            self.place.waiting_seconds += time.perf_counter() - clock
            lr = learning_rate(self.training, self.step / self.total)
            self.place.sums += self.learner.train(batches, lr, self.place.epoch + 1, self.step + 1)
            self.place.batch += 1
            if time.monotonic() - self.shown_at > SHOW_SECONDS:
                self._tell()
            self._stop_or_save()
            before, clock = clock, time.perf_counter()
            self.place.seconds += clock - before

    def _add_rows(self) -> None:
        """Write down what the epoch came to. Errors are measured now, if it is their turn."""
        start = time.perf_counter()
        self.place = self._of_all_ranks()  # waits for the device
        self.place.seconds += time.perf_counter() - start
        new = []
        for number, run in enumerate(self.runs):
            start = time.perf_counter()
            due = (self.place.epoch + 1) % self.training.evaluate_every == 0
            errors = self._errors(number) if due or self.step == self.total else [None, None, None]
            measuring = time.perf_counter() - start
            new.append(logs.epoch_row(run, self.steps, self.place.of_run(number), errors, measuring))
            self._stop_or_save(is_measuring=True)
        self.place = Place(self.place.epoch + 1, sums=torch.zeros_like(self.place.sums), rows=self.place.rows)
        for rows, row in zip(self.place.rows, new, strict=True):
            rows.append(row)
        self._write_metrics()

    def _write_metrics(self) -> None:
        for run, rows in zip(self.runs, self.place.rows if ranks.is_first() else (), strict=False):
            logs.write_metrics(run.out / runs.METRICS, rows)

    def _errors(self, number: int) -> list[float | None]:
        """Errors on validation samples, where there are some, and on test samples, in percent; see `epoch_row`."""
        model = self.learner.evaluated(number).eval()
        validation = None if self.data.validation is None else self._error(model, self.data.validation)[0]
        errors = [validation, *self._error(model, self.data.test)]
        model.train()
        return errors

    def _error(self, model: nn.Module, split: Split) -> tuple[float, float | None]:
        """The share of samples whose best guess is wrong, and all five best guesses, in percent."""
        five = self.data.classes >= TOP5_CLASSES
        wrong = torch.zeros(2, dtype=torch.int64, device=self.learner.device)
        size = EVALUATION_FACTOR * self.training.batch_size
        each = Share(ranks.rank(), ranks.count())
        for samples, labels in evaluation_batches(self.data, split, batch_size=size, share=each, **self.loading):
            guesses = self.learner.scores(model, samples).topk(5 if five else 1, dim=1).indices
            misses = guesses != labels.to(guesses.device)[:, None]
            wrong += torch.stack([misses[:, 0].sum(), misses.all(dim=1).sum()])
            if ranks.count() == 1:  # ranks may have other numbers of batches
                self._stop_or_save(is_measuring=True)
        one, all_five = (100 * ranks.total(wrong).double() / len(split)).tolist()
        return one, all_five if five else None

    def _tell(self) -> None:
        """Show how the runs get on: in this epoch, or in the last one where this one has not begun."""
        place = self.place.of_run(0)
        if place.batch:
            loss, _, error = logs.means(place, self.training)
            speed: float | None = place.batch * self.training.batch_size / max(place.seconds, 1e-9)
        else:
            row = place.rows[0][-1]
            loss, error, speed = row["train_loss"], row["train_error"], row["images_per_second"]
        measured = [row for row in place.rows[0] if row["test_error"] is not None]
        last = measured[-1] if measured else {}
        errors = last.get("validation_error"), last.get("test_error")
        where = place.epoch, self.training.epochs, self.step, self.total
        self.show(Progress(self.runs[0].out, *where, loss, error, speed or 0.0, *errors))
        self.shown_at = time.monotonic()

    def _stop_or_save(self, is_measuring: bool = False) -> None:
        """Obey a signal, or the clock unless it is being measured: all ranks at once, whichever it came to."""
        is_late = time.monotonic() - self.saved_at > self.machine.checkpoint_seconds
        number, is_due = ranks.most(self.noted() or 0, is_late and not is_measuring)
        if number or is_due:
            self._save()
        if number:
            raise Interrupted(number)

    def _of_all_ranks(self) -> Place:
        """The place, with what all ranks have counted together."""
        sums = self.place.sums.clone()
        sums[:, logs.WRONG] = ranks.total(sums[:, logs.WRONG].contiguous()) / ranks.count()
        return replace(self.place, sums=sums.cpu())

    def _save(self) -> None:
        """Write a checkpoint of this moment, between two steps."""
        place, random = self._of_all_ranks(), ranks.gathered(random_state(self.learner.device))
        if ranks.is_first():
            settings, learner = [as_json(run) for run in self.runs], self.learner.state_dict()
            state = {"settings": settings, "place": vars(place), "learner": learner, "random": random}
            runs.save_checkpoint(self.checkpoints, self.step, state)
        self.saved_at = time.monotonic()

    def _restore(self, state: State | None) -> None:
        """Go on from a checkpoint, if there is one."""
        if state is None:
            return
        where = self.checkpoints
        try:
            stored = [from_json(each) for each in state["settings"]]
            if [run.seed for run in stored] != [run.seed for run in self.runs] and not self.is_single:
                return  # those that are trained together are now other ones
            changed = [line for pair in zip(self.runs, stored, strict=True) for line in differences(*pair)]
            if not changed:
                self.learner.load_state_dict(state["learner"])
                for random in state["random"][ranks.rank() :][:1]:  # a rank that is new draws as at its start
                    set_random_state(random, self.learner.device)
                self.place = Place(**state["place"])
        except (LookupError, TypeError, AttributeError, ValueError, RuntimeError) as error:
            raise CheckpointError(
                f"the checkpoint in {where} is none of this program ({type(error).__name__}: {error}). "
                "Delete the folder to start the run anew."
            ) from error
        if changed:
            listed = "".join(f"\n  {line}" for line in changed)
            raise CheckpointError(f"the checkpoint in {where} is that of another run: delete it, or mend{listed}")
