"""The demo, the statistics of pairs, the networks, and the workers."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import compare
import numpy as np
import pytest
import torch
from experiments.datasets import load_dataset, training_batches
from experiments.machine import run_in_workers
from experiments.paired import PairedDifference, estimate, paired_difference
from experiments.settings import DataSettings
from experiments.splits import InMemory, divided
from scipy import stats

# bundled data


@pytest.mark.parametrize("name", ["digits", "mnist5k"])
def test_training_samples_have_mean_zero_and_deviation_one(name):
    data = load_dataset(DataSettings(name))
    ((samples, _),) = training_batches(data, batch_size=len(data.train), seed=0, epoch=0)
    assert samples.mean().item() == pytest.approx(0, abs=1e-4)
    assert samples.std().item() == pytest.approx(1, abs=1e-4)


def test_samples_are_divided_without_overlap_and_without_loss():
    everything = InMemory(torch.arange(60.0), torch.arange(60) % 3)
    rest, held = divided(everything, 15, seed=0)
    assert len(rest) == 45
    assert sorted(torch.cat([rest.samples, held.samples]).tolist()) == everything.samples.tolist()
    assert torch.equal(held.samples.long() % 3, held.labels)
    assert torch.bincount(held.labels).tolist() == [5, 5, 5]
    assert not torch.equal(divided(everything, 15, seed=1)[0].samples, rest.samples)
    assert (len(divided(everything, 0, seed=0)[1]), len(divided(everything, 60, seed=0)[0])) == (0, 0)


# statistics


def test_the_paired_interval_is_that_of_the_paired_t_test():
    generator = np.random.default_rng(0)
    first = generator.normal(6, 1, size=9)
    second = first - generator.normal(0.5, 0.4, size=9)
    result = paired_difference(first.tolist(), second.tolist())
    expected = stats.ttest_rel(first, second).confidence_interval(0.95)
    assert (result.low, result.high) == pytest.approx((expected.low, expected.high), rel=1e-12)
    assert result.mean == pytest.approx((first - second).mean(), rel=1e-12)
    assert result.p == pytest.approx(stats.ttest_rel(first, second).pvalue, rel=1e-9)


def test_the_standard_error_is_that_of_the_mean():
    assert estimate([1.0, 2.0, 3.0, 4.0]).standard_error == pytest.approx(math.sqrt(5 / 3 / 4))


def test_equal_runs_differ_by_nothing():
    assert paired_difference([5.0, 6.0], [5.0, 6.0]) == PairedDifference(0, 0, 0, p=1)


# scripts


def test_workers_return_results_in_order_and_raise_what_a_task_raised():
    assert run_in_workers(math.sqrt, [4.0, 1.0, 9.0], processes=2, show=lambda news: None) == [2.0, 1.0, 3.0]
    with pytest.raises(ValueError, match=r"math domain|nonnegative"):
        run_in_workers(math.sqrt, [4.0, -1.0], processes=1, show=lambda news: None)


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
