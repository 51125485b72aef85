"""What perturbed samples would add to the running statistics, on networks that were hardly trained."""

from __future__ import annotations

import copy
from dataclasses import replace

import one_pass_statistics
import pytest
import torch
from evaluate import load_data
from models import small_resnet
from one_pass_statistics import Options, compare, main
from training.loop import train
from training.runs import FolderError
from training.settings import PRESETS, MethodSettings, TrainingSettings


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(one_pass_statistics, "EPOCHS", 1)
    torch.set_num_threads(1)


def settings(epsilon):
    return replace(
        PRESETS["digits"],
        method=MethodSettings(name="one_pass", epsilon=epsilon, groups=2),
        training=TrainingSettings(epochs=1, batch_size=64),
        machine=replace(PRESETS["digits"].machine, tensorboard=False),
    )


def network():
    torch.manual_seed(0)
    return small_resnet(1, 10, width=4, blocks=1)


def test_perturbed_samples_have_other_statistics_the_more_the_larger_the_radius():
    none, some, more = (compare(network(), load_data("digits"), settings(radius)) for radius in (0.0, 0.1, 0.4))
    # Without a perturbation two halves of 128 images differ by chance alone.
    assert none.mean_shift < some.mean_shift < more.mean_shift
    assert none.scale_shift < some.scale_shift < more.scale_shift


def test_statistics_of_all_clean_samples_are_those_of_the_layers_input():
    model = network()
    clean, perturbed = one_pass_statistics._moments(copy.deepcopy(model), load_data("digits"), settings(0.2))
    both = clean["stem.1"] + perturbed["stem.1"]  # nothing before the first layer is perturbed
    # All of the 256 training images but the first batch, by the plain layer.
    images = torch.cat(
        [batch for batch, _ in list(one_pass_statistics._batches(load_data("digits"), settings(0.2)))[1:]]
    )
    with torch.no_grad():
        expected = model.stem[0](images).double()
    torch.testing.assert_close(both.mean, expected.mean((0, 2, 3)), rtol=1e-5, atol=1e-5)  # float32 convolutions
    torch.testing.assert_close(both.var, expected.var((0, 2, 3), unbiased=False), rtol=1e-5, atol=1e-5)


def test_runs_of_other_methods_are_refused(tmp_path):
    run = settings(0.1)
    train(replace(run, method=replace(run.method, name="plain"), out=tmp_path / "plain"))
    with pytest.raises(FolderError, match="none of these runs was trained by one pass"):
        main(Options((tmp_path,)))


def test_a_table_is_printed_for_runs_of_one_pass(tmp_path, capsys):
    train(replace(settings(0.1), out=tmp_path / "one"))
    main(Options((tmp_path,)))
    assert "APART in one" in capsys.readouterr().out
