"""Train a grid of methods, radii, settings and seeds over the cores: `python -m experiments sweep --data digits ...`.

Every run is a command line of `train`: options that are not listed here go to it as they are (`train --help`).
Runs that have finished are passed over and interrupted ones go on, so the same command starts a sweep, continues it,
and extends it by further seeds or radii. What a method does not read is not varied for it: ε is APART's, ρ is SAM's.
With --together 20, as many seeds of a run are trained at the same time, which pays where networks are tiny.
"""

from __future__ import annotations

import itertools
import os
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
import tyro
from rich.progress import Progress

from experiments.machine import Interrupted, run_in_workers, tell
from experiments.runs import CHECKPOINTS, is_complete
from experiments.settings import METHODS, PASSES, READ_BY, MethodName, Settings, passes_per_epoch
from experiments.train import parse, train

SHORT = {"epsilon": "eps"}  # in the names of folders
# For as many passes as other methods take, these can run twice as long.
ONE_PASS_METHODS = tuple(name for name, passes in PASSES.items() if len(passes) == 1)
OWN = ("--method", "--epsilon", "--seed", "--out", "--resume")  # options of train that the sweep sets


class SweepError(ValueError):
    """The grid cannot be trained: what was given, and what would do."""


@dataclass(frozen=True)
class Grid:
    """What is varied. All other options are those of train, and go to every run."""

    methods: tuple[MethodName, ...] = ("plain", "apart")  # what is trained.
    # radii ε of APART, in two passes, one or with SAM; 0 is the control without perturbation.
    epsilons: tuple[float, ...] = (0.1,)
    seeds: int = 5  # runs of each.
    factors: tuple[int, ...] = (1, 2)  # methods of one pass run for these multiples of the epochs.
    vary: tuple[str, ...] = ()  # further options of train and their values, as in `lr=0.05,0.1 rho=0.05,0.1`.
    processes: int = 2  # that train at the same time, with one thread each; --workers load data for each.
    together: int = 1  # seeds of a run that one process trains at the same time.
    out: Path = Path("runs/sweep")  # folder of the run folders.

    def __post_init__(self) -> None:
        if not (self.methods and self.epsilons and self.factors):
            raise SweepError("--methods, --epsilons and --factors need one value or more")
        counts = {"seeds": self.seeds, "processes": self.processes, "together": self.together}
        for name, count in {**counts, "factors": min(self.factors)}.items():
            if count < 1:
                raise SweepError(f"--{name} must be 1 or more, not {count}")
        for axis in self.vary:
            name, _, values = axis.partition("=")
            if f"--{name}" in OWN or not all((name, *values.split(","))):
                raise SweepError(
                    f"--vary {axis}: expected an option of train and its values, as in lr=0.05,0.1; "
                    f"the sweep itself sets {', '.join(OWN)}"
                )


class Planned(NamedTuple):
    """A run of the sweep."""

    name: str
    arguments: list[str]
    settings: Settings

    @property
    def passes(self) -> float:
        """Forward-backward passes over the training data: what it costs."""
        return self.settings.training.epochs * passes_per_epoch(self.settings)


def plan(grid: Grid, options: Sequence[str]) -> list[Planned]:
    """All runs of a sweep. Seed comes after seed, so that an unfinished sweep has full pairs."""
    own = [name for name in (option.partition("=")[0] for option in options) if name in OWN]
    if own:
        raise SweepError(f"{own[0]} is set by the sweep: use --methods, --epsilons, --seeds")
    runs = [
        planned_run(grid.out, method, chosen, factor, seed, options)
        for seed in range(grid.seeds)
        for method in grid.methods
        for chosen in choices(grid, method)
        for factor in (grid.factors if method in ONE_PASS_METHODS else (1,))
    ]
    # Twice 60 epochs and once 120 are one run.
    different = {replace(run.settings, out=grid.out): run for run in reversed(runs)}
    return list(reversed(different.values()))


def choices(grid: Grid, method: str) -> Iterator[dict[str, str]]:
    """Every combination of the values that concern a method: those of options that it reads."""
    axes = {"epsilon": [f"{epsilon:g}" for epsilon in grid.epsilons]}
    for axis in grid.vary:
        name, _, values = axis.partition("=")
        axes[name] = values.split(",")
    own = [name for name in axes if method in READ_BY.get(f"method.{name.replace('-', '_')}", METHODS)]
    for chosen in itertools.product(*(axes[name] for name in own)):
        yield dict(zip(own, chosen, strict=True))


def planned_run(
    out: Path, method: str, chosen: Mapping[str, str], factor: int, seed: int, options: Sequence[str]
) -> Planned:
    """One run."""
    marks = [f"{SHORT.get(name, name)}{value.replace('/', '_')}" for name, value in chosen.items()]
    name = "-".join([method, *marks, *([f"{factor}xepochs"] if factor > 1 else []), f"seed{seed}"])
    arguments = [*options, "--method", method, "--seed", str(seed), "--out", str(out / name)]
    arguments += [part for option, value in chosen.items() for part in (f"--{option}", value)]
    settings = parse(arguments).settings
    if factor > 1:
        arguments += ["--epochs", str(factor * settings.training.epochs)]
        settings = parse(arguments).settings
    return Planned(name, arguments, settings)


class Job(NamedTuple):
    """What a worker does at a time: one run, or several that differ in their seed alone."""

    runs: tuple[Planned, ...]

    @property
    def name(self) -> str:
        """As in `apart-eps0.1-seed3`, or `apart-eps0.1-seed3 and 4 more`."""
        others = len(self.runs) - 1
        return self.runs[0].name + (f" and {others} more" if others else "")


def jobs_of(runs: Sequence[Planned], together: int) -> list[Job]:
    """Put the runs together that differ in their seed alone. A run that has begun by itself goes on by itself."""
    alike: dict[object, list[Planned]] = {}
    for run in runs:
        is_alone = together == 1 or (run.settings.out / CHECKPOINTS).exists()
        alike.setdefault(run.name if is_alone else replace(run.settings, seed=0, out=Path()), []).append(run)
    starts = [(group, start) for group in alike.values() for start in range(0, len(group), together)]
    jobs = [Job(tuple(group[start : start + together])) for group, start in starts]
    return sorted(jobs, key=lambda job: runs.index(job.runs[0]))


def train_job(job: Job) -> str | None:
    """Train runs from where they stand, in a worker."""
    settings = [run.settings for run in job.runs]
    torch.compiler.reset()  # the graphs of a worker's earlier runs count against Dynamo's limit
    try:
        train(settings, show=lambda progress: tell((job.name, progress.step / progress.steps)))
        tell((job.name, 1.0))
    except Interrupted:
        os._exit(1)  # a worker that lived on would be given the next job
    except Exception as error:  # of any kind: it is told at the end
        return f"{type(error).__name__}: {error}"
    return None


def train_all(jobs: Sequence[Job], processes: int) -> dict[str, str]:
    """Do all jobs, under a bar over the passes that all take; return what went wrong, by job."""
    passes = {job.name: sum(run.passes for run in job.runs) for job in jobs}
    done = dict.fromkeys(passes, 0.0)
    with Progress(expand=True, speed_estimate_period=600) as progress:
        task = progress.add_task("", total=sum(passes.values()))

        def show(news: list[tuple[str, float]]) -> None:
            done.update(news)
            finished = sum(share == 1 for share in done.values())
            completed = sum(passes[name] * share for name, share in done.items())
            progress.update(task, completed=completed, description=f"{finished} of {len(jobs)} jobs")

        problems = run_in_workers(train_job, jobs, processes, show)
    return {job.name: problem for job, problem in zip(jobs, problems, strict=True) if problem is not None}


def run(grid: Grid, options: Sequence[str]) -> None:
    """Train what is left of a sweep; the program ends with status 1 if a run failed."""
    runs = plan(grid, options)
    left = [run for run in runs if not is_complete(run.settings, resume=True)]
    print(f"{len(runs)} runs in {grid.out}, {len(runs) - len(left)} of them finished")
    jobs = jobs_of(left, grid.together)
    problems = train_all(jobs, grid.processes)
    for job in jobs:
        if job.name in problems:
            print(f"failed: {job.name}: {problems[job.name]}")
            alone = f"python -m experiments train {shlex.join(job.runs[0].arguments)} --resume"
            print(f"  alone: {alone if len(job.runs) == 1 else 'the same command with --together 1'}")
    if problems:
        sys.exit(1)
    print(f"Next: python -m experiments report {grid.out}")


def main(arguments: Sequence[str]) -> None:
    """Run the command."""
    prog = "python -m experiments sweep"
    run(*tyro.cli(Grid, args=arguments, prog=prog, description=__doc__, return_unknown_args=True))
