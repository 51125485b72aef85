"""The ensemble example: networks trained together are those trained one by one, and the program runs."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import ensemble
import pytest
import torch
import torch.nn.functional as F
from experiments.bundled import Split

from apart_func import assign_grads_, load_state_, make_apart_step, split_state

SETTINGS = ensemble.Settings(epsilons=(0.05, 0.2), seeds=2, epochs=1, width=4, batch_size=8, compile=False)
STEPS = 3


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def random_batches() -> list[Split]:
    generator = torch.Generator().manual_seed(0)
    members = len(SETTINGS.epsilons) * SETTINGS.seeds
    return [
        Split(
            torch.randn(members, 8, 1, 8, 8, generator=generator, dtype=torch.float64),
            torch.randint(10, (members, 8), generator=generator),
        )
        for _ in range(STEPS)
    ]


def test_networks_together_are_the_networks_one_by_one():
    """A few steps in float64, against torch.optim.SGD on each network by itself."""
    models = [model.double() for model in ensemble.make_models(SETTINGS)]
    epsilons = torch.tensor(SETTINGS.epsilons, dtype=torch.float64).repeat_interleave(SETTINGS.seeds)
    batches, lr = random_batches(), torch.tensor(0.1, dtype=torch.float64)

    update = ensemble.make_update(models[0], SETTINGS)
    members = ensemble.stack(models)
    for batch in batches:
        members, losses = update(members, epsilons, batch, lr)

    for i, model in enumerate(models):
        start = {name: p.detach().clone() for name, p in model.named_parameters()}
        step = make_apart_step(model, F.cross_entropy, groups=SETTINGS.groups)
        optimizer = torch.optim.SGD(
            model.parameters(), lr.item(), momentum=SETTINGS.momentum, weight_decay=SETTINGS.weight_decay
        )
        for batch in batches:
            params, buffers = split_state(model)
            out = step(params, buffers, (batch.images[i], batch.labels[i]), epsilon=epsilons[i])
            load_state_(model, params, out.buffers)
            assign_grads_(model, out.grads)
            optimizer.step()
        # The order of float64 sums differs, and three steps amplify it a little.
        torch.testing.assert_close(losses[i], out.loss, rtol=1e-8, atol=1e-10)
        params, buffers = split_state(model)
        for name, param in params.items():
            moved = members.params[name][i] - start[name]
            assert moved.abs().max() > 0
            torch.testing.assert_close(moved, param - start[name], rtol=1e-7, atol=1e-10)
        for name, buffer in buffers.items():
            torch.testing.assert_close(members.buffers[name][i], buffer, rtol=1e-8, atol=1e-10)


def test_networks_of_a_seed_start_equal_and_see_the_same_batches():
    first, second, other_radius, _ = ensemble.make_models(SETTINGS)
    for a, b, c in zip(first.parameters(), second.parameters(), other_radius.parameters(), strict=True):
        assert torch.equal(a, c)
        assert a.dim() == 1 or not torch.equal(a, b)  # batch norm starts alike everywhere
    batch = next(iter(ensemble.batches_of_all(ensemble.load("digits"), SETTINGS)))
    assert batch.images.shape == (4, 8, 1, 8, 8)
    assert torch.equal(batch.images[0], batch.images[2])
    assert not torch.equal(batch.images[0], batch.images[1])


def test_the_error_is_that_of_each_network():
    models = ensemble.make_models(SETTINGS)
    data = ensemble.load("digits")
    members = ensemble.stack(models)
    errors = ensemble.errors_of_all(ensemble.functionalize(models[0]), members, data.test)
    for model, error in zip(models, errors, strict=True):
        wrong = model.eval()(data.test.images).argmax(dim=1) != data.test.labels
        # a score or two may be a tie to rounding
        assert error.item() == pytest.approx(100 * wrong.double().mean().item(), abs=0.2)


@pytest.mark.parametrize("changes", [{"epsilons": ()}, {"seeds": 0}, {"epochs": 0}])
def test_settings_that_cannot_be_trained_are_refused(changes):
    with pytest.raises(ValueError, match="at least one"):
        replace(SETTINGS, **changes)


def test_training_learns_and_writes_errors_and_figure(tmp_path, capsys):
    settings = replace(SETTINGS, epochs=10, width=8, batch_size=32, out=tmp_path / "new")
    curves = ensemble.main(settings)
    assert curves.errors.shape == curves.losses.shape == (10, 4)
    assert curves.losses[-1].mean() < curves.losses[0].mean()
    assert curves.errors[-1].mean() < 70  # chance is 90
    table = json.loads((tmp_path / "new" / "ensemble.json").read_text(encoding="utf-8"))
    assert table["test_errors"]["0.2"] == curves.errors[-1, 2:].tolist()
    assert table["environment"]["torch"] == torch.__version__
    assert (tmp_path / "new" / "ensemble.png").read_bytes().startswith(b"\x89PNG")
    assert "ε = 0.05" in capsys.readouterr().out


@pytest.mark.slow
def test_the_compiled_program_runs_and_trains_as_the_other(tmp_path):
    errors = {}
    for flag in ("--compile", "--no-compile"):
        command = [sys.executable, str(Path(ensemble.__file__)), flag, "--epsilons", "0.1", "--seeds", "2"]
        command += ["--epochs", "2", "--width", "4", "--out", str(tmp_path / flag)]
        subprocess.run(command, check=True, capture_output=True)
        table = json.loads((tmp_path / flag / "ensemble.json").read_text(encoding="utf-8"))
        errors[flag] = table["test_errors"]["0.1"]
    # Eight steps amplify float32 rounding, so that a few of the 1241 images change their class.
    assert errors["--compile"] == pytest.approx(errors["--no-compile"], abs=1.0)
