"""The settings of a run: presets, what is out of range, and what comes back from a stored run."""

from __future__ import annotations

import math
from typing import get_args

import pytest
from experiments.datasets import NAMES
from experiments.settings import (
    METHODS,
    PASSES,
    PRESETS,
    DataName,
    DataSettings,
    MethodSettings,
    Settings,
    SettingsError,
    TrainingSettings,
    as_json,
    from_json,
    learning_rate,
)


def test_every_method_has_names_for_its_passes():
    assert set(PASSES) == set(METHODS)


def test_there_is_a_preset_for_every_data_set():
    assert set(PRESETS) == set(NAMES) == set(get_args(DataName))
    assert all(settings.data.name == name for name, settings in PRESETS.items())


PUBLISHED = {
    #            network            batch  epochs  decay  ε  groups  ρ  crop  milestones
    "cifar10": ("wideresnet40_2", 128, 200, 5e-4, 0.1, 16, 0.2, None, (0.5, 0.75)),
    "cifar100": ("wideresnet40_2", 128, 200, 5e-4, 0.1, 16, 0.2, None, (0.5, 0.75)),
    "tiny-imagenet": ("preact_resnet18", 256, 200, 5e-4, 0.1, 8, 0.2, 64, (0.5, 0.75)),
    "imagenet": ("resnet18", 256, 105, 1e-4, 0.025, 1, 0.025, 224, (30 / 105, 60 / 105, 90 / 105, 100 / 105)),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_presets_are_the_published_settings(name):
    settings = PRESETS[name]
    data, training, method = settings.data, settings.training, settings.method
    of_network = (settings.model.name, training.batch_size, training.epochs, training.weight_decay)
    of_method = (method.epsilon, method.groups, method.rho, data.crop, training.milestones)
    assert PUBLISHED[name] == (*of_network, *of_method)
    assert (training.lr, training.momentum, training.nesterov) == (0.1, 0.9, False)
    assert (training.schedule, training.gamma) == ("steps", 0.1)
    assert (method.ratio, method.label_smoothing) == (1.0, 0.0)
    assert (data.augment, data.train_samples, settings.seed) == (True, None, 42)


@pytest.mark.parametrize("gamma", [0.1, 0.2])
def test_the_learning_rate_falls_by_gamma_at_every_milestone(gamma):
    training = TrainingSettings(lr=0.1, schedule="steps", milestones=(0.5, 0.75), gamma=gamma)
    rates = [learning_rate(training, step / 8) for step in range(8)]
    assert rates == pytest.approx([0.1] * 4 + [0.1 * gamma] * 2 + [0.1 * gamma**2] * 2)


def test_imagenet_has_the_milestones_of_105_epochs_scaled_to_its_own():
    rates = [learning_rate(PRESETS["imagenet"].training, epoch / 105) for epoch in (29.9, 30, 60, 90, 100)]
    assert rates == pytest.approx([0.1, 0.01, 0.001, 1e-4, 1e-5])


def test_the_cosine_falls_to_zero():
    training = TrainingSettings(lr=0.2, schedule="cosine")
    assert [learning_rate(training, done) for done in (0, 0.5, 1)] == pytest.approx([0.2, 0.1, 0])


@pytest.mark.parametrize("name", PRESETS)
def test_settings_come_back_from_json(name):
    assert from_json(as_json(PRESETS[name]) | {"environment": {}}) == PRESETS[name]


def test_options_that_are_gone_are_read_where_they_changed_nothing():
    stored = as_json(Settings())
    stored["method"] |= {"carry": "clean", "every": 1, "epsilon_schedule": "constant"}
    stored["machine"] |= {"log_steps": 7, "tensorboard": False}
    assert from_json(stored) == Settings()
    stored["method"]["every"] = 2
    with pytest.raises(SettingsError, match="every"):
        from_json(stored)


@pytest.mark.parametrize(
    ("part", "changes", "message"),
    [
        ("training", {"optimiser": "adam"}, "optimiser"),
        ("training", {"epochs": "many"}, "epochs"),
        ("training", {"epochs": 0}, "epochs is 0"),
        ("method", {"name": "magic"}, "name"),
    ],
)
def test_stored_settings_that_make_no_sense_are_refused(part, changes, message):
    stored = as_json(Settings())
    stored[part] |= changes
    with pytest.raises(SettingsError, match=message):
        from_json(stored)


@pytest.mark.parametrize(
    ("part", "changes", "message"),
    [
        *((TrainingSettings, {name: 0}, f"{name} is 0") for name in ("epochs", "batch_size", "evaluate_every")),
        *((MethodSettings, {"rho": value}, "rho is") for value in (-0.1, math.nan, math.inf)),
        (MethodSettings, {"name": "sam_on"}, "there is no method 'sam_on'"),
        (DataSettings, {"train_samples": 0}, "train_samples is 0"),
        (Settings, {"seed": -1}, "seed is -1"),
    ],
)
def test_what_is_out_of_range_is_refused_by_name(part, changes, message):
    with pytest.raises(SettingsError, match=message):
        part(**changes)


@pytest.mark.parametrize("stored", [[], 3, None, "text"])
def test_stored_settings_that_are_no_object_are_refused(stored):
    with pytest.raises(SettingsError, match="expected an object of sections"):
        from_json(stored)
