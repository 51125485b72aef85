"""Train a grid of methods, radii, settings and seeds over the cores: `python examples/sweep.py --data digits ...`.

Every run is a command line of `train.py`: options that are not listed here go to it as they are (`train.py --help`).
Runs that have finished are passed over and interrupted ones go on, so the same command starts a sweep, continues it,
and extends it by further seeds or radii. What a method does not read is not varied for it: ε is APART's, ρ is SAM's.
With --together 20, as many seeds of a run are trained at the same time, which pays where networks are tiny.
"""

from __future__ import annotations

import itertools
import os
import shlex
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import tyro
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from train import parse
from training.interrupts import Interrupted
from training.loop import CHECKPOINTS, RunError, is_complete, train
from training.runs import METHODS, READ_BY, decisive_settings, passes_per_epoch
from training.settings import MethodName, Settings, SettingsError
from training.together import train_together
from workers import run_in_workers, tell

SHORT = {"epsilon": "eps"}  # in the names of folders
ONE_PASS_METHODS = ("plain", "one_pass")  # for as many passes as other methods take, they can run twice as long
OWN = ("--method", "--epsilon", "--seed", "--out", "--resume")  # options of train.py that the sweep sets


class SweepError(ValueError):
    """The grid cannot be trained: what was given, and what would do."""


@dataclass(frozen=True)
class Grid:
    """What is varied. All other options are those of train.py, and go to every run.

    Attributes:
        methods: what is trained.
        epsilons: radii ε of APART and APART-SAM; 0 is the control of two passes without perturbation.
        seeds: runs of each.
        first_seed: their seeds count from here. Choose settings with other seeds than the result's.
        factors: plain training, and APART in one pass, run for these multiples of the epochs.
        vary: further options of train.py and their values, as in `lr=0.05,0.1 rho=0.05,0.1`.
        workers: processes that train at the same time, with one thread each.
        together: seeds of a run that one process trains at the same time, on bundled data; without TensorBoard files.
        out: folder of the run folders.
    """

    methods: tuple[MethodName, ...] = ("plain", "apart")
    epsilons: tuple[float, ...] = (0.1,)
    seeds: int = 5
    first_seed: int = 0
    factors: tuple[int, ...] = (1, 2)
    vary: tuple[str, ...] = ()
    workers: int = 2
    together: int = 1
    out: Path = Path("runs/sweep")

    def __post_init__(self) -> None:
        """Refuse a grid without runs, and axes that are none."""
        if not (self.methods and self.epsilons and self.factors):
            raise SweepError("--methods, --epsilons and --factors need one value or more")
        counts = {"seeds": self.seeds, "workers": self.workers, "together": self.together}
        counts["factors"] = min(self.factors)
        for name, count in counts.items():
            if count < 1:
                raise SweepError(f"--{name} must be 1 or more, not {count}")
        for axis in self.vary:
            name, _, values = axis.partition("=")
            if f"--{name}" in OWN or not all((name, *values.split(","))):
                raise SweepError(
                    f"--vary {axis}: expected an option of train.py and its values, as in lr=0.05,0.1; "
                    f"the sweep itself sets {', '.join(OWN)}"
                )


class Planned(NamedTuple):
    """A run of the sweep.

    Attributes:
        name: of its folder.
        arguments: of train.py, all of them.
        settings: what train.py reads from them.
    """

    name: str
    arguments: list[str]
    settings: Settings

    @property
    def passes(self) -> float:
        """Forward-backward passes over the training data: what it costs."""
        return self.settings.training.epochs * passes_per_epoch(decisive_settings(self.settings))


def plan(grid: Grid, options: Sequence[str]) -> list[Planned]:
    """All runs of a sweep. Seed comes after seed, so that an unfinished sweep has full pairs.

    Args:
        grid: what is varied.
        options: of train.py, for every run.

    Returns:
        The runs, all different.

    Raises:
        SweepError: an option is the sweep's to set.
    """
    own = [name for name in (option.partition("=")[0] for option in options) if name in OWN]
    if own:
        raise SweepError(f"{own[0]} is set by the sweep: use --methods, --epsilons, --seeds, --first-seed")
    seeds = range(grid.first_seed, grid.first_seed + grid.seeds)
    runs = [
        planned_run(grid.out, method, chosen, factor, seed, options)
        for seed in seeds
        for method in grid.methods
        for chosen in choices(grid, method)
        for factor in (grid.factors if method in ONE_PASS_METHODS else (1,))
    ]
    # Twice 60 epochs and once 120 are one run.
    different = {replace(run.settings, out=grid.out): run for run in reversed(runs)}
    return list(reversed(different.values()))


def choices(grid: Grid, method: str) -> Iterator[dict[str, str]]:
    """Every combination of the values that concern a method.

    Args:
        grid: what is varied.
        method: one of its methods.

    Yields:
        Options of train.py, without their dashes, and their values.
    """
    axes = {"epsilon": [f"{epsilon:g}" for epsilon in grid.epsilons]}
    for axis in grid.vary:
        name, _, values = axis.partition("=")
        axes[name] = values.split(",")
    own = {name: values for name, values in axes.items() if method in _readers(name)}
    for chosen in itertools.product(*own.values()):
        yield dict(zip(own, chosen, strict=True))


def _readers(option: str) -> Collection[str]:
    """The methods that an option of train.py concerns."""
    return READ_BY.get(f"method.{option.replace('-', '_')}", METHODS)


def planned_run(
    out: Path, method: str, chosen: Mapping[str, str], factor: int, seed: int, options: Sequence[str]
) -> Planned:
    """One run.

    Args:
        out: folder of the run folders.
        method: of the run.
        chosen: further options by which it differs from other runs.
        factor: multiple of the epochs.
        seed: of the run.
        options: of train.py that all runs share.

    Returns:
        The run, named after what sets it apart, as in `apart-eps0.1-seed3`.
    """
    marks = [f"{SHORT.get(name, name)}{value.replace('/', '_')}" for name, value in chosen.items()]
    name = "-".join([method, *marks, *([f"{factor}xepochs"] if factor > 1 else []), f"seed{seed}"])
    arguments = [*options, "--method", method, "--seed", str(seed), "--out", str(out / name)]
    for option, value in chosen.items():
        arguments += [f"--{option}", value]
    settings = parse(arguments).settings
    if factor > 1:
        arguments += ["--epochs", str(factor * settings.training.epochs)]
        settings = parse(arguments).settings
    return Planned(name, arguments, settings)


class Job(NamedTuple):
    """What a worker does at a time: one run, or several that differ in their seed alone.

    Attributes:
        runs: all of them.
    """

    runs: tuple[Planned, ...]

    @property
    def name(self) -> str:
        """As in `apart-eps0.1-seed3`, or `apart-eps0.1-seed3 and 4 more`."""
        others = len(self.runs) - 1
        return self.runs[0].name + (f" and {others} more" if others else "")

    @property
    def passes(self) -> float:
        """What it costs; see `Planned`."""
        return sum(run.passes for run in self.runs)


def jobs_of(runs: Sequence[Planned], together: int) -> list[Job]:
    """Put the runs together that differ in their seed alone. A run that has begun by itself goes on by itself.

    Args:
        runs: what there is to do.
        together: how many at most are one job.

    Returns:
        The jobs, in the order of their first runs.
    """
    alike: dict[object, list[Planned]] = {}
    for run in runs:
        is_alone = together == 1 or (run.settings.out / CHECKPOINTS).exists()
        alike.setdefault(run.name if is_alone else replace(run.settings, seed=0, out=Path()), []).append(run)
    jobs = [
        Job(tuple(group[start : start + together]))
        for group in alike.values()
        for start in range(0, len(group), together)
    ]
    return sorted(jobs, key=lambda job: runs.index(job.runs[0]))


def train_job(job: Job) -> str | None:
    """Train runs from where they stand, in a worker.

    Args:
        job: what is trained.

    Returns:
        What went wrong, if anything did: other jobs need not suffer from it.
    """
    settings = [run.settings for run in job.runs]
    try:
        if len(settings) > 1:
            train_together(settings, show=lambda share: tell((job.name, share)))
            tell((job.name, 1.0))
        else:
            train(settings[0], show=lambda progress: tell((job.name, progress.step / progress.steps)))
    except Interrupted:
        os._exit(1)  # a worker that lived on would be given the next job
    except Exception as error:  # of any kind: it is told at the end
        return f"{type(error).__name__}: {error}"
    return None


def train_all(jobs: Sequence[Job], workers: int) -> dict[str, str]:
    """Do all jobs, under a progress bar.

    Args:
        jobs: what is trained.
        workers: how many at a time.

    Returns:
        For each job that failed, what went wrong.
    """
    with progress_bar(jobs) as show:
        problems = run_in_workers(train_job, jobs, workers, show)
    return {job.name: problem for job, problem in zip(jobs, problems, strict=True) if problem is not None}


@contextmanager
def progress_bar(jobs: Sequence[Job]) -> Iterator[Callable[[list[tuple[str, float]]], None]]:
    """A bar over all jobs, with the time left.

    Args:
        jobs: what there is to do.

    Yields:
        A function that takes (name of a job, share of it that is done) pairs and moves the bar.
    """
    columns = (
        BarColumn(bar_width=None),
        TaskProgressColumn(),
        TimeRemainingColumn(elapsed_when_finished=True),
        TextColumn("{task.description}"),
    )
    passes = {job.name: job.passes for job in jobs}
    runs = {job.name: len(job.runs) for job in jobs}
    done = dict.fromkeys(passes, 0.0)
    with Progress(*columns, expand=True, speed_estimate_period=600) as progress:
        task = progress.add_task("", total=sum(passes.values()))

        def show(news: list[tuple[str, float]]) -> None:
            done.update(news)
            running = [name for name, share in done.items() if 0 < share < 1]
            finished = sum(runs[name] for name, share in done.items() if share == 1)
            progress.update(
                task,
                completed=sum(passes[name] * share for name, share in done.items()),
                description=", ".join([f"{finished} of {sum(runs.values())} runs", *running]),
            )

        show([])
        yield show


def main(grid: Grid, options: Sequence[str]) -> None:
    """Train what is left of a sweep.

    Args:
        grid: what is varied.
        options: of train.py, for every run.

    Raises:
        RunError: a folder holds another run than the sweep wants there.
        SystemExit: with status 1, if a run failed.
    """
    runs = plan(grid, options)
    left = [run for run in runs if not is_complete(run.settings, resume=True)]
    print(f"{len(runs)} runs in {grid.out}, {len(runs) - len(left)} of them finished")
    jobs = jobs_of(left, grid.together)
    problems = train_all(jobs, grid.workers)
    for job in jobs:
        if job.name in problems:
            print(f"failed: {job.name}: {problems[job.name]}")
            alone = f"python examples/train.py {shlex.join(job.runs[0].arguments)} --resume"
            print(f"  alone: {alone if len(job.runs) == 1 else 'the same command with --together 1'}")
    if problems:
        sys.exit(1)
    print(f"Next: python examples/report.py {grid.out}")


if __name__ == "__main__":
    try:
        main(*tyro.cli(Grid, description=__doc__, return_unknown_args=True))
    except (SweepError, RunError, SettingsError) as error:
        sys.exit(f"error: {error}")
    except BrokenProcessPool:
        sys.exit("error: a worker was killed, by hand or for want of memory. The same command goes on.")
    except KeyboardInterrupt:
        sys.exit("stopped: the same command goes on.")
