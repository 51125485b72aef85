"""Train a network plainly, with APART or one of its rivals: `python -m experiments train --data digits --out runs/x`.

The settings start from a preset, by default that of the data set, with what the method was published with: WRN-40-2 on
CIFAR, preact ResNet-18 on Tiny-ImageNet, ResNet-18 on ImageNet; SGD with momentum 0.9 at a learning rate of 0.1, which
falls tenfold at the milestones. One pass was not published, and starts from the rule that did best, with a radius that
suits it. Every other flag changes one setting.

OUT gets config.json, metrics.csv (a row an epoch), checkpoints, and in the end model.safetensors. A run that
was stopped, by Ctrl-C, SIGTERM or a power cut, goes on with the same command and --resume, and ends as if nothing had
happened.

The original's names of options are understood too: --dataset, --num_workers, -b, -eps, -g, -r.

On several GPUs or processes: `torchrun --nproc-per-node 2 -m experiments train ...`. They divide --batch-size, and the
first of them writes OUT. With torchrun's --max-restarts a run comes back by itself after a process was killed.
"""

from __future__ import annotations

import math
import shlex
import shutil
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Annotated, Any

import torch
import tyro
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from apart_func import ApartError, split_state
from experiments import machine, runs
from experiments.datasets import (
    DataSet,
    Share,
    Split,
    evaluation_batches,
    load_dataset,
    mix,
    steps_per_epoch,
    training_batches,
)
from experiments.machine import Interrupted, Noted, noted_signals, prepared_device, random_state, set_random_state
from experiments.methods import Learner
from experiments.networks import NetworkError, drop_features, make_network
from experiments.runs import CheckpointError, Place, Progress, Show, State
from experiments.settings import (
    DataName,
    Settings,
    SettingsError,
    as_json,
    decisive,
    differences,
    from_json,
    learning_rate,
    preset,
)

SHOW_SECONDS = 0.2
EVALUATION_FACTOR = 4  # an evaluation batch needs less memory than a training batch of the same size
TOP5_CLASSES = 50  # from so many on, the error of the five best guesses is measured too


def train(many: Sequence[Settings], show: Show | None = None, *, resume: bool = True) -> list[str]:
    """Train a run to its end, or several that differ in their seed alone; those that were interrupted go on.

    A checkpoint has the settings and all that the rest of a run depends on: a resumed run is the undisturbed one, bit
    for bit. Until several runs have finished, one checkpoint of all lies in the folder of the first. The processes that
    torchrun started take one run together; those that it starts again, after one was killed, go on with it.

    Returns:
        What there is to say of a run's end, see `harm`; of those that had come to it before, nothing.

    Raises:
        ValueError: the settings do not fit together; nothing has been written.
        Interrupted: SIGINT or SIGTERM came; a checkpoint was written.
        RunError, CheckpointError, NonFiniteError, OSError: see there. The checkpoints that are there are whole.
    """
    device = prepared_device(many[0].machine, many[0].training.amp)
    with machine.joined(device):
        resume = resume or machine.is_restarted()
        # Each looks at its folder, and may refuse it.
        if all(machine.from_first(lambda: [runs.is_complete(run, resume) for run in many])):
            return []
        data, learner = prepared(many, device)
        with noted_signals() as noted, ExitStack() as stack:
            machine.from_first(lambda: _begin(many, stack))
            told = show or (stack.enter_context(runs.progress_bar()) if machine.is_first() else lambda progress: None)
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
    share = training_share(settings)
    data = load_dataset(settings.data)
    steps_per_epoch(data, settings.training.batch_size)  # refuses a batch that cannot be filled
    models = [synchronised(initial_network(run, data), settings, device).to(device) for run in many]
    if machine.rank():
        torch.manual_seed(mix(settings.seed, machine.rank()))  # what steps draw is each rank's own
    learner = Learner(models, many)
    if machine.world_size() > 1:
        text = repr(decisive(settings)).encode()
        own = {
            "the settings": [torch.frombuffer(bytearray(text), dtype=torch.uint8)],
            "the training samples": [data.train.labels],
            "the values of params and buffers": models[0].state_dict().values(),
        }
        machine.check_ranks_agree(own, "Start all with the same command, versions and data.")
    size = len(share.of(range(settings.training.batch_size)))
    blank = torch.zeros(size, *data.sample_shape), torch.zeros(size, dtype=torch.int64)
    try:
        learner.rehearse(blank)
    except ApartError as error:
        if machine.world_size() == 1:
            raise
        processes = f"of {machine.world_size()} processes, each with {size} samples of a batch"
        raise SettingsError(f"{processes}: {error}") from error
    except (RuntimeError, AssertionError) as error:
        problem = str(error).splitlines()[0]
        raise NetworkError(
            f"{settings.model.name} cannot take a step on {size} samples {data.sample_shape} of {data.name}: "
            f"{problem}. Choose another network, batch size or crop."
        ) from error
    return data, learner


def training_share(settings: Settings) -> Share:
    """This rank's share of every training batch, if it can be divided."""
    size, ranks = settings.training.batch_size, machine.world_size()
    if size % ranks:
        raise SettingsError(f"a batch of {size} samples cannot be divided among {ranks} processes: choose a multiple.")
    return Share(machine.rank(), ranks, math.gcd(max(settings.method.groups, 1), size // ranks))


def synchronised(model: nn.Module, settings: Settings, device: torch.device) -> nn.Module:
    """The network with batch norm over all ranks, if the settings ask for it; some cannot be, and are refused."""
    choice = settings.training.sync_batch_norm
    if machine.world_size() == 1 or choice == "off" or (choice == "auto" and device.type != "cuda"):
        return model
    for name, layer in model.named_modules():
        if isinstance(layer, _BatchNorm) and type(layer) not in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d):
            kind = type(layer).__name__
            raise SettingsError(f"layer {name!r}, {kind}, cannot be synchronised: --sync-batch-norm off.")
    if settings.training.compile:
        raise SettingsError("a step with synchronised batch norm cannot be compiled: --sync-batch-norm off.")
    converted: nn.Module = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    return converted


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
        self._restore(machine.from_first(lambda: runs.load_checkpoint(self.checkpoints)))
        self.share = training_share(many[0])
        workers = -(-self.machine.workers // machine.local_world_size())
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
        for number, run in enumerate(self.runs if machine.is_first() else ()):
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
            new.append(runs.epoch_row(run, self.steps, self.place.of_run(number), errors, measuring))
            self._stop_or_save(is_measuring=True)
        self.place = Place(self.place.epoch + 1, sums=torch.zeros_like(self.place.sums), rows=self.place.rows)
        for rows, row in zip(self.place.rows, new, strict=True):
            rows.append(row)
        self._write_metrics()

    def _write_metrics(self) -> None:
        for run, rows in zip(self.runs, self.place.rows if machine.is_first() else (), strict=False):
            runs.write_metrics(run.out / runs.METRICS, rows)

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
        each = Share(machine.rank(), machine.world_size())
        for samples, labels in evaluation_batches(self.data, split, batch_size=size, share=each, **self.loading):
            guesses = self.learner.scores(model, samples).topk(5 if five else 1, dim=1).indices
            misses = guesses != labels.to(guesses.device)[:, None]
            wrong += torch.stack([misses[:, 0].sum(), misses.all(dim=1).sum()])
            if machine.world_size() == 1:  # ranks may have other numbers of batches
                self._stop_or_save(is_measuring=True)
        one, all_five = (100 * machine.sum_over_ranks(wrong).double() / len(split)).tolist()
        return one, all_five if five else None

    def _tell(self) -> None:
        """Show how the runs get on: in this epoch, or in the last one where this one has not begun."""
        place = self.place.of_run(0)
        if place.batch:
            loss, _, error = runs.means(place, self.training)
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
        number, is_due = machine.largest(self.noted() or 0, is_late and not is_measuring)
        if number or is_due:
            self._save()
        if number:
            raise Interrupted(number)

    def _of_all_ranks(self) -> Place:
        """The place, with what all ranks have counted together."""
        sums = self.place.sums.clone()
        sums[:, runs.WRONG] = machine.sum_over_ranks(sums[:, runs.WRONG].contiguous()) / machine.world_size()
        return replace(self.place, sums=sums.cpu())

    def _save(self) -> None:
        """Write a checkpoint of this moment, between two steps."""
        place, random = self._of_all_ranks(), machine.gathered(random_state(self.learner.device))
        if machine.is_first():
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
            changed = "".join(differences(*pair) for pair in zip(self.runs, stored, strict=True))
            if not changed:
                self.learner.load_state_dict(state["learner"])
                for random in state["random"][machine.rank() :][:1]:  # a rank that is new draws as at its start
                    set_random_state(random, self.learner.device)
                self.place = Place(**state["place"])
        except (LookupError, TypeError, AttributeError, ValueError, RuntimeError) as error:
            raise CheckpointError(
                f"the checkpoint in {where} is none of this program ({type(error).__name__}: {error}). "
                "Delete the folder to start again."
            ) from error
        if changed:
            raise CheckpointError(f"the checkpoint in {where} is that of another run: delete it, or mend{changed}")


@dataclass(frozen=True)
class Choice:
    """What decides where the settings start from."""

    data: str | None = None
    preset: str | None = None
    method: str | None = None
    rule: str | None = None


@dataclass(frozen=True)
class Command:
    """A command line."""

    settings: Annotated[Settings, tyro.conf.arg(name="")]
    # data set whose settings to start from; by default that of --data.
    preset: Annotated[DataName | None, tyro.conf.arg(metavar="DATA")] = None
    resume: tyro.conf.FlagCreatePairsOff[bool] = False  # go on with the run that is in OUT, if there is one.


def parse(arguments: Sequence[str]) -> Command:
    """Read a command line: the preset first, then what changes it."""
    choice, _ = tyro.cli(Choice, args=arguments, return_unknown_args=True, add_help=False)
    start = preset(choice.preset or choice.data or "digits", choice.method, choice.rule)
    return tyro.cli(
        Command,
        args=arguments,
        prog="python -m experiments train",
        default=Command(start),
        description=__doc__,
        config=(tyro.conf.OmitArgPrefixes,),
    )


# What the original calls some options. Its other names are those here, with - or _ between words.
ORIGINAL = {
    "--dataset": "--data",
    "--num_workers": "--workers",
    "--num-workers": "--workers",
    "-b": "--batch-size",
    "-eps": "--epsilon",
    "-g": "--groups",
    "-r": "--ratio",
}


def main(arguments: Sequence[str]) -> None:
    """Run the command."""
    parts = [argument.partition("=") for argument in arguments]
    arguments = [ORIGINAL.get(name, name) + equals + value for name, equals, value in parts]
    command = parse(arguments)
    out = command.settings.out
    start = f"{'python' if machine.launched() == 1 else 'torchrun ...'} -m experiments train"
    go_on = f"Go on with: {start} {shlex.join([*arguments, *([] if command.resume else ['--resume'])])}"
    try:
        messages = train([command.settings], resume=command.resume)
    except Interrupted as stop:
        stop.advice = f"a checkpoint is written. {go_on}"
        raise
    except KeyboardInterrupt:  # before training, or a second time, so that no step was waited for
        if not (out / runs.CONFIG).exists():
            sys.exit("stopped before anything was written: the same command starts the run.")
        newest = runs.checkpoints(out / runs.CHECKPOINTS)
        lost = f"what came after {newest[0].stem} is lost" if newest else "no checkpoint had been written"
        sys.exit(f"stopped; {lost}. {go_on}")
    if machine.is_first():
        for message in messages:
            plain = shlex.join([*arguments, "--method", "plain", "--out", f"{out}-plain"])  # the last of each counts
            print(f"warning: {message}\n  {start} {plain}", file=sys.stderr)
        print(runs.last_errors(out))
        print(f"Network: {out}/{runs.MODEL}, errors: {out}/{runs.METRICS}, settings: {out}/{runs.CONFIG}")
