"""The demo."""

from __future__ import annotations

import json
import runpy
import sys

import compare
import pytest


@pytest.fixture
def run_compare(monkeypatch, in_this_process):
    def run(*flags: str) -> None:
        monkeypatch.setattr(sys, "argv", ["compare.py", *flags])
        runpy.run_path(compare.__file__, run_name="__main__")

    return run


def test_the_demo_trains_pairs_and_writes_a_table_with_measured_time(run_compare, tmp_path, capsys):
    run_compare("--seeds", "2", "--epochs", "2", "--out", str(tmp_path))
    printed = capsys.readouterr().out
    assert "2× epochs" in printed
    assert "time a step" in printed
    groups = json.loads((tmp_path / "compare.json").read_text(encoding="utf-8"))["groups"]
    assert [(group["label"], len(group["errors"])) for group in groups] == [
        ("plain, weight decay 0.0005", 2),
        ("plain, weight decay 0.016", 2),
        ("plain, weight decay 0.0005, 2× epochs", 2),
        ("APART, weight decay 0.0005", 2),
        ("APART, weight decay 0.016", 2),
    ]
    lines = (tmp_path / "compare.md").read_text(encoding="utf-8").splitlines()
    (head,) = (line.split("|") for line in lines if "| method |" in line)
    (row,) = (line.split("|") for line in lines if "| APART, weight decay 0.0005 |" in line)
    assert float(row[4].replace("×", "")) > 1  # two passes take longer than one
    assert row[head.index(" gain on plain, weight decay 0.016 ")].strip()
    assert (tmp_path / "compare.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(("flags", "message"), [(["--seeds", "1"], "seeds is 1"), (["--epochs", "0"], "epochs is 0")])
def test_the_demo_reports_a_bad_setting_in_one_line(flags, message, run_compare, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        run_compare(*flags, "--out", str(tmp_path))
    assert stopped.value.code != 0
    assert message in f"{stopped.value.code} {capsys.readouterr().err}"
