"""The training program: what a run leaves behind, and that nothing on the way to its end changes it."""

from __future__ import annotations

import csv
import json
import random
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from experiments import __main__ as program
from experiments import runs
from experiments import train as training
from experiments.datasets import NAMES, evaluation_batches, load_dataset
from experiments.machine import Interrupted
from experiments.methods import NonFiniteError
from experiments.networks import make_network
from experiments.runs import COLUMNS, TIMING_COLUMNS, CheckpointError, Progress, RunError, progress_bar, read_config
from experiments.settings import PRESETS, DataSettings, MethodSettings, Settings, SettingsError, as_json, from_json
from folders_on_disk import WRITERS
from safetensors.torch import load_file
from torch import nn

EXAMPLES = Path(program.__file__).parents[1]


@pytest.fixture(autouse=True)
def told_every_step(monkeypatch):
    monkeypatch.setattr(training, "SHOW_SECONDS", 0)


def tiny(out: Path, **changes: Any) -> Settings:
    """Two epochs of four steps on digits. Changes go by a setting's name; `name` is that of the method."""
    settings = replace(PRESETS["digits"], out=out)
    changes = {"epochs": 2, **changes}
    parts = {"out": settings.out, "seed": changes.pop("seed", 0)}
    for part in ("method", "data", "model", "training", "machine"):
        values = getattr(settings, part)
        own = {name: changes.pop(name) for name in list(changes) if hasattr(values, name)}
        parts[part] = replace(values, **own)
    assert not changes
    return Settings(**parts)


def train(settings: Settings, show: Callable[[Progress], None] | None, *, resume: bool = True) -> None:
    training.train([settings], show, resume=resume)


def quietly(settings: Settings) -> Path:
    train(settings, show=lambda progress: None)
    return settings.out


def rows(out: Path) -> list[dict[str, str]]:
    with (out / "metrics.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def outcome(out: Path) -> tuple[bytes, list[list[str]]]:
    """Everything about a finished run that is no time."""
    lines = [[value for name, value in row.items() if name not in TIMING_COLUMNS] for row in rows(out)]
    return (out / "model.safetensors").read_bytes(), lines


def stop_at(step: int) -> Callable[[Progress], None]:
    """Ask a run to stop once it has taken so many steps."""

    def show(progress: Progress) -> None:
        if progress.step == step:
            signal.raise_signal(signal.SIGTERM)

    return show


def interrupted(settings: Settings, step: int) -> None:
    with pytest.raises(Interrupted, match="SIGTERM"):
        train(settings, stop_at(step))


def checkpoints(out: Path) -> list[str]:
    return sorted(path.name for path in (out / "checkpoints").iterdir())


# what a run leaves behind


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    return quietly(tiny(tmp_path_factory.mktemp("run")))


def test_metrics_have_a_row_an_epoch_with_all_columns(finished):
    table = rows(finished)
    assert [row["epoch"] for row in table] == ["1", "2"]
    assert [row["step"] for row in table] == ["4", "8"]
    assert tuple(table[0]) == COLUMNS
    for row in table:
        assert all(value for name, value in row.items() if name != "test_top5_error")
        assert 0 <= float(row["train_error"]) <= 100
        assert 0 <= float(row["data_wait"]) <= 1
        assert float(row["images_per_second"]) > 0


def test_the_saved_network_has_the_test_error_of_the_last_row(finished):
    data = load_dataset(DataSettings("digits"))
    model = make_network("small_resnet", data)
    model.load_state_dict(load_file(finished / "model.safetensors"))
    ((images, labels),) = evaluation_batches(data, data.test, batch_size=len(data.test))
    wrong = int((model.eval()(images).argmax(dim=1) != labels).sum())
    assert float(rows(finished)[-1]["test_error"]) == pytest.approx(100 * wrong / len(labels))


def test_the_configuration_is_all_settings_and_the_machine(finished):
    stored = json.loads((finished / "config.json").read_text(encoding="utf-8"))
    assert from_json(stored) == tiny(finished)
    assert stored["environment"]["torch"] == torch.__version__


def test_plain_training_has_no_adversarial_loss(tmp_path):
    quietly(tiny(tmp_path, name="plain", epochs=1))
    assert rows(tmp_path)[0]["adversarial_loss"] == ""


def test_one_pass_has_a_loss_of_its_perturbed_groups(tmp_path):
    quietly(tiny(tmp_path, name="one_pass", epochs=1))
    assert float(rows(tmp_path)[0]["adversarial_loss"]) > 0


def test_errors_are_measured_every_so_many_epochs_and_after_the_last(tmp_path):
    quietly(tiny(tmp_path, epochs=5, evaluate_every=2))
    assert [bool(row["test_error"]) for row in rows(tmp_path)] == [False, True, False, True, True]
    assert [bool(row["validation_error"]) for row in rows(tmp_path)] == [False, True, False, True, True]


def test_a_run_tells_how_it_gets_on(tmp_path):
    told: list[Progress] = []
    train(tiny(tmp_path), told.append)
    assert [progress.step for progress in told] == [1, 2, 3, 4, 4, 5, 6, 7, 8, 8]
    assert [progress.epoch for progress in told] == [0] * 4 + [1] * 5 + [2]
    assert told[0].steps == 8
    assert told[3].test_error is None
    table = rows(tmp_path)
    assert told[-1].validation_error == float(table[1]["validation_error"])
    assert told[-1].test_error == float(table[1]["test_error"])
    assert told[-1].loss == float(table[1]["train_loss"])


@pytest.mark.parametrize("name", NAMES)
def test_an_epoch_can_be_trained_on_every_data_set(name, tmp_path):
    changes: dict[str, Any] = {"epochs": 1, "width": 2, "evaluate_every": 1}
    if name in WRITERS:
        changes |= {"folder": WRITERS[name](tmp_path), "batch_size": 4, "groups": 2}
        changes["crop"] = 32 if name in ("imagenet", "folder") else None
    settings = tiny(tmp_path / "out", **changes)
    settings = replace(
        settings,
        data=replace(settings.data, name=name),
        model=replace(settings.model, name="small_resnet"),
    )
    out = quietly(settings)
    (row,) = rows(out)
    assert 0 <= float(row["test_error"]) <= 100
    assert load_file(out / "model.safetensors")


# a run goes on as if nothing had happened


EXACT = {
    "plain": {"name": "plain"},
    "apart": {},
    "sam": {"name": "sam"},
    "apart_sam": {"name": "apart_sam"},
    "one_pass": {"name": "one_pass"},
    "random signs": {"rule": "random_sign"},
    "ghost noise": {"name": "ghost_noise"},
    "bfloat16": {"amp": "bf16", "channels_last": True},
    "clipped": {"clip": 0.5},
    "steps": {"schedule": "steps", "milestones": (0.3, 0.8)},
}


@pytest.mark.parametrize("changes", EXACT.values(), ids=EXACT)
def test_a_run_that_was_stopped_within_an_epoch_ends_as_the_undisturbed_one(changes, tmp_path):
    stopped = tiny(tmp_path / "stopped", **changes)
    interrupted(stopped, step=2)
    interrupted(stopped, step=7)
    assert checkpoints(stopped.out) == ["step-000000002.pt", "step-000000007.pt"]
    assert outcome(quietly(stopped)) == outcome(quietly(tiny(tmp_path / "undisturbed", **changes)))


def test_what_draws_from_the_default_generator_goes_on_too(tmp_path, monkeypatch):
    def with_dropout(*arguments: Any) -> nn.Module:
        model = make_network(*arguments)
        model.head.insert(2, nn.Dropout(0.5))
        return model

    monkeypatch.setattr(training, "make_network", with_dropout)
    interrupted(tiny(tmp_path / "stopped"), step=3)
    torch.manual_seed(1)
    assert outcome(quietly(tiny(tmp_path / "stopped"))) == outcome(quietly(tiny(tmp_path / "b")))


def test_a_run_that_was_stopped_while_it_was_measured_goes_on(tmp_path, monkeypatch):
    asked = []

    @contextmanager
    def noted_signals() -> Iterator[Callable[[], int | None]]:
        yield lambda: signal.SIGTERM if asked else None

    def stop_while_measuring(*arguments: Any, **keywords: Any) -> Any:
        asked.append(True)
        return evaluation_batches_of_a_run(*arguments, **keywords)

    evaluation_batches_of_a_run = training.evaluation_batches
    with monkeypatch.context() as patch:
        patch.setattr(training, "noted_signals", noted_signals)
        patch.setattr(training, "evaluation_batches", stop_while_measuring)
        with pytest.raises(Interrupted):
            quietly(tiny(tmp_path / "stopped"))
    assert checkpoints(tmp_path / "stopped") == ["step-000000004.pt"]
    assert rows(tmp_path / "stopped") == []
    assert outcome(quietly(tiny(tmp_path / "stopped"))) == outcome(quietly(tiny(tmp_path / "undisturbed")))


def test_a_run_that_was_killed_before_its_network_was_written_writes_it(tmp_path):
    settings = tiny(tmp_path, checkpoint_epochs=1)
    before = outcome(quietly(settings))
    (tmp_path / "model.safetensors").unlink()
    assert outcome(quietly(settings)) == before


def test_a_run_without_a_checkpoint_starts_again_and_repeats_no_row(tmp_path):
    def fail(progress: Progress) -> None:
        if progress.step == 6:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        train(tiny(tmp_path / "stopped"), fail)
    assert len(rows(tmp_path / "stopped")) == 1
    assert outcome(quietly(tiny(tmp_path / "stopped"))) == outcome(quietly(tiny(tmp_path / "undisturbed")))


def test_what_belongs_to_the_machine_may_change_and_changes_nothing(tmp_path):
    interrupted(tiny(tmp_path / "stopped"), step=2)
    resumed = tiny(tmp_path / "stopped", workers=1, checkpoint_epochs=1, checkpoint_seconds=0.0)
    assert outcome(quietly(resumed)) == outcome(quietly(tiny(tmp_path / "undisturbed")))


def test_a_damaged_newest_checkpoint_falls_back_to_the_one_before(tmp_path):
    settings = tiny(tmp_path / "stopped", checkpoint_seconds=0.0)
    interrupted(settings, step=6)
    newest = settings.out / "checkpoints" / "step-000000006.pt"
    content = bytearray(newest.read_bytes())
    middle = slice(len(content) // 2, len(content) // 2 + 200)  # longer than what lies between two tensors
    content[middle] = bytes(byte ^ 1 for byte in content[middle])
    newest.write_bytes(content)
    with pytest.warns(UserWarning, match=r"step-000000006\.pt is damaged"):
        quietly(settings)
    assert outcome(settings.out) == outcome(quietly(tiny(tmp_path / "undisturbed")))


def test_checkpoints_come_by_epochs_by_seconds_and_the_last_two_are_kept(tmp_path):
    quietly(tiny(tmp_path / "never"))
    assert not (tmp_path / "never" / "checkpoints").exists()
    quietly(tiny(tmp_path / "epochs", epochs=7, checkpoint_epochs=2, evaluate_every=7))
    assert checkpoints(tmp_path / "epochs") == ["step-000000016.pt", "step-000000024.pt"]
    quietly(tiny(tmp_path / "seconds", checkpoint_seconds=0.0))
    assert checkpoints(tmp_path / "seconds") == ["step-000000007.pt", "step-000000008.pt"]


def test_a_finished_run_is_left_as_it_is(tmp_path):
    quietly(tiny(tmp_path))
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    assert quietly(tiny(tmp_path)) == tmp_path
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


# what is refused


def test_a_folder_that_holds_a_run_is_refused_without_resume(tmp_path):
    settings = tiny(tmp_path)
    interrupted(settings, step=2)
    with pytest.raises(RunError, match=f"{tmp_path} already holds a run. Add --resume"):
        train(settings, show=None, resume=False)


def test_other_settings_than_the_stored_ones_are_refused_by_name(tmp_path):
    interrupted(tiny(tmp_path), step=2)
    with pytest.raises(RunError, match=r"(?s)training\.epochs: 3, stored 2.*seed: 1, stored 0") as refused:
        quietly(tiny(tmp_path, epochs=3, seed=1, workers=1))
    assert "workers" not in str(refused.value)
    assert checkpoints(tmp_path) == ["step-000000002.pt"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"groups": 5}, "groups=5 does not divide"),
        ({"batch_size": 300}, "no batch of 300"),
        ({"device": "abacus"}, "device 'abacus' cannot be used"),
        ({"folder": Path("nowhere")}, "nowhere|folder"),
    ],
)
def test_settings_that_do_not_fit_are_refused_before_anything_is_written(changes, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        quietly(tiny(tmp_path / "out", **changes))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("change", [{"seed": 1}, {"epsilon": 0.2}])
def test_a_checkpoint_of_another_run_is_refused(change, tmp_path):
    interrupted(tiny(tmp_path / "one"), step=2)
    interrupted(tiny(tmp_path / "other", **change), step=2)
    ours, theirs = (tmp_path / name / "checkpoints" / "step-000000002.pt" for name in ("one", "other"))
    ours.write_bytes(theirs.read_bytes())
    name, value = next(iter(change.items()))
    with pytest.raises(CheckpointError, match=rf"(?s)that of another run.*{name}: 0.*, stored {value}"):
        quietly(tiny(tmp_path / "one"))


@pytest.mark.parametrize("content", [{}, {"settings": 3}, [1, 2], "text"])
def test_a_checkpoint_that_is_none_of_this_program_is_refused(content, tmp_path):
    interrupted(tiny(tmp_path), step=2)
    torch.save(content, tmp_path / "checkpoints" / "step-000000002.pt")
    with pytest.raises(CheckpointError, match="is none of this program"):
        quietly(tiny(tmp_path))


def test_a_checkpoint_without_tensors_is_refused(tmp_path):
    interrupted(tiny(tmp_path), step=2)
    path = tmp_path / "checkpoints" / "step-000000002.pt"
    state = torch.load(path, weights_only=True)
    state["learner"]["params"] = dict.fromkeys(state["learner"]["params"], 1)
    torch.save(state, path)
    with pytest.raises(CheckpointError, match="is none of this program"):
        quietly(tiny(tmp_path))


def test_a_network_that_was_cut_short_is_not_complete(tmp_path):
    settings = tiny(tmp_path, checkpoint_epochs=1)
    before = outcome(quietly(settings))
    content = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(content[: len(content) // 2])
    assert outcome(quietly(settings)) == before


def test_a_high_training_loss_under_a_perturbation_names_the_plain_run_to_compare_with(tmp_path, capsys):
    out = tmp_path / "a run"
    program.main(["train", "--epochs", "1", "--lr", "0.05", "--out", str(out)])
    said = capsys.readouterr().err
    assert "warning: the clean training loss is still 2." in said
    (command,) = (line for line in said.splitlines() if line.startswith("  python -m experiments train"))
    plain = training.parse(shlex.split(command)[4:]).settings
    assert (plain.method.name, plain.out) == ("plain", tmp_path / "a run-plain")
    settings = read_config(out / "config.json")
    assert plain == replace(settings, method=replace(settings.method, name="plain"), out=plain.out)


@pytest.mark.parametrize("option", ["--out", "--data-dir"])
def test_a_folder_whose_name_is_not_utf8_is_named(option, tmp_path):
    with pytest.raises(SettingsError, match=rf"{option} '.*udcff' is not valid UTF-8: rename the folder"):
        training.parse(["--data", "folder", option, f"{tmp_path}/\udcff"])


def test_a_step_that_is_not_finite_stops_the_run_with_epoch_and_step(tmp_path):
    with pytest.raises(NonFiniteError, match="epoch 1, step 2 is not finite"):
        quietly(tiny(tmp_path, lr=1e25, checkpoint_seconds=0.0))
    assert checkpoints(tmp_path) == ["step-000000001.pt"]


def test_a_full_disk_stops_the_run_and_leaves_the_checkpoint_as_it_was(tmp_path):
    settings = tiny(tmp_path / "stopped", checkpoint_seconds=0.0)
    interrupted(settings, step=2)
    before = {path: path.read_bytes() for path in (settings.out / "checkpoints").iterdir()}
    with files_limited_to(8000), pytest.raises(OSError, match=r"File too large: '.*step-000000003\.pt'"):
        quietly(settings)
    assert {path: path.read_bytes() for path in (settings.out / "checkpoints").iterdir()} == before
    assert outcome(quietly(settings)) == outcome(quietly(tiny(tmp_path / "undisturbed")))


def test_a_full_disk_is_said_with_how_to_go_on(tmp_path):
    with files_limited_to(8000):
        said = program.main(["train", "--out", str(tmp_path), "--checkpoint-seconds", "0"])
    assert re.match(r"error: .*too large: '.*\.pt'\. The checkpoints .* make room, and go on with --resume", said)


@contextmanager
def files_limited_to(size: int) -> Iterator[None]:
    """Let the operating system refuse to make a file of this process any larger."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


# the command line


def test_the_settings_start_from_the_preset_of_the_data_set():
    settings = training.parse(["--data", "cifar100", "--epochs", "3"]).settings
    preset = PRESETS["cifar100"]
    assert settings == replace(preset, training=replace(preset.training, epochs=3))


def test_another_preset_can_be_named():
    settings = training.parse(["--data", "folder", "--data-dir", "x", "--preset", "cifar10", "--groups", "2"]).settings
    assert settings.training == PRESETS["cifar10"].training
    assert settings.data.name == "folder"
    assert settings.data.folder == Path("x")
    assert settings.method.groups == 2


@pytest.mark.parametrize(("data", "radius", "published"), [("cifar10", 0.2, 0.1), ("imagenet", 0.05, 0.025)])
def test_one_pass_starts_from_random_signs_and_a_radius_that_suits_them(data: str, radius: float, published: float):
    def method(*flags: str) -> MethodSettings:
        return training.parse(["--data", data, "--method", "one_pass", *flags]).settings.method

    assert (method().rule, method().epsilon) == ("random_sign", pytest.approx(radius))
    assert (method("--rule", "sign").rule, method("--rule", "sign").epsilon) == ("sign", published)
    assert method("--epsilon", "0.4").epsilon == 0.4


def test_flags_are_flat():
    line = """
        --data cifar100 --data-dir PATH --model preact_resnet18 --method apart_sam --epsilon 0.2 --groups 8 --ratio 0.5
        --rho 0.05 --epochs 20 --batch-size 64 --compile --amp bf16 --clip 1 --channels-last
        --seed 3 --out runs/x --resume
    """
    command = training.parse(line.split())
    assert command.resume
    stored = as_json(command.settings)
    assert stored["data"]["folder"] == "PATH"
    assert stored["model"]["name"] == "preact_resnet18"
    expected = {"name": "apart_sam", "epsilon": 0.2, "groups": 8, "ratio": 0.5, "rho": 0.05}
    assert expected.items() <= stored["method"].items()
    expected = {"epochs": 20, "batch_size": 64, "amp": "bf16", "compile": True, "clip": 1.0}
    assert expected.items() <= stored["training"].items()
    assert (stored["seed"], stored["out"]) == (3, "runs/x")


def test_the_original_s_names_of_options_are_understood(tmp_path, monkeypatch):
    trained = []
    monkeypatch.setattr(training, "train", lambda many, resume: trained.extend(many) or [])
    monkeypatch.setattr(runs, "last_errors", lambda out: "")
    line = f"""
        --dataset=cifar10 --data_dir PATH --model wideresnet40_2 -b 64 --epochs 100 --num_workers 4 --lr 0.2
        --momentum 0.8 --nesterov --weight_decay 1e-4 --gamma 0.2 -r 0.5 -eps 0.05 -g 8 --rho 0.1 --out {tmp_path}
    """
    training.main(line.split())
    (settings,) = trained
    method, sgd = settings.method, settings.training
    assert (settings.data.name, settings.data.folder, settings.machine.workers) == ("cifar10", Path("PATH"), 4)
    assert (sgd.batch_size, sgd.lr, sgd.momentum, sgd.nesterov) == (64, 0.2, 0.8, True)
    assert (sgd.weight_decay, sgd.gamma) == (1e-4, 0.2)
    assert (method.ratio, method.epsilon, method.groups, method.rho) == (0.5, 0.05, 8, 0.1)


def test_help_explains_every_flag_and_shows_the_presets_values(capsys):
    with pytest.raises(SystemExit, match="0"):
        training.parse(["--data", "imagenet", "--help"])
    shown = capsys.readouterr().out
    flags = re.findall(r"^\W+(--[a-z-]+)", shown, re.MULTILINE)
    assert {"--preset", "--resume", "--data", "--data-dir", "--amp", "--epsilon", "--checkpoint-seconds"} <= set(flags)
    assert "(default: resnet18)" in " ".join(shown.replace("│", " ").split())
    assert "0.0001" in shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "cifar"], "cifar100"),
        (["--preset", "cifar"], "cifar100"),
        (["--lr", "-1"], "lr is -1"),
        (["--milestones", "0.5", "0.2"], "rising fractions"),
        (["--clip", "0"], "a norm above 0"),
        (["--nesterov", "--momentum", "0"], "raise --momentum"),
    ],
)
def test_a_bad_flag_is_refused_with_what_is_expected(arguments, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        training.parse(arguments)
    assert message in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("content", ["{", "[]", '{"seed": "none"}'])
def test_an_error_is_one_line(content, tmp_path):
    (tmp_path / "config.json").write_text(content, encoding="utf-8")
    message = program.main(["train", "--out", str(tmp_path), "--resume"])
    assert re.match(rf"error: {tmp_path}/config\.json cannot be used: [^\n]+$", message)


@pytest.mark.parametrize(("given", "advice"), [("trian", "did you mean train?"), ("x", "choose one of train, sweep")])
def test_an_unknown_command_is_named(given, advice):
    assert str(program.main([given])).startswith(f"error: there is no command '{given}': {advice}")


def test_options_with_nothing_left_to_switch_off_are_taken(capsys: Any) -> None:
    with pytest.raises(SystemExit) as ended:
        program.main(["train", "--no-tensorboard", "--help"])
    assert ended.value.code == 0
    assert "--data" in capsys.readouterr().out


def interrupt(*_: Any, **__: Any) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_program_with_a_checkpoint_and_how_to_go_on(number, tmp_path, monkeypatch, capsys):
    @contextmanager
    def progress_bar() -> Iterator[Callable[[Progress], None]]:
        yield lambda progress: signal.raise_signal(number) if progress.step == 2 else None

    monkeypatch.setattr(runs, "progress_bar", progress_bar)
    assert program.main(["train", "--epochs", "1", "--workers", "1", "--out", str(tmp_path)]) == 128 + number
    said = capsys.readouterr().err
    assert f"stopped by {number.name}; a checkpoint is written. Go on with: python -m experiments train" in said
    assert said.rstrip().endswith(f"--workers 1 --out {tmp_path} --resume")
    assert checkpoints(tmp_path) == ["step-000000002.pt"]
    assert not (tmp_path / "model.safetensors").exists()


def test_a_stop_before_anything_was_written_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(training, "train", interrupt)
    with pytest.raises(SystemExit, match="before anything was written: the same command starts the run"):
        training.main(["--out", str(tmp_path / "run")])


def test_a_second_ctrl_c_says_from_where_the_run_goes_on(tmp_path, monkeypatch):
    """The second one does not wait for the step, nor for a checkpoint of it."""
    arguments = ["--out", str(tmp_path / "run with blanks"), "--epochs", "1"]
    settings = training.parse(arguments).settings
    with monkeypatch.context() as patch:
        patch.setattr(training._Running, "to_the_end", interrupt)
        with pytest.raises(
            SystemExit, match=r"stopped; no checkpoint had been written\. Go on with: python -m"
        ) as stop:
            training.main(arguments)
    *_, command = str(stop.value).partition(" train ")
    interrupted(settings, step=2)
    monkeypatch.setattr(training._Running, "to_the_end", interrupt)
    with pytest.raises(SystemExit, match="what came after step-000000002 is lost"):
        training.main(shlex.split(command))


def test_the_bar_shows_the_test_error_at_80_columns_and_the_end_repeats_it(tmp_path, capsys, monkeypatch):
    progress = Progress(tmp_path, 123, 200, 4567, 78200, 0.123, 1.5, 12345.6, 4.25, 5.75)
    with monkeypatch.context() as patch:
        patch.setenv("COLUMNS", "80")
        patch.setenv("FORCE_COLOR", "1")
        with progress_bar() as show:
            show(progress)
    assert "test error 5.75 %" in capsys.readouterr().out
    assert program.main(["train", "--data", "digits", "--epochs", "1", "--out", str(tmp_path / "run")]) is None
    *_, last, folder = capsys.readouterr().out.splitlines()
    (row,) = rows(tmp_path / "run")
    assert last == "after 1 epochs: test error {:.2f} %, validation error {:.2f} %".format(
        *(float(row[f"{split}_error"]) for split in ("test", "validation"))
    )
    assert folder.startswith(f"Network: {tmp_path}/run/model.safetensors")


def test_without_a_command_the_program_lists_those_it_has(capsys):
    assert program.main([]) == 2
    assert program.main(["--help"]) == 0
    assert "evidence" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--width", "1000000"], "more than fit into memory"),
        (["--device", "meta"], "device 'meta' cannot be used"),
        (["--seed", "-1"], "seed is -1"),
        (
            ["--method", "plain", "--model", "vit_tiny_patch16_224"],
            "vit_tiny_patch16_224 cannot take a step on 64 samples",
        ),
        (["--data", "cifar10"], "the folder that it lies in is needed"),
    ],
)
def test_what_cannot_be_trained_is_refused_in_one_line_and_leaves_nothing(flags, message, tmp_path):
    said = program.main(["train", *flags, "--out", str(tmp_path / "out")])
    assert said.startswith("error: ")
    assert message in said
    assert not (tmp_path / "out").exists()


def test_an_out_that_is_a_file_is_refused_in_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    assert program.main(["train", "--out", str(tmp_path / "file"), "--epochs", "1"]).startswith("error: ")


@pytest.mark.slow
def test_a_compiled_run_follows_the_eager_one(tmp_path):
    quietly(tiny(tmp_path / "eager", epochs=1))
    quietly(tiny(tmp_path / "compiled", epochs=1, compile=True))
    eager, compiled = (float(rows(tmp_path / name)[0]["adversarial_loss"]) for name in ("eager", "compiled"))
    assert compiled == pytest.approx(eager, rel=1e-3)  # four steps amplify the rounding a little


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_make_train_writes_where_the_demo_does(tmp_path):
    command = [
        "make",
        "--no-print-directory",
        "--dry-run",
        "--old-file",
        ".venv/ready",
        "RUN=python",
        "ARGS=--out runs/x",
        "demo",
        "train",
    ]
    said = subprocess.run(command, cwd=EXAMPLES.parent, capture_output=True, text=True, check=True).stdout
    assert said.splitlines() == [
        "python examples/compare.py",
        "PYTHONPATH=examples python -m experiments train --out runs/x",
    ]


# the program, killed


def start(out: Path, *flags: str) -> subprocess.Popen[str]:
    """The program in a process of its own, on epochs of 16 steps, with a checkpoint every few of them."""
    command = [sys.executable, "-m", "experiments", "train", "--data", "digits", "--batch-size", "16", "--epochs", "20"]
    command += ["--checkpoint-seconds", "0.05", "--out", str(out), *flags]
    return subprocess.Popen(
        command, cwd=EXAMPLES, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, encoding="utf-8"
    )


def wait_for_epoch(process: subprocess.Popen[str], epoch: int) -> None:
    for line in process.stdout:
        if line.startswith(f"epoch {epoch}/"):
            return
    pytest.fail(f"the run ended before epoch {epoch}: {process.stderr.read()}")


@pytest.mark.slow
def test_a_run_that_is_killed_at_random_moments_ends_as_the_undisturbed_one(tmp_path):
    killed, newest = tmp_path / "killed", []
    for low in (1, 7):
        with start(killed, "--resume") as process:
            wait_for_epoch(process, random.randint(low, low + 4))
            with pytest.raises(subprocess.TimeoutExpired):  # it is still training then
                process.wait(timeout=random.uniform(0, 0.2))
            process.kill()
            assert process.wait() == -signal.SIGKILL
        newest.append(checkpoints(killed)[-1])
    assert newest[0] < newest[1]  # the second time it was killed beyond where it had gone on from
    with start(killed, "--resume") as process:
        assert process.communicate()[1] == ""
        assert process.returncode == 0
    settings = read_config(killed / "config.json")
    assert outcome(killed) == outcome(quietly(replace(settings, out=tmp_path / "undisturbed")))


@pytest.mark.slow
@pytest.mark.parametrize("delay", [0.3, 1.0, 2.0])
def test_ctrl_c_in_the_first_seconds_is_one_line(delay, tmp_path):
    with start(tmp_path / "out") as process:
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(timeout=delay)
        process.send_signal(signal.SIGINT)
        said = process.communicate()[1]
    assert process.returncode != 0
    assert "Traceback" not in said


HOLD = """
import fcntl, os, sys, time
fcntl.flock(os.open(sys.argv[1], os.O_RDONLY), fcntl.LOCK_EX)
print("held", flush=True)
time.sleep(300)
"""


def test_a_second_process_on_a_folder_is_refused_and_one_that_was_killed_leaves_no_lock(tmp_path):
    settings = tiny(tmp_path / "run", epochs=1)
    settings.out.mkdir()
    with subprocess.Popen([sys.executable, "-c", HOLD, str(settings.out)], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(RunError, match="another process is training in"):
            quietly(settings)
        assert list(settings.out.iterdir()) == []
        other.kill()
    assert len(rows(quietly(settings))) == 1
