"""The sweep over methods, radii and seeds: which runs there are, and that nothing is lost or done twice."""

from __future__ import annotations

import csv
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from experiments import sweep
from experiments.runs import COLUMNS, TIMING_COLUMNS, RunError
from experiments.settings import Settings
from experiments.sweep import Grid, SweepError, jobs_of, plan
from experiments.train import train as train_runs
from safetensors.torch import load_file

EXAMPLES = Path(sweep.__file__).parents[1]
SWEEP = [sys.executable, "-m", "experiments", "sweep"]
DIGITS = ["--data", "digits"]
TINY = [*DIGITS, "--epochs", "1", "--width", "2"]
METHODS = ("plain", "apart-eps0.1")


def train(settings: Settings) -> None:
    train_runs([settings], show=lambda progress: None)


def names(grid: Grid, options: list[str] = DIGITS) -> list[str]:
    return [run.name for run in plan(grid, options)]


# the grid


def test_every_method_is_run_at_its_radii_and_plain_training_at_its_factors_seed_after_seed():
    grid = Grid(methods=("plain", "apart", "sam", "apart_sam"), epsilons=(0, 0.1), seeds=2)
    for_a_seed = ["plain", "plain-2xepochs", "apart-eps0", "apart-eps0.1", "sam", "apart_sam-eps0", "apart_sam-eps0.1"]
    assert names(grid) == [f"{name}-seed{seed}" for seed in (0, 1) for name in for_a_seed]


def test_settings_are_what_the_names_say(tmp_path):
    runs = {run.name: run.settings for run in plan(Grid(seeds=1, epsilons=(0.3,), out=tmp_path), DIGITS)}
    plain, twice, apart = runs["plain-seed0"], runs["plain-2xepochs-seed0"], runs["apart-eps0.3-seed0"]
    assert (plain.method.name, apart.method.name, apart.method.epsilon) == ("plain", "apart", 0.3)
    assert twice.training.epochs == 2 * plain.training.epochs
    assert all(settings.seed == 0 and settings.out == tmp_path / name for name, settings in runs.items())


def test_options_that_are_not_the_sweep_s_go_to_every_run():
    options = [*DIGITS, "--lr", "0.03", "--workers", "3", "--train-samples", "100"]
    all_settings = [run.settings for run in plan(Grid(seeds=1), options)]
    assert {(each.training.lr, each.machine.workers, each.data.train_samples) for each in all_settings} == {
        (0.03, 3, 100)
    }


def test_any_option_can_be_varied_and_names_what_it_varies():
    grid = Grid(methods=("plain", "sam"), factors=(2,), seeds=1, vary=("epochs=3,5", "width=4,8"))
    assert names(grid)[:4] == [f"plain-epochs{e}-width{w}-2xepochs-seed0" for e in (3, 5) for w in (4, 8)]
    run = plan(grid, DIGITS)[3]
    assert (run.settings.training.epochs, run.settings.model.width) == (2 * 5, 8)


def test_a_run_that_two_ways_lead_to_is_one():
    grid = Grid(methods=("plain",), seeds=1, vary=("epochs=60,120",))
    assert names(grid) == ["plain-epochs60-seed0", "plain-epochs60-2xepochs-seed0", "plain-epochs120-2xepochs-seed0"]


def test_what_a_method_does_not_read_is_not_varied_for_it():
    grid = Grid(("plain", "apart", "sam"), seeds=1, factors=(1,), vary=("rho=0.1,0.2", "groups=2,4"))
    assert names(grid) == [
        "plain-seed0",
        "apart-eps0.1-groups2-seed0",
        "apart-eps0.1-groups4-seed0",
        "sam-rho0.1-seed0",
        "sam-rho0.2-seed0",
    ]


def test_epsilon_and_rule_are_those_of_one_pass_too_and_a_fraction_is_its_own():
    grid = Grid(("plain", "apart", "one_pass"), seeds=1, factors=(1,), vary=("rule=l2", "clean-fraction=0.25"))
    assert names(grid) == [
        "plain-seed0",
        "apart-eps0.1-rulel2-seed0",
        "one_pass-eps0.1-rulel2-clean-fraction0.25-seed0",
    ]


def test_seeds_of_a_run_are_trained_so_many_together():
    grid = Grid(("plain", "apart"), factors=(1,), seeds=5, together=2)
    groups = [[run.name for run in job.runs] for job in jobs_of(plan(grid, DIGITS), grid.together)]
    expected = [[f"{name}-seed{seed}" for seed in seeds] for seeds in ((0, 1), (2, 3), (4,)) for name in METHODS]
    assert groups == expected


def test_a_run_that_has_begun_by_itself_goes_on_by_itself(tmp_path):
    runs = plan(Grid(("plain",), factors=(1,), seeds=3, out=tmp_path), DIGITS)
    (tmp_path / "plain-seed1/checkpoints").mkdir(parents=True)
    assert [[run.settings.seed for run in job.runs] for job in jobs_of(runs, 3)] == [[0, 2], [1]]


def test_a_longer_run_costs_more_and_so_does_a_second_pass_over_half_of_the_batch():
    grid = Grid(("plain", "one_pass", "apart"), seeds=1)
    costs = {run.name: run.passes for run in plan(grid, [*DIGITS, "--epochs", "10", "--ratio", "0.5"])}
    one_pass = {"one_pass-eps0.1-seed0": 10, "one_pass-eps0.1-2xepochs-seed0": 20}
    assert costs == {"plain-seed0": 10, "plain-2xepochs-seed0": 20, **one_pass, "apart-eps0.1-seed0": 15}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seeds": 0}, "--seeds must be 1 or more, not 0"),
        ({"processes": 0}, "--processes must be 1 or more, not 0"),
        ({"together": 0}, "--together must be 1 or more, not 0"),
        ({"factors": (1, 0)}, "--factors must be 1 or more, not 0"),
        ({"vary": ("lr",)}, "--vary lr: expected .* as in lr=0.05,0.1"),
        ({"vary": ("lr=0.1,",)}, "--vary lr=0.1,: expected"),
        ({"vary": ("seed=1,2",)}, "--vary seed=1,2: .*the sweep itself sets .*--seed"),
        ({"methods": ()}, "--methods, --epsilons and --factors need one value or more"),
    ],
)
def test_a_grid_without_runs_is_refused(changes, message):
    with pytest.raises(SweepError, match=message):
        Grid(**changes)


@pytest.mark.parametrize("option", ["--seed", "--method", "--epsilon=0.2"])
def test_an_option_that_the_sweep_sets_is_refused(option):
    with pytest.raises(SweepError, match=rf"{option.partition('=')[0]} is set by the sweep: use --methods"):
        plan(Grid(), [*DIGITS, option])


# training


def metrics(run: Path) -> list[dict[str, str]]:
    """What a run measured, but for its times."""
    with (run / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    return [{name: value for name, value in row.items() if name not in TIMING_COLUMNS} for row in rows]


def written(out: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}


def test_a_worker_forgets_the_graphs_of_its_earlier_runs(tmp_path, monkeypatch):
    """Dynamo makes eight of a function, and would refuse the ninth run."""
    done = []
    monkeypatch.setattr(torch.compiler, "reset", lambda: done.append("reset"))
    monkeypatch.setattr(sweep, "train", lambda settings, show: done.append("train"))
    for run in plan(Grid(methods=("plain",), seeds=2, factors=(1,), out=tmp_path), DIGITS):
        assert sweep.train_job(sweep.Job((run,))) is None
    assert done == ["reset", "train"] * 2


def test_a_sweep_trains_what_train_would_and_does_nothing_twice(tmp_path, capsys):
    grid = Grid(seeds=1, factors=(1,), processes=1, out=tmp_path / "swept")
    sweep.run(grid, TINY)
    for run in plan(replace(grid, out=tmp_path / "alone"), TINY):
        train(run.settings)
        assert metrics(grid.out / run.name) == metrics(run.settings.out)

    before = written(grid.out)
    sweep.run(grid, TINY)
    assert f"2 runs in {grid.out}, 2 of them finished" in capsys.readouterr().out
    assert written(grid.out) == before


def test_runs_that_were_trained_together_look_like_any_others(tmp_path, capsys, in_this_process):
    grid = Grid(("apart",), seeds=3, processes=1, together=2, out=tmp_path / "swept")
    sweep.run(grid, TINY)
    for run in plan(replace(grid, out=tmp_path / "alone"), TINY):
        train(run.settings)
        together, alone = grid.out / run.name, run.settings.out
        assert {path.name for path in together.iterdir()} == {path.name for path in alone.iterdir()}
        (ours,), (theirs,) = metrics(together), metrics(alone)
        assert ours.keys() == theirs.keys() == set(COLUMNS) - set(TIMING_COLUMNS)
        assert float(ours["train_loss"]) == pytest.approx(float(theirs["train_loss"]), rel=1e-4)

    before = written(grid.out)
    sweep.run(replace(grid, together=3), TINY)
    assert "3 runs in" in capsys.readouterr().out
    assert written(grid.out) == before


def test_seeds_that_cannot_be_trained_together_say_what_to_do(tmp_path, capsys, in_this_process):
    with pytest.raises(SystemExit):
        sweep.run(
            Grid(("plain",), factors=(1,), seeds=2, together=2, processes=1, out=tmp_path), [*TINY, "--clip", "1"]
        )
    printed = capsys.readouterr().out
    assert "failed: plain-seed0 and 1 more: SettingsError: runs with clip 1.0 cannot be trained together" in printed
    assert "alone: the same command with --together 1" in printed


def test_a_run_that_fails_is_named_and_the_others_finish(tmp_path, capsys, in_this_process):
    grid = Grid(("apart", "plain"), seeds=1, factors=(1,), processes=1, out=tmp_path)
    with pytest.raises(SystemExit) as stopped:
        sweep.run(grid, [*TINY, "--groups", "5"])
    assert stopped.value.code == 1
    printed = capsys.readouterr().out
    assert re.search(r"failed: apart-eps0.1-seed0: \w+: groups=5 does not divide", printed)
    assert f"experiments train {' '.join(TINY)} --groups 5 --method apart" in printed
    assert (tmp_path / "plain-seed0/model.safetensors").exists()


def test_a_folder_of_other_settings_is_refused_before_anything_is_trained(tmp_path):
    run = plan(Grid(seeds=1, out=tmp_path), TINY)[0]
    train(run.settings)
    before = written(tmp_path)
    with pytest.raises(RunError, match="other settings"):
        sweep.run(Grid(seeds=1, out=tmp_path), [*TINY, "--lr", "0.5"])
    assert written(tmp_path) == before


@pytest.mark.slow
def test_a_sweep_that_was_stopped_and_then_killed_goes_on_to_the_same_results(tmp_path, in_this_process):
    options = [*DIGITS, "--epochs", "20", "--checkpoint-epochs", "1"]
    grid = Grid(seeds=2, factors=(1,), out=tmp_path / "stopped")
    command = [*SWEEP, "--seeds", "2", "--factors", "1", "--out", str(grid.out), *options]

    def epochs() -> int:
        return sum(len(metrics(path.parent)) for path in grid.out.glob("*/metrics.csv"))

    for kind in (signal.SIGINT, signal.SIGKILL):
        before = epochs()
        process = subprocess.Popen(command, cwd=EXAMPLES, stdout=subprocess.DEVNULL)
        deadline = time.monotonic() + 120
        while epochs() < before + 5:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        os.kill(process.pid, kind)
        assert process.wait(timeout=60) != 0
        time.sleep(0.5)  # a worker sees that its parent has gone
        left = written(grid.out)
        time.sleep(1)
        assert written(grid.out) == left, "workers train on without their parent"
    assert any(not (path.parent / "model.safetensors").exists() for path in grid.out.glob("*/config.json"))

    sweep.run(grid, options)
    for run in plan(replace(grid, out=tmp_path / "undisturbed"), options):
        train(run.settings)
        assert metrics(grid.out / run.name) == metrics(run.settings.out)
        ours, theirs = (load_file(folder / "model.safetensors") for folder in (grid.out / run.name, run.settings.out))
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
