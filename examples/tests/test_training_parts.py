"""The parts of the training program: its steps, what they move, its checkpoints and settings."""

from __future__ import annotations

import copy
import math
import os
import signal
import time
from collections.abc import Callable
from typing import Any, get_args

import pytest
import torch
import torch.nn.functional as F
from experiments import machine
from experiments.datasets import NAMES
from experiments.learner import Learner, NonFiniteError
from experiments.logs import learning_rate
from experiments.machine import noted_signals
from experiments.methods import PASSES, initially_carried, make_step, with_ghost_noise
from experiments.runs import CheckpointError, load_checkpoint, save_checkpoint, write_whole
from experiments.settings import (
    DataName,
    DataSettings,
    MachineSettings,
    MethodName,
    MethodSettings,
    Settings,
    SettingsError,
    TrainingSettings,
    as_json,
    from_json,
)
from experiments.train import PRESETS
from torch import Tensor, nn

from apart_func import (
    Perturbation,
    StepOutput,
    adversarial_pass,
    assign_grads_,
    functionalize,
    init_perturbation,
    l2_perturbation,
    make_apart_step,
    make_one_pass_step,
    random_sign_perturbation,
    sign_perturbation,
    split_state,
)

METHODS = get_args(MethodName)


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(4 * 4 * 4, 3)
    )


def batch_of(count: int = 16, seed: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 1, 6, 6, generator=generator), torch.randint(3, (count,), generator=generator)


def learner_of(model: nn.Module | None = None, method: str = "plain", **training: Any) -> Learner:
    settings = Settings(method=MethodSettings(method, groups=4), training=TrainingSettings(**training))
    return Learner([model or network()], [settings])


def first_step(
    model: nn.Module, settings: MethodSettings, dtype: torch.dtype | None = None
) -> Callable[..., StepOutput]:
    """A method's step with what it carries at first, and what comes out but for that."""
    step, carried = make_step(model, settings, dtype), initially_carried(model, settings)
    return lambda params, buffers, batch, **keywords: step(params, buffers, batch, carried, **keywords)[0]


def take(learner: Learner, steps: int = 1, lr: float = 0.1) -> None:
    for number in range(1, steps + 1):
        learner.train([batch_of(seed=number)], lr, 1, number)


# steps


def test_the_plain_step_is_an_ordinary_forward_and_backward():
    model, (images, labels) = network(), batch_of()
    out = first_step(model, MethodSettings("plain"))(*split_state(model), (images, labels))
    ordinary = copy.deepcopy(model)
    loss = F.cross_entropy(ordinary(images), labels)
    loss.backward()
    assert out.loss == loss
    assert out.adversarial_loss.isnan()
    assert out.grads.keys() == dict(ordinary.named_parameters()).keys()
    for name, parameter in ordinary.named_parameters():
        assert torch.equal(out.grads[name], parameter.grad)
    for name, buffer in ordinary.named_buffers():
        assert torch.equal(out.buffers[name], buffer)


def test_the_sam_step_has_the_gradient_of_the_package():
    from pytorch_optimizer import SAM

    model, (images, labels) = network(), batch_of()
    out = first_step(model, MethodSettings("sam", rho=0.1))(*split_state(model), (images, labels))
    other = copy.deepcopy(model)
    optimizer = SAM(other.parameters(), torch.optim.SGD, rho=0.1, lr=0.0)
    F.cross_entropy(other(images), labels).backward()
    optimizer.first_step(zero_grad=True)
    second_loss = F.cross_entropy(other(images), labels)
    second_loss.backward()
    torch.testing.assert_close(out.adversarial_loss, second_loss.detach())
    for name, parameter in other.named_parameters():
        # They differ in how the norm is rounded, and the package adds 1e-12 to it.
        torch.testing.assert_close(out.grads[name], parameter.grad, rtol=1e-4, atol=1e-6)


def test_sam_moves_the_running_statistics_by_its_first_pass_alone():
    model, batch = network(), batch_of()
    params, buffers = split_state(model)
    sam = first_step(model, MethodSettings("sam"))(params, buffers, batch)
    plain = first_step(model, MethodSettings("plain"))(params, buffers, batch)
    for name, buffer in plain.buffers.items():
        assert torch.equal(sam.buffers[name], buffer)


@pytest.mark.parametrize("method", METHODS)
def test_a_step_changes_nothing(method):
    model, batch = network(), batch_of()
    before = copy.deepcopy(model.state_dict())
    params, buffers = split_state(model)
    out = first_step(model, MethodSettings(method, groups=4))(params, buffers, batch)
    assert out.all_finite
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("method", METHODS)
def test_low_precision_reaches_the_activations_and_not_the_gradients(method):
    model, batch = network(), batch_of()
    out = first_step(model, MethodSettings(method, groups=4), torch.bfloat16)(*split_state(model), batch)
    assert out.output.dtype == torch.bfloat16
    assert {grad.dtype for grad in out.grads.values()} == {torch.float32}


@pytest.mark.slow
@pytest.mark.parametrize("method", ["plain", "sam", "one_pass"])
def test_a_step_compiles_into_one_graph(method):
    model, batch = network(), batch_of()
    step = first_step(model, MethodSettings(method, groups=4))
    params, buffers = split_state(model)
    eager, compiled = step(params, buffers, batch), torch.compile(step, fullgraph=True)(params, buffers, batch)
    for name, grad in eager.grads.items():
        torch.testing.assert_close(compiled.grads[name], grad)
    for name, buffer in eager.buffers.items():
        torch.testing.assert_close(compiled.buffers[name], buffer)


def test_every_method_has_names_for_its_passes():
    assert set(PASSES) == set(METHODS)


@pytest.mark.parametrize(
    ("rule", "function"),
    [
        ("sign", sign_perturbation),
        ("random_sign", random_sign_perturbation),
        ("l2", l2_perturbation),
    ],
)
def test_a_rule_is_the_library_s(rule, function):
    model, batch = network(), batch_of()
    settings = MethodSettings("apart", rule=rule, groups=4)
    outs = []
    for step in (first_step(model, settings), make_apart_step(model, F.cross_entropy, groups=4, rule=function)):
        torch.manual_seed(0)
        outs.append(step(*split_state(model), batch))
    for layer, shift in outs[1].perturbation.items():
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(outs[0].perturbation[layer], shift, strict=True))


# ghost noise, and what perturbed statistics are in one group


def test_ghost_noise_normalises_every_sample_by_a_random_group_that_no_gradient_goes_through():
    layer = nn.BatchNorm2d(3).double()
    with torch.no_grad():
        layer.weight.uniform_(0.5, 2)
        layer.bias.normal_()
    gamma, beta = layer.weight.detach()[:, None, None], layer.bias.detach()[:, None, None]
    x, weights = torch.randn(2, 8, 3, 5, 5, dtype=torch.float64)
    x.requires_grad_()
    torch.manual_seed(0)
    output = with_ghost_noise(nn.Sequential(layer), size=4)(x)
    (output * weights).sum().backward()

    torch.manual_seed(0)
    groups = torch.randint(8, (8, 4))
    other = x.detach().clone().requires_grad_()
    mean = other.mean((0, 2, 3))[:, None, None]
    s = (other.var((0, 2, 3), correction=0) + layer.eps).sqrt()[:, None, None]
    expected = []
    for sample, group in zip(other, groups, strict=True):
        ghosts = other.detach()[group]
        ghost_mean = ghosts.mean((0, 2, 3))[:, None, None]
        ghost_s = (ghosts.var((0, 2, 3), correction=0) + layer.eps).sqrt()[:, None, None]
        shift = (ghost_mean - mean.detach()) / s.detach()
        expected.append(gamma * ((sample - mean) / s - shift) * (s.detach() / ghost_s) + beta)
    (torch.stack(expected) * weights).sum().backward()
    torch.testing.assert_close(output, torch.stack(expected))
    torch.testing.assert_close(x.grad, other.grad)


def test_ghost_noise_is_off_in_evaluation_and_knows_no_other_batch_norm():
    from timm.layers import BatchNormAct2d

    model, x = nn.Sequential(nn.BatchNorm1d(3)).eval(), torch.randn(4, 3)
    assert torch.equal(with_ghost_noise(model, 2)(x), model(x))
    with pytest.raises(SettingsError, match="ghost noise does not know BatchNormAct2d, layer '0'"):
        with_ghost_noise(nn.Sequential(BatchNormAct2d(3)), 2)


def test_at_one_group_the_adversarial_pass_is_a_move_of_scale_and_bias():
    torch.manual_seed(0)
    layer, x = nn.BatchNorm1d(5).double(), 2 + torch.randn(16, 5, dtype=torch.float64)
    shift = Perturbation(*torch.tensor([[0.1], [-0.2]], dtype=torch.float64).expand(2, 5))
    model, seen = nn.Sequential(layer), []

    def loss(y: Tensor, _: Tensor) -> Tensor:
        seen.append(y.detach())
        return y.sum()

    adversarial_pass(functionalize(model), loss, *split_state(model), (x, x), {"0": shift})
    mean, s = x.mean(0), (x.var(0, correction=0) + layer.eps).sqrt()
    scale = layer.weight * (1 - 0.2)
    moved = F.batch_norm(x, None, None, scale, layer.bias - scale * 0.1 * mean / s, training=True, eps=layer.eps)
    torch.testing.assert_close(seen[0], moved.detach(), rtol=0, atol=2e-15)  # a few roundings of float64


@pytest.mark.parametrize("method", get_args(MethodName))
def test_smoothed_labels_reach_the_loss_of_every_method(method):
    model, losses = network(), []
    for smoothing in (0.0, 0.3):
        torch.manual_seed(0)
        settings = MethodSettings(method, groups=4, label_smoothing=smoothing)
        losses.append(first_step(model, settings)(*split_state(model), batch_of()).loss)
    assert losses[0] != losses[1]


# the learner


@pytest.mark.parametrize("nesterov", [False, True])
def test_plain_steps_are_those_of_an_ordinary_loop(nesterov):
    model = network()
    other = copy.deepcopy(model)
    learner = learner_of(model, momentum=0.9, nesterov=nesterov, weight_decay=5e-4, clip=0.5)
    optimizer = torch.optim.SGD(other.parameters(), lr=0.1, momentum=0.9, nesterov=nesterov, weight_decay=5e-4)
    for number in range(3):
        images, labels = batch_of(seed=number)
        learner.train([(images, labels)], 0.1, 1, number)
        optimizer.zero_grad()
        F.cross_entropy(other(images), labels).backward()
        nn.utils.clip_grad_norm_(other.parameters(), 0.5)
        optimizer.step()
    trained = learner.evaluated(0).state_dict()
    for name, tensor in other.state_dict().items():
        assert torch.equal(trained[name], tensor)


def test_one_pass_steps_carry_the_perturbation():
    model, other = network(), network()
    learner = Learner([model], [Settings(method=MethodSettings("one_pass", groups=4, clean_fraction=0.75))])
    options = {"epsilon": 0.1, "groups": 4, "clean_fraction": 0.75, "rule": sign_perturbation}
    step = make_one_pass_step(other, F.cross_entropy, **options)
    optimizer = torch.optim.SGD(other.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    (params, buffers), perturbation = split_state(other), init_perturbation(other)
    for number in (1, 2, 3):
        learner.train([batch_of(seed=number)], 0.1, 1, number)
        out = step(params, buffers, batch_of(seed=number), perturbation)
        buffers, perturbation = out.buffers, out.perturbation
        assign_grads_(other, out.grads)
        optimizer.step()
    assert perturbation["1"].mean.abs().max() > 0
    for name, param in params.items():
        assert torch.equal(learner.state["params"][name], param)


def test_a_rehearsal_changes_nothing():
    learner = learner_of(nn.Sequential(network(), nn.Dropout(0.5)), "apart")
    before, state = copy.deepcopy(learner.state_dict()), torch.get_rng_state()
    learner.rehearse(batch_of())
    assert torch.equal(torch.get_rng_state(), state)
    for kind in ("params", "buffers"):
        for name, tensor in learner.state_dict()[kind].items():
            assert torch.equal(tensor, before[kind][name])


# steps that are not finite


def test_a_step_that_is_not_finite_moves_nothing():
    learner = learner_of()
    before = copy.deepcopy(learner.state_dict())
    with pytest.raises(NonFiniteError, match="epoch 2, step 7 is not finite"):
        learner.train([(batch_of()[0] * math.nan, batch_of()[1])], 0.1, epoch=2, step=7)
    for kind in ("params", "buffers", "momenta"):
        for name, tensor in learner.state_dict()[kind].items():
            assert torch.equal(tensor, before[kind][name])


# checkpoints


def test_a_checkpoint_comes_back_and_the_newest_wins(tmp_path):
    assert load_checkpoint(tmp_path) is None
    for step in (9, 10, 11):
        save_checkpoint(tmp_path, step, {"step": step, "tensors": {"a": torch.arange(3.0)}, "rows": [{"x": None}]})
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["step-000000010.pt", "step-000000011.pt"]
    state = load_checkpoint(tmp_path)
    assert state["step"] == 11
    assert state["rows"] == [{"x": None}]
    assert torch.equal(state["tensors"]["a"], torch.arange(3.0))


@pytest.mark.parametrize("damage", ["flipped", "truncated", "empty"])
def test_a_damaged_checkpoint_is_set_aside_with_a_warning(damage, tmp_path):
    for step in (1, 2):
        save_checkpoint(tmp_path, step, {"step": step, "weights": torch.full((1000,), float(step))})
    newest = tmp_path / "step-000000002.pt"
    content = newest.read_bytes()
    middle = len(content) // 2
    flipped = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
    newest.write_bytes({"flipped": flipped, "truncated": content[:middle], "empty": b""}[damage])
    with pytest.warns(UserWarning, match="is damaged and was set aside"):
        assert load_checkpoint(tmp_path)["step"] == 1
    assert (tmp_path / "step-000000002.damaged").exists()


@pytest.mark.parametrize(
    "error", [MemoryError(), OSError(5, "Input/output error"), RuntimeError("can't allocate memory")]
)
@pytest.mark.parametrize("reader", ["torch.load", "pathlib.Path.read_bytes"])
def test_a_checkpoint_that_cannot_be_read_for_the_moment_is_left_alone(reader, error, tmp_path, monkeypatch):
    if reader != "torch.load" and isinstance(error, RuntimeError):
        pytest.skip("that is an error of PyTorch's allocator")

    def fail(*_, **__):
        raise error

    save_checkpoint(tmp_path, 1, {"step": 1})
    with monkeypatch.context() as patched:
        patched.setattr(reader, fail)
        with pytest.raises(CheckpointError, match=r"cannot be read for the moment .* go on with --resume"):
            load_checkpoint(tmp_path)
    assert load_checkpoint(tmp_path)["step"] == 1


def test_when_all_checkpoints_are_damaged_the_run_does_not_silently_begin_anew(tmp_path):
    save_checkpoint(tmp_path, 1, {})
    (tmp_path / "step-000000001.pt").write_bytes(b"")
    with pytest.warns(UserWarning, match="damaged"), pytest.raises(CheckpointError, match="all checkpoints in"):
        load_checkpoint(tmp_path)


def test_a_checkpoint_cannot_run_code(tmp_path):
    class Malicious:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    save_checkpoint(tmp_path / "checkpoints", 1, {"state": Malicious()})
    with pytest.warns(UserWarning, match="damaged"), pytest.raises(CheckpointError):
        load_checkpoint(tmp_path / "checkpoints")
    assert not (tmp_path / "ran").exists()


def test_what_a_killed_process_has_begun_to_write_is_swept_away(tmp_path):
    save_checkpoint(tmp_path, 1, {"step": 1})
    (tmp_path / "step-000000002.pt.tmp").write_bytes(b"half")
    assert load_checkpoint(tmp_path) == {"step": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["step-000000001.pt"]


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_whole(path, b"old")

    def fail(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="No space left"):
        write_whole(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


# signals


def test_a_signal_is_noted_and_its_double_too():
    before = signal.getsignal(signal.SIGINT)
    with noted_signals() as noted:
        assert noted() is None
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGINT)
        assert noted() == signal.SIGTERM
    assert signal.getsignal(signal.SIGINT) is before


def test_a_signal_that_is_repeated_later_is_obeyed(monkeypatch):
    monkeypatch.setattr(machine, "PATIENCE", 0.0)
    with noted_signals():
        signal.raise_signal(signal.SIGINT)
        time.sleep(0.01)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


# settings


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


# the processor


def test_a_processor_without_bfloat16_is_named_where_amp_asks_for_it(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "CPUINFO", tmp_path / "cpuinfo")
    machine.prepared_device(MachineSettings(device="cpu"), "bf16")  # a system that does not tell; warnings are errors
    machine.CPUINFO.write_text("flags : avx512f avx512_bf16")
    machine.prepared_device(MachineSettings(device="cpu"), "bf16")
    machine.CPUINFO.write_text("flags : sse avx2 avx512f")
    machine.prepared_device(MachineSettings(device="cpu"))
    with pytest.warns(UserWarning, match="emulates it at a tenth of the speed: leave --amp out"):
        machine.prepared_device(MachineSettings(device="cpu"), "bf16")
