"""The benchmarks: each runs from end to end on something tiny, and measures what it says."""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import breakdown
import compile
import frames
import layer
import memory
import pytest
import render
import step
import timing
import torch
from methods import METHODS
from networks import ALL, NETWORKS, ghost_groups, make_case

FOLDER = Path(timing.__file__).parent


# How they measure.


def test_a_figure_is_the_median_with_its_interval() -> None:
    assert timing.median_of([4.0, 1.0, 2.0, 3.0, 5.0]) == {"median": 3.0, "low": 1.0, "high": 5.0, "n": 5}
    # Of the table of the sign test: the second of nine and the fourth of fifteen values.
    assert timing.median_of(range(1, 10)) == {"median": 5, "low": 2, "high": 8, "n": 9}
    assert timing.median_of(range(1, 16)) == {"median": 8, "low": 4, "high": 12, "n": 15}


def test_the_interval_holds_the_median_of_the_population_in_95_of_100_cases() -> None:
    generator = torch.Generator().manual_seed(0)
    figures = [timing.median_of(torch.randn(12, generator=generator).tolist()) for _ in range(2000)]
    share = sum(figure["low"] <= 0 <= figure["high"] for figure in figures) / len(figures)
    assert 0.95 - 0.015 < share < 0.98  # 96.1 % for twelve values, and three standard errors of 2,000 draws


def test_rounds_call_every_name_once_in_another_order() -> None:
    called: list[str] = []

    def measure(name: str) -> Callable[[], float]:
        return lambda: float(called.append(name) or len(called))

    found = timing.interleaved("letters", {name: measure(name) for name in "abc"}, rounds=6)
    rounds = [called[i : i + 3] for i in range(0, 18, 3)]
    assert all(sorted(each) == ["a", "b", "c"] for each in rounds)
    assert len(set(map(tuple, rounds))) > 1
    assert [len(values) for values in found.values()] == [6, 6, 6]


def test_the_clock_of_a_cpu_does_not_count_waiting() -> None:
    assert timing.seconds_a_call(lambda: time.sleep(0.02), 0, "cpu") < 0.01


def test_a_worker_has_its_own_environment_and_says_whose_library_it_has(tmp_path: Path) -> None:
    with timing.Worker(memory="returned", APART_PROBE="seen") as worker:
        assert [worker(os.getenv, name) for name in ("APART_PROBE", "MALLOC_TRIM_THRESHOLD_")] == ["seen", str(2**16)]
        assert worker(timing.library_of_process) == str(timing.ROOT / "apart_func" / "__init__.py")
    assert os.getenv("APART_PROBE") is None
    with pytest.raises(ValueError, match="holds no apart_func"):
        timing.Worker(tmp_path)


def test_a_run_that_is_stopped_keeps_what_it_has_measured(tmp_path: Path) -> None:
    def measure(settings: argparse.Namespace) -> Any:
        yield {"number": 1}
        raise KeyboardInterrupt

    settings = timing.arguments("").parse_args(["--out", str(tmp_path), "--name", "some"])
    with pytest.raises(KeyboardInterrupt):
        timing.run("step.py", settings, measure, lambda rows: timing.Table([], []))
    content = json.loads((tmp_path / "step-cpu-some.json").read_text(encoding="utf-8"))
    assert content["rows"] == [{"number": 1}]
    assert not content["complete"]


# What they measure.


@pytest.mark.parametrize(
    ("network", "parameters", "layers"),
    [("resnet18", 11_173_962, 20), ("resnet", 175_258, 15), ("digits", 5122, 6), ("ten_layers", 5650, 10)],
)
def test_networks_have_the_size_that_is_known(network: str, parameters: int, layers: int) -> None:
    model = NETWORKS[network].make()
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert sum(isinstance(m, torch.nn.modules.batchnorm._BatchNorm) for m in model.modules()) == layers


@pytest.mark.parametrize("network", [name for name in ALL if "resnet18" not in name])
def test_a_case_is_always_the_same_and_fits(network: str) -> None:
    (model, (images, labels)), (again, (same, _)) = (make_case(network, samples=4) for _ in range(2))
    assert torch.equal(images, same)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    assert model(images).shape == (4, 10)
    assert labels.shape == (4,)


@pytest.mark.parametrize("method", METHODS)
def test_every_step_can_be_repeated_and_leaves_the_weights(method: str) -> None:
    case = make_case("tiny")
    before = [p.detach().clone() for p in case.model.parameters()]
    taken = METHODS[method](case, 4)
    for _ in range(2):
        taken()
    rounding = {"rtol": 1e-6, "atol": 1e-7} if method == "SAM" else {"rtol": 0, "atol": 0}  # it adds and takes away
    torch.testing.assert_close([p.detach() for p in case.model.parameters()], before, **rounding)


def test_ghost_groups_hold_two_samples_at_least() -> None:
    assert [ghost_groups(samples) for samples in (128, 16, 8)] == [16, 8, 4]


def test_the_cost_of_a_layer_is_a_slope() -> None:
    assert layer.slope([3.0], [3.0 + 8 * 0.5]) == [0.5]
    made = layer.steps("4x3x2x2", "float32", "contiguous", [2], "cpu")
    assert len(made) == 2 * 3
    for taken in made.values():
        taken()


def test_the_peak_of_a_step_is_what_it_allocates() -> None:
    peak = memory.peak_of(lambda: torch.ones(2**24), "cpu")
    assert peak == pytest.approx(2**26, rel=0.2)  # 64 MiB in float32, give or take what else the process does


def test_a_climb_is_a_frame_of_a_file_that_the_stack_has_left() -> None:
    assert frames.climbs(["step", "step", "passes", "layers", "layers"]) == 0
    assert frames.climbs(["step", "passes", "autodiff", "passes", "passes", "step"]) == 2


def test_the_stack_of_a_step_leads_from_the_step_to_the_layer() -> None:
    proxy, adversarial = frames.stacks_of("two passes")
    (one,) = frames.stacks_of("one pass")
    assert proxy[0] == adversarial[0] == ("step.py", "__call__")
    assert one[0] == ("one_pass.py", "__call__")
    assert len({file for file, _ in proxy}) > 2


def test_kinds_of_work_hold_all_operators() -> None:
    taken = METHODS["one pass"](make_case("tiny"), 4)
    taken()
    found = breakdown.kinds(taken)
    assert {"convolutions", "nodes of autograd", breakdown.OUTSIDE} <= found.keys()
    assert found["convolutions"].calls >= 4  # two layers, forward and backward
    functions = breakdown.functions(taken)
    assert any(name.startswith("apart_func/") for name in functions)
    assert any("batch_norm" in name for name in functions)


@pytest.mark.slow
def test_a_plain_graph_has_fewer_nodes_than_one_of_two_passes() -> None:
    settings = argparse.Namespace(device="cpu", samples=None)
    plain, two = (compile.count_nodes("tiny", name, settings) for name in ("plain functional", "two passes"))
    assert plain["aten.convolution_backward.default"] == 2
    assert two["aten.convolution_backward.default"] == 4
    assert sum(two.values()) > sum(plain.values()) > plain["placeholder"] > 0


# Bounds.


@pytest.mark.parametrize(
    ("network", "low", "high", "verdict"),
    [
        ("timm/lcnet_035", 1.4, 1.5, "holds"),  # of 1.55, absolutely
        ("timm/lcnet_035", 1.5, 1.6, "undecided"),
        ("timm/lcnet_035", 1.6, 1.7, "broken"),
        ("resnet", 1.4, 1.6, "holds"),  # of 0.03 more than before
    ],
)
def test_a_bound_holds_or_breaks_where_the_whole_interval_does(
    network: str, low: float, high: float, verdict: str
) -> None:
    figure, none = {"median": 1.5, "low": low, "high": high}, {"median": 0.0, "low": -0.01, "high": 0.02}
    row = {"network": network, "method": "one pass", "ratio": figure, "against": figure, "difference": none}
    assert step.verdict(row)["verdict"] == verdict
    assert step.verdict(row | {"method": "SAM"}) == {}


# The programs.


def run(script: str, out: Path, *options: str) -> list[dict[str, Any]]:
    """Run a benchmark, and read what it recorded."""
    command = [sys.executable, str(FOLDER / f"{script}.py"), *options, "--rounds", "2", "--seconds", "0.001"]
    done = subprocess.run([*command, "--out", str(out)], capture_output=True, text=True, encoding="utf-8")
    assert not done.returncode, done.stderr
    content: dict[str, Any] = json.loads((out / f"{script}-cpu.json").read_text(encoding="utf-8"))
    assert content["complete"]
    assert content["command"].startswith(f"python benchmarks/{script}.py")
    assert str(out) not in json.dumps(content)
    assert torch.__version__ in content["machine"]
    assert content["machine"] in done.stdout
    rows: list[dict[str, Any]] = content["rows"]
    return rows


def test_a_step_is_compared_with_that_of_another_checkout(tmp_path: Path) -> None:
    rows = run("step", tmp_path, "--networks", "tiny", "--against", str(timing.ROOT))
    assert [row["method"] for row in rows] == ["plain", "two passes", "one pass"]
    for row in rows[1:]:
        assert row["ratio"]["n"] == 2
        assert math.isclose(row["difference"]["median"], row["ratio"]["median"] - row["against"]["median"])
    assert "| tiny" in str(step.table(rows))


@pytest.mark.slow
@pytest.mark.parametrize("script", ["memory", "layer", "ranks", "breakdown"])
def test_every_script_runs(script: str, tmp_path: Path) -> None:
    options = {
        "memory": ["--networks", "tiny", "--methods", "plain", "one pass"],
        "layer": ["--shapes", "4x3x2x2", "--groups", "2"],
        "ranks": ["--network", "tiny", "--samples", "8"],
        "breakdown": ["--network", "tiny"],
    }
    rows = run(script, tmp_path, *options[script])
    assert rows
    if script == "ranks":
        plain = next(row for row in rows if row["ranks"] == 2 and row["step"] == "plain, DDP")
        assert plain["calls"]["allreduce"] == 1
        assert plain["bytes"]["allreduce"] == 4 * sum(p.numel() for p in NETWORKS["tiny"].make().parameters())


@pytest.mark.slow
def test_growth_and_eight_models_are_rows_of_the_step(tmp_path: Path) -> None:
    rows = run("step", tmp_path, "--scaling")
    assert {row["network"] for row in rows} == {*ALL} - {*NETWORKS} | {"digits"}
    assert [row["method"] for row in rows if row["baseline"] == "eight models"] == [
        "eight models",
        "eight models, mapped",
    ]


@pytest.mark.slow
def test_what_runs_on_a_gpu_runs_within_its_time_and_needs_no_package_but_torch(tmp_path: Path) -> None:
    for package in ("matplotlib", "pandas", "rich", "scipy", "sklearn", "timm", "torchvision", "tyro"):
        (tmp_path / f"{package}.py").write_text("raise ImportError('not on that machine')", encoding="utf-8")
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{FOLDER.parent}"}
    command = [sys.executable, str(FOLDER / "gpu.py"), "--device", "cpu", "--out", str(tmp_path / "results")]
    options = ["--network", "tiny", "--samples", "4", "--rounds", "1", "--minutes", "20"]
    done = subprocess.run([*command, *options], check=True, capture_output=True, text=True, env=environment)
    assert "failed" not in done.stdout, done.stderr
    for script in ("step", "layer", "memory", "compile"):
        assert json.loads((tmp_path / "results" / f"{script}-cpu.json").read_text(encoding="utf-8"))["complete"]
    stopped = subprocess.run([*command, "step", "--minutes", "0.02"], check=True, capture_output=True, text=True)
    assert "step was stopped" in stopped.stdout


# The page.


def test_the_page_has_the_tables_of_what_was_recorded() -> None:
    page = render.PAGE.read_text(encoding="utf-8")
    assert render.rendered(page, render.RESULTS) == page
    assert len(page.splitlines()) <= 200


def test_a_page_is_filled_between_its_marks(tmp_path: Path) -> None:
    figure = {"median": 2.0, "low": 1.9, "high": 2.1, "n": 7}
    row = {"network": "tiny", "samples": 8, "method": "plain", "baseline": "plain", "seconds": figure, "ratio": figure}
    content = {"command": "python step.py", "machine": "a machine", "rows": [row, row | {"method": "one pass"}]}
    (tmp_path / "step-cpu.json").write_text(json.dumps(content), encoding="utf-8")
    marks = "text\n<!-- step-cpu -->\nold\n<!-- end -->\n<!-- memory-cpu -->\nstays\n<!-- end -->\n"
    found = render.rendered(marks, tmp_path)
    assert "old" not in found
    assert "stays" in found
    assert "`python step.py` on a machine" in found
    assert "2.00 [1.90, 2.10]" in found
