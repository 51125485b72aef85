"""What trained networks withstand: the corruptions, and what is measured and written for a run."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from experiments.datasets import evaluation_batches
from experiments.evaluate import (
    COLOUR_CORRUPTIONS,
    CORRUPTIONS,
    EVALUATION,
    SEVERITIES,
    Options,
    blur,
    contrast,
    corruptions_of,
    evaluate,
    evaluate_all,
    evaluate_run,
    load_data,
    load_network,
    noise,
    read_evaluation,
    scores,
    with_exact_statistics,
)
from experiments.runs import FolderError, read_config
from experiments.settings import PRESETS, DataSettings, ModelSettings
from experiments.train import train
from folders_on_disk import write_cifar10
from test_report import write_run

from apart_func import SettingError

RADII = (0.1, 0.3)
DIGITS = load_data(DataSettings("digits"))


# corruptions

SAMPLES = {
    "images": torch.randn(6, 3, 9, 8, generator=torch.Generator().manual_seed(0)),
    "signals": torch.randn(6, 1, 40, generator=torch.Generator().manual_seed(0)),
}
kinds = pytest.mark.parametrize("kind", SAMPLES)


@kinds
@pytest.mark.parametrize("name", CORRUPTIONS)
def test_a_higher_severity_changes_a_sample_more_and_every_call_does_the_same(kind, name):
    samples = SAMPLES[kind]
    before = samples.clone()
    corrupted = [CORRUPTIONS[name](samples, severity) for severity in SEVERITIES]
    distances = [(version - samples).norm().item() for version in corrupted]
    assert distances[0] > 0
    assert distances == sorted(distances)
    assert all(version.shape == samples.shape and version.dtype == torch.float32 for version in corrupted)
    assert torch.equal(CORRUPTIONS[name](samples, 3), corrupted[2])
    assert torch.equal(samples, before)


@kinds
@pytest.mark.parametrize("name", ["blur", "contrast"])
def test_a_sample_is_corrupted_by_itself(kind, name):
    samples = SAMPLES[kind]
    torch.testing.assert_close(CORRUPTIONS[name](samples[2:3], 4), CORRUPTIONS[name](samples, 4)[2:3])


def test_blur_does_not_mix_channels_and_leaves_what_is_even():
    samples = torch.zeros(1, 2, 8, 8)
    samples[0, 0, 4, 4] = 1
    blurred = blur(samples, 5)
    assert (blurred[0, 1] == 0).all()
    assert blurred[0, 0].max() < 0.5
    torch.testing.assert_close(blur(torch.ones(1, 1, 8, 8), 5), torch.ones(1, 1, 8, 8))


def test_blur_of_an_image_twice_the_size_reaches_twice_as_far():
    def width(side: int) -> float:
        impulse = torch.zeros(1, 1, side)
        impulse[..., side // 2] = 1
        weights = blur(impulse, 5).flatten()
        return float((weights * (torch.arange(side) - side // 2) ** 2).sum().sqrt())

    assert width(80) == pytest.approx(2 * width(40), rel=0.01)


def test_noise_has_its_deviation_and_no_mean():
    added = noise(torch.zeros(100, 1, 10, 10), 5)
    assert added.std().item() == pytest.approx(1, abs=0.05)
    assert abs(added.mean().item()) < 0.05


def test_contrast_keeps_the_mean_of_every_sample():
    samples = SAMPLES["images"]
    paler = contrast(samples, 5)
    torch.testing.assert_close(paler.mean(dim=(1, 2, 3)), samples.mean(dim=(1, 2, 3)))
    torch.testing.assert_close(paler.std(dim=(1, 2, 3)), 0.15 * samples.std(dim=(1, 2, 3)))


# evaluation of a run


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    preset = PRESETS["digits"]
    settings = replace(
        preset,
        training=replace(preset.training, epochs=8),
        out=tmp_path_factory.mktemp("runs") / "apart-seed0",
    )
    train([settings], show=lambda progress: None)
    return settings.out


def network(run: Path) -> torch.nn.Module:
    return load_network(run, read_config(run / "config.json"), DIGITS)


@pytest.fixture(scope="module")
def measured(run) -> dict:
    assert evaluate_run(run, Options((run,), radii=RADII, draws=2)) is None
    return read_evaluation(run)


def test_errors_are_those_that_training_has_measured_at_its_end(run, measured):
    with (run / "metrics.csv").open(newline="") as file:
        last = list(csv.DictReader(file))[-1]
    assert measured["test_error"] == pytest.approx(float(last["test_error"]))
    assert measured["validation_error"] == pytest.approx(float(last["validation_error"]))
    assert 5 < measured["test_error"] < 80  # else what follows would say little


def test_curves_begin_with_the_accuracy_on_the_test_samples(measured):
    assert measured["radii"] == [0, *RADII]
    for curve in (measured["random"], measured["adversarial"]):
        assert len(curve) == 3
        assert curve[0] == pytest.approx(100 - measured["test_error"])
    assert measured["adversarial"][2] < measured["random"][2] < measured["random"][0]
    for kind in ("random", "adversarial"):
        assert measured["area"][kind] == pytest.approx(np.trapezoid(measured[kind], measured["radii"]) / RADII[-1])


def test_loss_and_error_on_the_training_samples_are_those_of_evaluation_mode(run, measured):
    model = network(run)
    found, labels = scores(model, DIGITS, DIGITS.train)
    assert measured["train_loss"] == pytest.approx(torch.nn.functional.cross_entropy(found, labels).item())
    assert measured["train_error"] == pytest.approx(100 * (found.argmax(1) != labels).double().mean().item())


def test_exact_statistics_are_those_of_all_training_samples(run):
    model = network(run)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    exact = with_exact_statistics(model, DIGITS)
    ((samples, _),) = evaluation_batches(DIGITS, DIGITS.train, batch_size=len(DIGITS.train))
    entered = model.stem[0](samples)  # what the first layer of batch norm sees
    torch.testing.assert_close(exact.stem[1].running_mean, entered.mean((0, 2, 3)))
    torch.testing.assert_close(exact.stem[1].running_var, entered.var((0, 2, 3)))
    assert not exact.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_the_images_with_a_wrong_label_are_listed(run, measured):
    ((samples, labels),) = evaluation_batches(DIGITS, DIGITS.test, batch_size=len(DIGITS.test))
    with torch.no_grad():
        wrong = network(run)(samples).argmax(1) != labels
    assert measured["wrong"] == wrong.nonzero().flatten().tolist()
    assert measured["test_samples"] == 1241


@pytest.fixture(scope="module")
def on_cifar(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("cifar")
    preset = PRESETS["cifar10"]
    settings = replace(
        preset,
        data=DataSettings("cifar10", write_cifar10(folder, per_file=16), train_samples=40, validation_samples=20),
        model=ModelSettings("cifar_resnet", width=4),
        method=replace(preset.method, groups=2),
        training=replace(preset.training, epochs=1, batch_size=8),
        machine=replace(preset.machine, workers=0),
        out=folder / "run",
    )
    train([settings], show=lambda progress: None)
    return settings.out


def test_a_run_on_images_on_disk_is_measured_with_the_corruptions_of_colour(on_cifar):
    assert evaluate_run(on_cifar, Options((on_cifar,), radii=RADII, draws=1)) is None
    found = read_evaluation(on_cifar)
    assert set(found["corruptions"]) == set(COLOUR_CORRUPTIONS)
    assert all(0 <= error <= 100 for errors in found["corruptions"].values() for error in errors)


def test_data_that_has_moved_is_found_where_it_is_said_to_be(on_cifar, tmp_path):
    moved = on_cifar.parent.rename(tmp_path / "moved")
    run = moved / "run"
    load_data.cache_clear()
    problem = evaluate_run(run, Options((run,), radii=RADII, draws=1))
    assert problem.startswith("DataError: cifar10: there is no folder")
    assert evaluate_run(run, Options((run,), radii=RADII, draws=1, data_dir=moved)) is None


@pytest.mark.parametrize("name", COLOUR_CORRUPTIONS)
def test_colour_images_are_changed_more_by_a_higher_severity_and_stay_images(name):
    pixels = torch.rand(4, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    pixels = torch.nn.functional.interpolate(pixels, [32, 32], mode="bilinear")  # as smooth as photographs
    corrupted = [COLOUR_CORRUPTIONS[name](pixels, severity).clamp(0, 1) for severity in SEVERITIES]
    distances = [(version - pixels).norm().item() for version in corrupted]
    assert 0 < distances[0] < distances[-1]
    assert all(version.shape == pixels.shape for version in corrupted)
    assert torch.equal(COLOUR_CORRUPTIONS[name](pixels, 3).clamp(0, 1), corrupted[2])


def test_corruptions_of_colour_act_on_pixels_and_those_of_grey_images_on_what_the_network_sees():
    assert corruptions_of(DIGITS) == CORRUPTIONS
    data = DIGITS._replace(
        sample_shape=(3, 8, 8), mean=torch.tensor([0.5, 0.4, 0.3]), std=torch.tensor([0.2, 0.3, 0.4])
    )
    mean, std = (part.view(-1, 1, 1) for part in (data.mean, data.std))
    pixels = torch.rand(2, 3, 8, 8)
    brighter = corruptions_of(data)["brightness"]((pixels - mean) / std, 5) * std + mean
    expected = (pixels.amax(1) + 0.3).clamp(max=1)  # the value of hue, saturation and value
    torch.testing.assert_close(brighter.amax(1), expected)


def test_calibration_is_the_gap_between_confidence_and_accuracy_over_15_bins(run, measured):
    data = DIGITS
    probabilities = scores(network(run), data, data.test)[0].softmax(dim=1)
    confidence, label = (each.numpy() for each in probabilities.max(dim=1))
    right = label == data.test.labels.numpy()
    bins = np.minimum((confidence * 15).astype(int), 14)
    gaps = [abs((confidence[bins == b] - right[bins == b]).sum()) / len(right) for b in range(15)]
    assert measured["ece"] == pytest.approx(100 * sum(gaps), abs=1e-3)
    log_probability = probabilities[range(len(right)), data.test.labels].log().mean().item()
    assert measured["loss"] == pytest.approx(-log_probability, rel=1e-4)


def test_corrupted_samples_are_the_test_samples(run, measured):
    assert {name: len(errors) for name, errors in measured["corruptions"].items()} == dict.fromkeys(CORRUPTIONS, 5)
    ((samples, labels),) = evaluation_batches(DIGITS, DIGITS.test, batch_size=len(DIGITS.test))
    with torch.no_grad():
        wrong = network(run)(noise(samples, 3)).argmax(1) != labels
    assert measured["corruptions"]["noise"][2] == pytest.approx(100 * wrong.double().mean().item())


def test_fewer_test_samples_are_those_that_errors_are_measured_on(run):
    assert evaluate_run(run, Options((run,), radii=RADII, draws=1, samples=50, test_samples=100, again=True)) is None
    found = read_evaluation(run)
    given, labels = scores(network(run), DIGITS, DIGITS.test)
    assert found["test_samples"] == 100
    assert found["test_error"] == pytest.approx((given[:100].argmax(1) != labels[:100]).double().mean().item() * 100)


def test_fewer_samples_shorten_the_curves_data_alone(run, measured):
    assert evaluate_run(run, Options((run,), radii=RADII, samples=100)) is None
    fewer = read_evaluation(run)
    assert fewer["test_error"] == measured["test_error"]
    assert fewer["random"][0] == pytest.approx(round(fewer["random"][0]))  # hundredths of 100 samples
    (run / EVALUATION).write_text(json.dumps(measured))


def test_what_is_measured_is_passed_over_and_what_fails_does_not_stop_the_rest(
    run, measured, tmp_path, capsys, in_this_process
):
    foreign = write_run(tmp_path / "foreign", data={"name": "cifar10", "folder": Path("nowhere")})
    fresh = tmp_path / "fresh"
    fresh.mkdir()
    for file in ("config.json", "metrics.csv", "model.safetensors"):
        (fresh / file).write_bytes((run / file).read_bytes())
    (run / EVALUATION).write_text("{}")
    with pytest.raises(FolderError, match=r"1 of 2 runs.*\n.*foreign: DataError: cifar10: there is no folder nowhere"):
        evaluate_all([run, foreign, fresh], Options((), radii=RADII, draws=2, processes=1))
    assert "3 finished runs, 1 of them measured already" in capsys.readouterr().out
    assert (run / EVALUATION).read_text() == "{}"
    assert read_evaluation(fresh) == measured
    assert not (foreign / EVALUATION).exists()
    assert evaluate_run(run, Options((run,), radii=RADII, draws=2)) is None  # as --again does
    assert read_evaluation(run) == measured


def test_settings_that_fit_no_run_are_refused_at_once():
    with pytest.raises(SettingError, match="ascending"):
        Options((), radii=(0.5, 1.5))
    with pytest.raises(SettingError, match="--samples must be 0 or more, not -1"):
        Options((), samples=-1)


def test_corruptions_and_shifts_are_left_out_on_request(run):
    measured = evaluate(load_network(run, read_config(run / "config.json"), DIGITS), DIGITS, Options((run,), samples=0))
    assert "test_error" in measured
    assert not {"corruptions", "area", "random", "adversarial"} & set(measured)


def test_a_run_that_was_not_measured_is_named_with_the_command(tmp_path):
    with pytest.raises(FolderError, match=r"experiments evaluate --again .*nothing"):
        read_evaluation(tmp_path / "nothing")
