"""Run folders: checkpoints that are whole or told to be damaged, and what is read from a folder."""

from __future__ import annotations

import os

import pytest
import torch
from experiments.runs import CheckpointError, harm, load_checkpoint, read_config, save_checkpoint, write_whole
from experiments.settings import (
    MethodSettings,
    Settings,
    SettingsError,
)

# checkpoints


def test_a_checkpoint_comes_back_and_the_newest_wins(tmp_path):
    assert load_checkpoint(tmp_path) is None
    for step in (9, 10, 11):
        save_checkpoint(tmp_path, step, {"step": step, "tensors": {"a": torch.arange(3.0)}, "rows": [{"x": None}]})
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["step-000000010.pt", "step-000000011.pt"]
    state = load_checkpoint(tmp_path)
    assert state["step"] == 11
    assert state["rows"] == [{"x": None}]
    assert torch.equal(state["tensors"]["a"], torch.arange(3.0))


@pytest.mark.parametrize("damage", ["flipped", "truncated", "empty"])
def test_a_damaged_checkpoint_is_set_aside_with_a_warning(damage, tmp_path):
    for step in (1, 2):
        save_checkpoint(tmp_path, step, {"step": step, "weights": torch.full((1000,), float(step))})
    newest = tmp_path / "step-000000002.pt"
    content = newest.read_bytes()
    middle = len(content) // 2
    flipped = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
    newest.write_bytes({"flipped": flipped, "truncated": content[:middle], "empty": b""}[damage])
    with pytest.warns(UserWarning, match="is damaged and was set aside"):
        assert load_checkpoint(tmp_path)["step"] == 1
    assert (tmp_path / "step-000000002.damaged").exists()


@pytest.mark.parametrize(
    "error", [MemoryError(), OSError(5, "Input/output error"), RuntimeError("can't allocate memory")]
)
@pytest.mark.parametrize("reader", ["torch.load", "pathlib.Path.read_bytes"])
def test_a_checkpoint_that_cannot_be_read_for_the_moment_is_left_alone(reader, error, tmp_path, monkeypatch):
    if reader != "torch.load" and isinstance(error, RuntimeError):
        pytest.skip("that is an error of PyTorch's allocator")

    def fail(*_, **__):
        raise error

    save_checkpoint(tmp_path, 1, {"step": 1})
    with monkeypatch.context() as patched:
        patched.setattr(reader, fail)
        with pytest.raises(CheckpointError, match=r"cannot be read for the moment .* go on with --resume"):
            load_checkpoint(tmp_path)
    assert load_checkpoint(tmp_path)["step"] == 1


def test_when_all_checkpoints_are_damaged_the_run_does_not_silently_start_again(tmp_path):
    save_checkpoint(tmp_path, 1, {})
    (tmp_path / "step-000000001.pt").write_bytes(b"")
    with pytest.warns(UserWarning, match="damaged"), pytest.raises(CheckpointError, match="all checkpoints in"):
        load_checkpoint(tmp_path)


def test_a_checkpoint_cannot_run_code(tmp_path):
    class Malicious:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    save_checkpoint(tmp_path / "checkpoints", 1, {"state": Malicious()})
    with pytest.warns(UserWarning, match="damaged"), pytest.raises(CheckpointError):
        load_checkpoint(tmp_path / "checkpoints")
    assert not (tmp_path / "ran").exists()


def test_what_a_killed_process_has_begun_to_write_is_swept_away(tmp_path):
    save_checkpoint(tmp_path, 1, {"step": 1})
    (tmp_path / "step-000000002.pt.tmp").write_bytes(b"half")
    assert load_checkpoint(tmp_path) == {"step": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["step-000000001.pt"]


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_whole(path, b"old")

    def fail(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="No space left"):
        write_whole(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


# what is read, and what is said at the end


def test_stored_settings_that_are_nested_without_end_are_named(tmp_path):
    (tmp_path / "config.json").write_text("[" * 100_000)
    with pytest.raises(SettingsError, match=r"config\.json cannot be used: .*recursion"):
        read_config(tmp_path / "config.json")


def test_a_low_loss_and_plain_training_are_no_harm():
    assert harm(Settings(method=MethodSettings("apart")), 2.0, classes=10)
    assert not harm(Settings(method=MethodSettings("apart")), 0.01, classes=10)
    assert not harm(Settings(method=MethodSettings("plain")), 2.0, classes=10)
    assert not harm(Settings(method=MethodSettings("sam", label_smoothing=0.1)), 0.6, classes=10)
