"""The demo."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import compare
import pytest


def run_compare(*flags: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(Path(compare.__file__)), *flags]
    return subprocess.run(command, check=False, capture_output=True, text=True, encoding="utf-8")


def test_the_demo_trains_pairs_and_writes_a_table_with_measured_time(tmp_path):
    printed = run_compare("--seeds", "2", "--epochs", "2", "--out", str(tmp_path)).stdout
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
def test_the_demo_reports_a_bad_setting_in_one_line(flags, message, tmp_path):
    finished = run_compare(*flags, "--out", str(tmp_path))
    assert finished.returncode != 0
    assert message in finished.stderr
    assert "Traceback" not in finished.stderr
