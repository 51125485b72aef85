"""Seeds trained together: every run is what it would be by itself, and nothing is lost on the way to its end."""

from __future__ import annotations

import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from experiments import methods
from experiments import train as training
from experiments.machine import Interrupted
from experiments.methods import NonFiniteError
from experiments.runs import COLUMNS, TIMING_COLUMNS, TOGETHER
from experiments.settings import PRESETS, DataSettings, Settings, SettingsError
from experiments.train import train
from folders_on_disk import write_cifar10
from safetensors.torch import load_file
from test_train import outcome, rows, stop_at

SEEDS = (0, 3, 4)


@pytest.fixture(autouse=True)
def told_every_step(monkeypatch):
    monkeypatch.setattr(training, "SHOW_SECONDS", 0)


def tiny(out: Path, seeds: tuple[int, ...] = SEEDS, **changes: Any) -> list[Settings]:
    """Runs of two epochs of four steps on digits. Changes are the method's, or the training's."""
    settings = PRESETS["digits"]
    method = {name: value for name, value in changes.items() if hasattr(settings.method, name)}
    training = {name: value for name, value in changes.items() if name not in method}
    settings = replace(
        settings,
        model=replace(settings.model, width=4),
        method=replace(settings.method, **method),
        training=replace(settings.training, **{"epochs": 2, "lr": 0.01, **training}),
    )
    return [replace(settings, seed=seed, out=out / f"seed{seed}") for seed in seeds]


def quietly(runs: list[Settings]) -> None:
    train(runs, show=lambda progress: None)


def interrupted(runs: list[Settings], step: int) -> None:
    with pytest.raises(Interrupted, match="SIGTERM"):
        train(runs, stop_at(step))


# what becomes of a run


METHODS = {
    "plain": {"name": "plain"},
    "sam": {"name": "sam"},
    "apart": {"name": "apart"},
    "apart_sam": {"name": "apart_sam"},
    "one_pass": {"name": "one_pass"},
    "l2": {"name": "apart", "rule": "l2"},
    "one_pass, l2": {"name": "one_pass", "rule": "l2", "clean_fraction": 0.25},
    "label smoothing": {"name": "plain", "label_smoothing": 0.1},
    "half of the batch": {"name": "apart", "ratio": 0.5},
}


@pytest.mark.parametrize("changes", METHODS.values(), ids=METHODS)
def test_a_run_is_what_it_would_be_by_itself(changes, tmp_path):
    runs = tiny(tmp_path / "together", **changes)
    quietly(runs)
    for run in runs:
        alone = replace(run, out=tmp_path / f"alone{run.seed}")
        train([alone], show=lambda progress: None)
        ours, theirs = load_file(run.out / "model.safetensors"), load_file(alone.out / "model.safetensors")
        assert ours.keys() == theirs.keys()
        for name, tensor in theirs.items():
            # Sums are taken in another order, and eight steps amplify their rounding. A sign of a gradient near zero
            # may turn, which is rare in so few steps, and moves a weight by far more than this.
            torch.testing.assert_close(ours[name], tensor, rtol=1e-3, atol=1e-4)
        for row, expected in zip(rows(run.out), rows(alone.out), strict=True):
            assert tuple(row) == COLUMNS
            for column in COLUMNS:
                if column not in TIMING_COLUMNS:
                    is_error = column.endswith("error")  # one image of 256 may fall to the other side
                    value = float(expected[column] or "nan")
                    assert float(row[column] or "nan") == pytest.approx(
                        value, rel=1e-3, abs=0.4 if is_error else 0, nan_ok=True
                    )


@pytest.mark.parametrize("method", ["apart", "one_pass"])
def test_every_run_draws_random_signs_of_its_own(method, tmp_path, monkeypatch):
    drawn = []
    make_step = methods.make_step

    def make_observed_step(*arguments: Any) -> Any:
        step = make_step(*arguments)

        def observed(*inputs: Any) -> Any:
            out, carried = step(*inputs)
            signs = out.perturbation.get("stem.1")
            if signs is not None and torch._C._functorch.is_batchedtensor(signs.mean):
                drawn.append(torch._C._functorch.get_unwrapped(signs.mean))
            return out, carried

        return observed

    monkeypatch.setattr(methods, "make_step", make_observed_step)
    quietly(tiny(tmp_path, name=method, rule="random_sign", epochs=1))
    assert len(drawn) == 4
    for signs in drawn:
        assert len(signs) == len(SEEDS)
        assert not all(torch.equal(signs[0], others) for others in signs)


def test_images_are_varied_for_every_run_as_they_are_by_itself(tmp_path):
    data = DataSettings("cifar10", write_cifar10(tmp_path, per_file=16), train_samples=64)
    runs = [replace(run, data=data) for run in tiny(tmp_path / "together", name="plain", epochs=1, batch_size=16)]
    quietly(runs)
    for run in runs:
        train([replace(run, out=tmp_path / f"alone{run.seed}")], show=lambda progress: None)
        (ours,), (theirs,) = rows(run.out), rows(tmp_path / f"alone{run.seed}")
        assert float(ours["train_loss"]) == pytest.approx(float(theirs["train_loss"]), rel=1e-4)


def test_a_run_tells_its_folder_s_story_as_train_does(tmp_path):
    (run, *_) = runs = tiny(tmp_path / "together", name="plain", epochs=3, evaluate_every=2)
    quietly(runs)
    train([replace(run, out=tmp_path / "alone")], show=lambda progress: None)
    assert {path.name for path in run.out.iterdir()} == {path.name for path in (tmp_path / "alone").iterdir()}
    assert [bool(row["test_error"]) for row in rows(run.out)] == [False, True, True]
    assert all(float(row["seconds"]) > 0 for row in rows(run.out))
    train([run], show=lambda progress: pytest.fail("it has finished"))


@pytest.mark.parametrize("method", ["plain", pytest.param("apart", marks=pytest.mark.slow)])
def test_the_compiled_program_is_the_eager_one(method, tmp_path, traced_alone):
    eager, compiled = (tiny(tmp_path / str(flag), name=method, epochs=1, compile=flag) for flag in (False, True))
    for runs in (eager, compiled):
        quietly(runs)
    for ours, theirs in zip(compiled, eager, strict=True):
        expected = load_file(theirs.out / "model.safetensors")
        for name, tensor in load_file(ours.out / "model.safetensors").items():
            torch.testing.assert_close(tensor, expected[name], rtol=1e-3, atol=1e-4)


# runs go on as if nothing had happened


@pytest.mark.parametrize(
    "changes", [{"name": "one_pass"}, {"rule": "random_sign"}, {"name": "one_pass", "rule": "random_sign"}]
)
def test_runs_that_were_stopped_end_as_the_undisturbed_ones(changes, tmp_path):
    stopped, undisturbed = (tiny(tmp_path / name, **changes) for name in ("stopped", "undisturbed"))
    interrupted(stopped, step=2)
    interrupted(stopped, step=7)
    assert not any((run.out / "model.safetensors").exists() for run in stopped)
    for runs in (stopped, undisturbed):
        quietly(runs)
    assert [outcome(run.out) for run in stopped] == [outcome(run.out) for run in undisturbed]
    assert not (stopped[0].out / TOGETHER).exists()


def test_runs_that_were_stopped_while_they_were_measured_go_on(tmp_path, monkeypatch):
    stopped, undisturbed = (tiny(tmp_path / name) for name in ("stopped", "undisturbed"))
    measure = training._Running._errors

    def stop_while_measuring(running: Any, number: int) -> Any:
        signal.raise_signal(signal.SIGTERM)
        return measure(running, number)

    with monkeypatch.context() as patch:
        patch.setattr(training._Running, "_errors", stop_while_measuring)
        with pytest.raises(Interrupted):
            quietly(stopped)
    assert [rows(run.out) for run in stopped] == [[]] * len(SEEDS)
    for runs in (stopped, undisturbed):
        quietly(runs)
    assert [outcome(run.out) for run in stopped] == [outcome(run.out) for run in undisturbed]


def test_the_checkpoint_of_other_seeds_is_none(tmp_path):
    interrupted(tiny(tmp_path / "stopped"), step=5)
    runs, undisturbed = (tiny(tmp_path / name, seeds=SEEDS[:2]) for name in ("stopped", "undisturbed"))
    for each in (runs, undisturbed):
        quietly(each)
    assert [outcome(run.out) for run in runs] == [outcome(run.out) for run in undisturbed]


# what is refused


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"clip": 1.0}, "runs with clip 1.0 cannot be trained together. Leave it out, or train each by itself"),
        ({"channels_last": True}, "runs with channels_last True cannot"),
        ({"groups": 5}, "groups=5 does not divide"),
    ],
)
def test_settings_that_do_not_fit_are_refused_before_anything_is_written(changes, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        quietly(tiny(tmp_path, **changes))
    assert list(tmp_path.iterdir()) == []


def test_runs_that_differ_in_more_than_their_seed_are_refused(tmp_path):
    with pytest.raises(SettingsError, match="differ in their seed alone"):
        quietly([*tiny(tmp_path), *tiny(tmp_path / "other", epsilon=0.2)])


def test_a_step_that_is_not_finite_names_the_seed(tmp_path, monkeypatch):
    def spoilt(data: Any, *, seed: int, **keywords: Any) -> Any:
        for number, (samples, labels) in enumerate(training_batches(data, seed=seed, **keywords)):
            yield (samples * torch.nan if (seed, number) == (3, 1) else samples), labels

    training_batches = training.training_batches
    monkeypatch.setattr(training, "training_batches", spoilt)
    with pytest.raises(NonFiniteError, match="step 2 is not finite: with seed 3"):
        quietly(tiny(tmp_path))
