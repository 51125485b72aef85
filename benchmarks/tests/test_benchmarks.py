"""The benchmarks: each runs from end to end on something tiny, and records what it should."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import breakdown
import common
import distributed
import pytest
import render
import step_cost
import torch
from figures import FIGURES
from networks import NETWORKS, SETS, expanded, make_case
from steps import METHODS, Variant, choices, make_step

FOLDER = Path(common.__file__).parent
TIMING = ["--rounds", "2", "--seconds", "0.001"]


def run(script: str, out: Path, *options: str) -> dict:
    """Run a benchmark with one thread, and read what it recorded."""
    command = [sys.executable, str(FOLDER / f"{script}.py"), *options, "--threads", "1", "--device", "cpu"]
    printed = subprocess.run(
        [*command, "--out", str(out)], check=True, capture_output=True, text=True, encoding="utf-8"
    )
    name = "".join(f"-{name}" for option, name in pairwise(options) if option == "--name")
    content = json.loads((out / f"{script}-cpu{name}.json").read_text(encoding="utf-8"))
    assert content["benchmark"] == script
    assert content["complete"]
    assert content["command"].startswith(f"python benchmarks/{script}.py")
    assert str(out) not in json.dumps(content)
    machine = content["environment"]
    assert machine["torch"] == torch.__version__
    assert machine["hardware"]
    assert machine["threads"] == 1
    assert machine["device"] == "cpu"
    assert machine["hardware"] in printed.stdout
    return content


def assert_times(row: dict, baseline: str, n: int | None = None) -> None:
    for clock in common.CLOCKS:
        assert_spread(row[clock]["seconds"])
        assert_spread(row[clock]["relative_to"][baseline], n)


def assert_spread(spread: dict, n: int | None = None) -> None:
    assert set(spread) == {"median", "iqr", "n"}
    assert spread["median"] > 0
    assert spread["iqr"] >= 0
    assert spread["n"] == n if n else spread["n"] >= 1


# how they measure


def test_the_spread_is_median_and_distance_of_quartiles():
    assert common.spread([4.0, 1.0, 2.0, 3.0, 5.0]) == common.Spread(3.0, 2.0, 5)


def test_rounds_take_every_step_once_and_ratios_are_formed_within_them():
    calls = []
    steps = {name: lambda name=name: calls.append(name) for name in ("a", "b", "c")}
    threads = torch.get_num_threads()
    times = common.interleaved("letters", steps, common.TimedRounds(rounds=3, threads=1, seconds=1e-4))
    torch.set_num_threads(threads)
    assert sorted(calls[:3]) == ["a", "b", "c"]  # the first calls
    assert all(len(rounds) == 3 for rounds in times.values())
    row = common.timing_row(times, "b", ["a", "absent"])
    for clock in common.CLOCKS:
        medians = {name: common.medians_of(rounds, clock) for name, rounds in times.items()}
        ratios = [mine / theirs for mine, theirs in zip(medians["b"], medians["a"], strict=True)]
        assert row[clock]["relative_to"] == {"a": vars(common.spread(ratios))}
        assert row[clock]["seconds"]["n"] == sum(len(getattr(each, clock)) for each in times["b"])


def test_every_round_calls_up_every_name_in_another_order():
    called = list(common.turns("letters", "abc", rounds=6))
    rounds = [called[i : i + 3] for i in range(0, 18, 3)]
    assert all(sorted(each) == ["a", "b", "c"] for each in rounds)
    assert len(set(map(tuple, rounds))) > 1


def test_the_processors_clock_does_not_count_waiting():
    settings = common.TimedRounds(rounds=1, threads=1, seconds=0)
    (times,) = common.interleaved("sleep", {"sleep": lambda: time.sleep(0.02)}, settings)["sleep"]
    assert len(times.processor) == len(times.wall) == 1
    assert times.processor[0] < 0.01 < 0.02 <= times.wall[0]


def test_both_clocks_agree_on_work_and_say_how_long_one_call_takes():
    calls = []

    def work() -> None:
        calls.append(sum(range(10_000)))

    times = common.timed(work, common.TimedRounds(rounds=1, threads=1, seconds=0.02))
    assert len(times.wall) == len(times.processor)
    assert len(calls) > len(times.wall)  # several calls a block
    assert min(times.wall) < 0.01
    assert all(0 < mine <= 1.1 * wall for mine, wall in zip(times.processor, times.wall, strict=True))


def test_a_child_has_its_own_environment(monkeypatch):
    monkeypatch.delenv("APART_PROBE", raising=False)
    assert common.in_child(probe, "APART_PROBE", APART_PROBE="seen") == "seen"
    assert probe("APART_PROBE") is None


def test_a_child_handles_freed_memory_as_it_is_told(monkeypatch):
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "1")
    found = {name: common.in_child(probe, "MALLOC_TRIM_THRESHOLD_", allocator=name) for name in ("glibc", "kept")}
    assert found == {"glibc": None, "kept": str(2**34)}
    assert probe("MALLOC_TRIM_THRESHOLD_") == "1"


def probe(variable: str) -> str | None:
    return os.environ.get(variable)


def test_a_run_that_is_stopped_keeps_what_it_has_measured(tmp_path):
    def measure(settings):
        yield {"number": 1}
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        common.run("step_cost", common.Rounds(device="cpu", out=tmp_path), measure, lambda content: [])
    content = json.loads((tmp_path / "step_cost-cpu.json").read_text(encoding="utf-8"))
    assert content["rows"] == [{"number": 1}]
    assert not content["complete"]


# what they measure


@pytest.mark.parametrize(
    ("network", "parameters", "layers"),
    [("resnet18", 11_173_962, 20), ("wrn_40_2", 2_243_546, 37), ("overhead", 5650, 10)],
)
def test_networks_have_the_published_size(network, parameters, layers):
    model = NETWORKS[network].make()
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert sum(isinstance(m, torch.nn.modules.batchnorm._BatchNorm) for m in model.modules()) == layers


def test_a_set_of_networks_is_written_out_once():
    assert expanded(["mlp", "timm", "digits"]) == ("mlp", *SETS["timm"])
    assert all(set(networks) <= set(NETWORKS) for networks in SETS.values())


@pytest.mark.parametrize("network", ["cifar_resnet", "mlp", *SETS["timm"], "tiny"])
def test_a_case_is_always_the_same_and_fits(network):
    model, (images, labels) = make_case(network, samples=4)
    again, (same, _) = make_case(network, samples=4)
    assert torch.equal(images, same)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    assert model(images).shape == (4, 10)
    assert labels.shape == (4,)


def test_choices_are_distinct_and_leave_two_samples_in_a_group():
    chosen = choices("tiny", 8, ["plain", "APART"], [1.0, 0.5], [0, 16])
    assert [choice.variant for choice in chosen] == [
        None, Variant(1.0, 0), Variant(1.0, 4), Variant(0.5, 0), Variant(0.5, 2)
    ]  # fmt: skip
    assert len({choice.name for choice in chosen}) == 5


def test_one_pass_needs_two_groups_and_has_no_ratio():
    chosen = choices("tiny", 8, ["one pass"], [1.0, 0.5], [0, 2, 16])
    assert [choice.name for choice in chosen] == ["one pass, groups 2", "one pass, groups 4"]
    assert chosen[0].labels() == {"model": "tiny", "samples": 8, "method": "one pass", "groups": 2}


@pytest.mark.parametrize("method", [name for name, method in METHODS.items() if not method.compiled])
def test_every_eager_step_can_be_repeated_and_leaves_the_weights(method):
    case = make_case("tiny")
    before = [p.detach().clone() for p in case.model.parameters()]
    for choice in choices("tiny", None, [method], [1.0, 0.5], [0, 2]):
        step = make_step(choice, case)
        for _ in range(2):
            step()
    for old, new in zip(before, case.model.parameters(), strict=True):
        # SAM adds and takes away; the other steps do not touch them.
        torch.testing.assert_close(
            old, new.detach(), rtol=1e-6 if method == "SAM" else 0, atol=1e-7 if method == "SAM" else 0
        )


def test_compiled_plain_steps_compute_the_plain_gradient():
    results = {}
    for method in ("plain", "plain compiled", "plain one graph"):
        case = make_case("tiny")
        (choice,) = choices("tiny", None, [method], [], [])
        out = make_step(choice, case, compiler=lambda function: function)()
        results[method] = out[0] if out else {name: p.grad for name, p in case.model.named_parameters()}
    torch.testing.assert_close(results["plain compiled"], results["plain"], rtol=0, atol=0)
    torch.testing.assert_close(results["plain one graph"], results["plain"], rtol=1e-4, atol=1e-6)  # other kernels


# the programs


def test_step_cost_records_times_and_ratios(tmp_path):
    methods = ["plain", "APART", "APART drop-in", "APART-SAM"]
    content = run("step_cost", tmp_path, "--models", "tiny", "--methods", *methods, "--ratios", "1.0", *TIMING)
    assert [(row["method"], row.get("groups")) for row in content["rows"]] == [
        ("plain", None), *((method, groups) for method in methods[1:] for groups in (0, 4))
    ]  # fmt: skip
    for row in content["rows"]:
        assert_times(row, "plain", n=2)


def test_step_cost_compares_ways_to_handle_freed_memory(tmp_path):
    options = ["--models", "tiny", "--methods", "plain", "one pass", "--groups", "2", "--samples", "4"]
    content = run("step_cost", tmp_path, *options, "--allocators", "kept", "glibc", *TIMING)
    assert [(row["samples"], row["allocator"], row["method"]) for row in content["rows"]] == [
        (4, allocator, method) for allocator in ("kept", "glibc") for method in ("plain", "one pass")
    ]


def test_rows_with_a_goal_show_it():
    times = {"seconds": vars(common.spread([1.0])), "relative_to": {"plain": vars(common.spread([1.5]))}}
    labels = {"samples": 8, "method": "one pass", "groups": 4, "allocator": "kept"}
    rows = [{"model": model, **labels, "wall": times, "processor": times} for model in ("digits", "tiny")]
    goal, none = step_cost.sheets({"rows": rows})
    assert (goal.columns[-1], goal.lines[0][-1]) == ("goal", "1.3 ×")
    assert "goal" not in none.columns
    assert set(step_cost.GOALS) == set(SETS["timm"])


@pytest.mark.slow
def test_step_cost_of_compiled_steps_is_set_against_compiled_plain_ones(tmp_path):
    options = ["--models", "tiny", "--compiled-models", "tiny", "--ratios", "1.0", "--groups", "2"]
    content = run("step_cost", tmp_path, *options, *TIMING)
    rows = {row["method"]: row for row in content["rows"]}
    assert list(rows) == list(METHODS)
    assert set(rows["APART compiled"]["wall"]["relative_to"]) == {"plain", "plain compiled", "plain one graph"}


def test_layer_cost_records_layouts_dtypes_and_groups(tmp_path):
    content = run("layer_cost", tmp_path, "--shapes", "4x3x2x2", "8x3", "--groups", "1", "2", *TIMING)
    inputs = [(row["shape"], row["layout"], row["dtype"]) for row in content["rows"]]
    assert len(set(inputs)) == 2 * 2 + 2
    assert len(inputs) == 4 * len(set(inputs))
    for row in content["rows"]:
        assert_times(row, "F.batch_norm", n=2)


def test_the_parts_of_a_step_add_up_to_it(tmp_path):
    rows = run("breakdown", tmp_path, "--parts", "eager", *TIMING)["rows"]
    for clock in common.CLOCKS:
        step, floor, *parts = (row[clock]["seconds"]["median"] for row in rows)
        assert sum([floor, *parts]) == pytest.approx(step, rel=0.5)  # medians of two rounds, part by part


def test_profiles_set_a_step_against_the_plain_ones_in_it(tmp_path):
    options = ["--parts", "profile", "--models", "tiny", "--shown", "1000"]
    rows = run("breakdown", tmp_path, *options, *TIMING)["rows"]
    tables: dict[str, dict] = {}
    for row in rows:
        tables.setdefault(row["table"], {})[row["name"]] = row["operators"]
    what = "APART on tiny, batch of 8, groups 4"
    operators, functions = tables[f"operators of {what}"], tables[f"functions of {what}"]
    assert operators["aten::convolution_backward"]["two plain steps"]["calls"] == 4  # two layers, two steps
    assert operators["aten::convolution_backward"]["APART"]["calls"] == 4
    assert operators["all"]["APART"]["share"] == 1
    # Each way to cut a step into pieces finds all of it.
    kinds = tables[f"kinds of work in {what}"]
    for step in ("two plain steps", "APART"):
        assert kinds["all"][step]["seconds"] == pytest.approx(operators["all"][step]["seconds"])
    assert kinds["convolutions"]["APART"]["calls"] >= 4
    ours = [each for name, each in functions.items() if name.startswith("apart_func/")]
    assert ours
    assert all(each["APART"]["calls"] > 0 == each["two plain steps"]["calls"] for each in ours)
    assert "operators of one pass on tiny, batch of 8, groups 4" in tables


def test_the_check_of_the_gradients_is_set_against_the_step_that_it_is_a_part_of(tmp_path):
    rows = run("breakdown", tmp_path, "--parts", "checks", "--models", "tiny", *TIMING)["rows"]
    step, check, reading = rows
    assert step["check"] == "one pass"
    for part in (check, reading):
        assert part["processor"]["relative_to"]["one pass"]["median"] < 1


def test_operators_are_of_the_kind_that_they_are():
    kinds = {
        "aten::mkldnn_convolution": "convolutions",
        "aten::native_batch_norm_backward": "batch norm",
        "aten::addmm": "matrix products",
        "aten::t": "views and allocation",
        "aten::threshold_backward": "other arithmetic",
        "aten::empty_like": "views and allocation",
        "detach": "views and allocation",
        "MulBackward0": "autograd's nodes",
        "autograd::engine::evaluate_function: MulBackward0": "autograd's nodes",
        "outside of operators": "outside of operators",
    }
    assert {name: breakdown.kind_of_operator(name) for name in kinds} == kinds


def test_parts_of_one_round_add_up_exactly():
    names = ("plain", "APART", "proxy", "adversarial", "F.batch_norm", "clean", "perturbed")
    step, *parts = breakdown.parts_of(dict(zip(names, (2.0, 9.0, 4.0, 3.5, 0.1, 0.15, 0.2), strict=True)), 3).values()
    assert step == 9
    assert sum(parts) == pytest.approx(step)


def test_traffic_counts_passes_over_the_activations(tmp_path):
    x, y = torch.randn(2, 64, 64)
    for function, passes in [
        (lambda: x + 1, 2),
        (lambda: y.copy_(x), 2),
        (lambda: y.mul_(x), 3),
        (lambda: torch.add(x, x, out=y), 3),
        (lambda: x.view(-1)[:10], 0),
        (lambda: torch.empty_like(x), 0),
        (lambda: x.expand(5, 64, 64), 0),
        (lambda: x.half(), 1.5),
    ]:
        with breakdown.Traffic(x) as traffic:
            function()
        assert traffic.passes == passes
    rows = run("breakdown", tmp_path, "--parts", "layer", "--shapes", "8x4x6x6", "--groups", "2", *TIMING)["rows"]
    passes = {row["layer"]: row["passes"] for row in rows if "passes" in row and row["layout"] == "contiguous"}
    assert passes["F.batch_norm"] == pytest.approx(breakdown.FLOOR_PASSES, abs=0.5)


@pytest.mark.slow
def test_kernels_of_compiled_steps_are_compared(tmp_path):
    rows = run("breakdown", tmp_path, "--parts", "compiled", "--compiled-model", "tiny", "--groups", "2", *TIMING)[
        "rows"
    ]
    fused = next(row["operators"] for row in rows if row["name"] == "fused kernels")
    assert list(fused) == ["2 × plain compiled", "2 × plain one graph", "APART compiled"]
    assert all(each["calls"] > 0 and 0 < each["share"] < 1 for each in fused.values())


@pytest.mark.slow
def test_memory_records_peaks(tmp_path):
    options = ["--models", "cifar_resnet", "--samples", "8", "--methods", "plain", "APART", "--ratios", "1.0"]
    content = run("memory", tmp_path, *options, "--groups", "2", "--rounds", "1")
    plain, apart, *by_default = content["rows"]
    assert [row["allocator"] for row in by_default] == ["glibc", "glibc"]
    assert_spread(plain["bytes"], n=1)
    assert plain["bytes"]["median"] > 2**20
    # The second pass follows the first, and what either keeps for its backward is about the same.
    assert 0.8 < apart["relative_to"]["plain"]["median"] < 1.5


def test_memory_of_compiled_steps_is_refused_on_a_cpu():
    import memory

    with pytest.raises(ValueError, match="plain compiled"):
        memory.Settings(methods=("plain", "plain compiled"), device="cpu")


@pytest.mark.slow
def test_compile_records_times_and_counts(tmp_path):
    options = ["--models", "tiny", "--methods", "plain compiled", "APART compiled", "--groups", "2", "--rounds", "1"]
    plain, apart = run("compile", tmp_path, *options, "--step-rounds", "2", "--seconds", "0.01")["rows"]
    for row in (plain, apart):
        assert_spread(row["cold_seconds"], n=1)
        (warm,) = row["warm_seconds"]
        assert warm["median"] < row["cold_seconds"]["median"]
        assert 0.7 < sum(phase["median"] for phase in row["phases"].values()) / row["cold_seconds"]["median"] < 1.1
        assert row["frames"] == 1
        assert row["kernels"] > 0
        assert row["nodes"] > 0
        assert_times(row, "plain", n=2)
        assert_times(row, "plain compiled", n=2)
    assert (plain["graphs"], apart["graphs"]) == (2, 1)
    assert_spread(apart["relative_to"]["plain compiled"], n=1)
    # All ratios of a step come from the same times.
    mine, theirs = (row["wall"]["relative_to"]["plain"]["median"] for row in (apart, plain))
    assert apart["wall"]["relative_to"]["plain compiled"]["median"] == pytest.approx(mine / theirs, rel=0.5)


def test_functionalize_cost_lists_networks_with_batch_norm_the_slowest_first(tmp_path):
    import functionalize_cost

    models = ["test_resnet", "test_vit", "resnet18"]
    content = run("functionalize_cost", tmp_path, "--models", *models, "--rounds", "2")
    rows = {row["model"]: row for row in content["rows"]}
    assert set(rows) == {"test_resnet", "resnet18"}  # the other one has none
    assert rows["resnet18"]["layers"] == 20
    (sheet,) = functionalize_cost.sheets(content)
    times = [rows[line[0]]["seconds"]["median"] for line in sheet.lines]
    assert times == sorted(times, reverse=True)


def test_what_runs_on_a_gpu_runs_on_a_cpu_within_its_time(tmp_path):
    scripts = ("step_cost", "layer_cost")
    command = [sys.executable, str(FOLDER / "gpu.py"), *scripts, "--device", "cpu", "--out", str(tmp_path)]
    options = ["--models", "tiny", "--samples", "4", "8", "--rounds", "1", "--minutes", "10"]
    subprocess.run([*command, *options], check=True, capture_output=True)
    steps, layers = (json.loads((tmp_path / f"{name}-cpu.json").read_text(encoding="utf-8")) for name in scripts)
    assert steps["complete"]
    assert layers["complete"]
    assert {(row["model"], row["samples"]) for row in steps["rows"]} == {("tiny", 4), ("tiny", 8)}
    assert {row["dtype"] for row in layers["rows"]} == {"float16", "bfloat16", "float32"}
    assert steps["command"].startswith("python benchmarks/gpu.py step_cost")


def test_a_script_that_takes_too_long_is_stopped(tmp_path):
    start = time.monotonic()
    command = [sys.executable, str(FOLDER / "gpu.py"), "step_cost", "--device", "cpu", "--out", str(tmp_path)]
    done = subprocess.run([*command, "--minutes", "0.02"], check=True, capture_output=True, text=True)
    assert "step_cost was stopped" in done.stdout
    assert time.monotonic() - start < 120  # on its own it would take many minutes


@pytest.mark.parametrize("script", ["gpu", "step_cost", "layer_cost", "memory", "compile"])
def test_what_runs_on_a_gpu_needs_no_package_but_torch(script):
    others = ["matplotlib", "mlxtend", "pandas", "rich", "scipy", "sklearn", "timm", "torchvision", "tyro"]
    program = f"import sys; sys.modules.update(dict.fromkeys({others})); import {script}; print('imported')"
    path = os.pathsep.join([str(FOLDER), str(FOLDER.parent), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": path}
    done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True, env=environment)
    assert done.stdout == "imported\n"


def test_scaling_records_every_axis(tmp_path):
    sizes = ["--batch", "4", "8", "--depth", "1", "--width", "4", "--samples", "4"]
    content = run("scaling", tmp_path, "--axes", "batch", "depth", "width", *sizes, *TIMING)
    assert [(row["axis"], row["size"], row["step"]) for row in content["rows"]] == [
        (axis, size, step)
        for axis, size in (("batch", 4), ("batch", 8), ("depth", 1), ("width", 4))
        for step in ("plain", "APART", "one pass")
    ]
    FIGURES["scaling"](content, tmp_path / "scaling.png")
    assert (tmp_path / "scaling.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_scaling_of_many_models(tmp_path):
    rows = run("scaling", tmp_path, "--axes", "models", "--models", "2", "--model-samples", "8", *TIMING)["rows"]
    assert [row["step"] for row in rows] == ["one by one", "one by one, compiled", "vmapped", "vmapped, compiled"]
    for row in rows:
        assert_times(row, "one by one", n=2)


def test_the_page_has_tables_figures_and_commands(tmp_path):
    results = tmp_path / "results"
    run("step_cost", results, "--models", "tiny", "--methods", "plain", "APART", *TIMING)
    run("step_cost", results, "--models", "tiny", "--methods", "plain", "SAM", "--name", "peer", *TIMING)
    run("layer_cost", results, "--shapes", "4x3", "--groups", "1", *TIMING)
    render.main(render.Settings(results, tmp_path / "README.md"))
    page = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "`python benchmarks/step_cost.py --models tiny --methods plain APART" in page
    assert "![A training step](results/step_cost-cpu.png)" in page
    assert (results / "step_cost-cpu.png").exists()
    assert "![A training step](results/step_cost-cpu-peer.png)" in page
    assert page.count("## A training step") == 1
    assert re.search(r"\| F.batch_norm +\| +4×3 \| +contiguous \| +float32 \|", page)
    assert "No figure on this page was taken on a GPU" in page
    assert page.index("## A training step") < page.index("## The layer alone")
    assert str(tmp_path) not in page


def test_what_ranks_send_is_counted_and_is_what_the_model_of_many_gpus_takes_it_for(tmp_path):
    options = ["--models", "tiny", "--samples", "8", "--groups", "2", "--ranks", "2", "--rounds", "2"]
    rows = run("distributed", tmp_path, *options)["rows"]
    assert [row["way"] for row in rows] == list(distributed.WAYS)
    for row in rows:
        assert row["calls"]["allreduce"] == row["formula"]["calls"], row["way"]
        assert row["bytes"]["allreduce"] == row["formula"]["bytes"], row["way"]
        assert_spread(row["seconds"], 2)


def test_more_gpus_wait_longer_and_what_is_sent_less_often_waits_less():
    settings = vars(distributed.Settings())
    for way in distributed.WAYS:
        waits = [distributed.modelled(way, gpus, settings) for gpus in (8, 64, 1024)]
        assert waits == sorted(waits)
    once, twice = (
        distributed.modelled(way, 64, settings) for way in ("the same, no_sync in the proxy pass", "APART drop-in, DDP")
    )
    assert once < twice


@pytest.mark.parametrize("script", list(render.QUESTIONS))
def test_quick_settings_measure_often_enough(script):
    module = __import__(script)
    quick = module.QUICK
    assert quick.rounds >= 5
    assert type(quick) is module.Settings
