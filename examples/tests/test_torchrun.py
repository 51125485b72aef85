"""The training program under torchrun: one run on several processes, which is that of one process.

With synchronised batch norm the mathematics is the same, so what differs is rounding. Every way of training is compared
in one world of two ranks, in float64; the program itself is started a few times.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from experiments import __main__ as program
from experiments import machine
from experiments import train as training
from experiments.datasets import Share, evaluation_batches, load_dataset, training_batches
from experiments.machine import Interrupted
from experiments.methods import check_fit, initially_carried, make_step
from experiments.networks import make_network
from experiments.runs import read_config
from experiments.settings import DataSettings, MethodSettings, Settings, SettingsError, TrainingSettings
from safetensors.torch import load_file
from small import convolutional, images
from test_distributed import ROUNDING, world
from test_train import EXAMPLES, checkpoints, outcome, rows
from timm.layers import BatchNormAct2d
from torch import Tensor, nn
from torch.multiprocessing.spawn import spawn

from apart_func import RanksError, split_state

RANKS, SAMPLES, GROUPS, EPOCHS = 2, 16, 4, 5


@pytest.fixture
def two_ranks(monkeypatch):
    """What is looked at before there is anything to communicate."""
    monkeypatch.setattr(machine, "world_size", lambda: RANKS)


# steps of every method


METHODS = {
    "plain": MethodSettings("plain"),
    "apart": MethodSettings("apart", groups=GROUPS, ratio=0.5),
    "one_pass": MethodSettings("one_pass", groups=GROUPS),
    "apart_sam": MethodSettings("apart_sam", groups=GROUPS),
    "sam": MethodSettings("sam"),
}


def three_steps(model: nn.Module, method: MethodSettings, share: Share) -> dict[str, Any]:
    """Losses, parameters and buffers after three steps of a rank, each on its share of 16 samples."""
    step, carried = make_step(model, method), initially_carried(model, method)
    params, buffers = split_state(model)
    losses = []
    for number in range(3):
        samples, labels = images(SAMPLES, seed=number)
        mine = list(share.of(range(SAMPLES)))
        out, carried = step(params, buffers, (samples[mine], labels[mine]), carried)
        params = {name: (param - 0.1 * out.grads[name]).detach() for name, param in params.items()}
        buffers = out.buffers
        losses += [out.loss.detach(), out.adversarial_loss.detach()]
    return {"losses": torch.stack(losses), **params, **buffers}


def on_rank(rank: int, folder: Path) -> None:
    with world(rank, folder, RANKS):
        share = Share(rank, RANKS, GROUPS)
        found: dict[str, Any] = {}
        for name, method in METHODS.items():
            found[name] = three_steps(nn.SyncBatchNorm.convert_sync_batchnorm(convolutional()), method, share)
        found["gathered"] = machine.gathered(rank), machine.largest(rank, -rank), machine.sum_over_ranks(torch.ones(2))
        try:
            machine.from_first(lambda: [][0])
        except IndexError as error:
            found["raised"] = str(error)
    torch.save(found, folder / f"{rank}.pt")


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("ranks")
    spawn(on_rank, (folder,), nprocs=RANKS)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(RANKS)]


@pytest.mark.parametrize("name", METHODS)
def test_with_synchronised_batch_norm_every_method_is_that_of_one_process(name, found):
    alone = three_steps(convolutional(), METHODS[name], Share())
    for of_rank in found:
        for key, expected in alone.items():
            torch.testing.assert_close(of_rank[name][key], expected, equal_nan=True, **ROUNDING)


@pytest.mark.parametrize("name", METHODS)
def test_ranks_have_the_same_bits(name, found):
    one, other = (of_rank[name] for of_rank in found)
    assert all(torch.equal(one[key].nan_to_num(), other[key].nan_to_num()) for key in one)


def test_ranks_tell_each_other_what_they_have(found):
    for everyone, largest, total in (of_rank["gathered"] for of_rank in found):
        assert (everyone, largest, total.tolist()) == ([0, 1], [1, 0], [2.0, 2.0])


def test_an_error_of_the_first_rank_is_one_of_all(found):
    assert {of_rank["raised"] for of_rank in found} == {"list index out of range"}


# shares


@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("count", [2, 4])
def test_ghost_group_g_is_the_union_of_the_ranks_groups_g(count, groups):
    shares = [Share(rank, count, groups).of(range(32)) for rank in range(count)]
    for group in range(groups):
        united = sorted(sample for share in shares for sample in share[group::groups])
        assert united == list(range(32))[group::groups]


def digits() -> Any:
    return load_dataset(DataSettings("digits"))


@pytest.mark.parametrize("count", [2, 4])
def test_ranks_train_on_the_batches_of_one_process(count):
    keywords: dict[str, Any] = {"batch_size": 32, "seed": 1, "epoch": 2}
    each = [training_batches(digits(), share=Share(rank, count, 4), **keywords) for rank in range(count)]
    for (whole, labels), *parts in zip(training_batches(digits(), **keywords), *each, strict=True):
        assert len({len(part) for part, _ in parts}) == 1
        united = zip(torch.cat([part for part, _ in parts]), torch.cat([labels for _, labels in parts]), strict=True)
        assert counted(united) == counted(zip(whole, labels, strict=True))


def test_ranks_vary_their_samples_by_draws_of_their_own():
    data = digits()
    noisy = data._replace(train=replace(data.train, vary=torch.rand_like))
    one, other = (next(training_batches(noisy, batch_size=32, seed=1, epoch=0, share=Share(r, 2)))[0] for r in (0, 1))
    assert not torch.equal(one, other)


@pytest.mark.parametrize("count", [2, 3, 2000])
def test_ranks_measure_every_sample_once(count):
    data = digits()
    each = [evaluation_batches(data, data.test, batch_size=100, share=Share(rank, count)) for rank in range(count)]
    found = (sample for batches in each for part in batches for sample in zip(*part, strict=True))
    ((samples, labels),) = evaluation_batches(data, data.test, batch_size=len(data.test))
    assert counted(found) == counted(zip(samples, labels, strict=True))


def counted(samples: Any) -> Counter[tuple[bytes, int]]:
    return Counter((sample.numpy().tobytes(), int(label)) for sample, label in samples)


# what is refused


def test_a_batch_that_the_ranks_do_not_divide_is_refused(two_ranks):
    with pytest.raises(SettingsError, match="a batch of 33 samples cannot be divided among 2 processes"):
        training.training_share(Settings(training=TrainingSettings(batch_size=33)))


def test_runs_that_are_trained_together_are_refused(two_ranks):
    with pytest.raises(SettingsError, match="leave --together to one process"):
        check_fit([Settings(seed=0), Settings(seed=1)])


def test_ghost_groups_that_do_not_divide_a_share_are_refused_by_name(two_ranks):
    settings = Settings(method=MethodSettings(groups=16), training=TrainingSettings(batch_size=16))
    with pytest.raises(SettingsError, match="of 2 processes, each with 8 samples of a batch: groups=16 does not"):
        training.prepared([settings], torch.device("cpu"))


def test_ranks_at_other_runs_are_refused_by_what_differs(monkeypatch):
    monkeypatch.setattr(machine, "gathered", lambda own: [own, own | {"the labels": "others"}])
    with pytest.raises(RanksError, match=r"the labels of rank 1 differ from those of rank 0\. Start"):
        machine.check_ranks_agree(
            {"the weights": [torch.ones(2)], "the labels": [torch.tensor(3), torch.ones(1)]}, "Start again."
        )


@pytest.mark.parametrize(
    ("network", "changes", "message"),
    [("ours", {"compile": True}, "cannot be compiled"), ("timm", {}, "BatchNormAct2d, cannot be synchronised")],
)
def test_what_cannot_be_synchronised_is_refused(network, changes, message, two_ranks):
    model = convolutional()
    if network == "timm":
        model.append(BatchNormAct2d(4))
    settings = Settings(training=TrainingSettings(sync_batch_norm="on", **changes))
    with pytest.raises(SettingsError, match=message):
        training.synchronised(model, settings, torch.device("cpu"))


@pytest.mark.parametrize(("choice", "device", "converts"), [("auto", "cpu", 0), ("auto", "cuda", 2), ("on", "cpu", 2)])
def test_batch_norm_is_synchronised_on_gpus_or_by_wish(choice, device, converts, two_ranks):
    settings = Settings(training=TrainingSettings(sync_batch_norm=choice))
    model = training.synchronised(convolutional(), settings, torch.device(device))
    assert sum(isinstance(layer, nn.SyncBatchNorm) for layer in model.modules()) == converts


def test_the_local_rank_picks_the_gpu_and_one_for_all_is_refused(monkeypatch):
    for name, value in {"TORCHELASTIC_RUN_ID": "none", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    assert (machine.local_device_name("cuda"), machine.local_device_name("cpu")) == ("cuda:1", "cpu")
    with pytest.raises(SettingsError, match="not all cuda:0"):
        machine.local_device_name("cuda:0")


@pytest.mark.parametrize("command", ["sweep", "evaluate"])
def test_commands_of_one_process_are_refused_by_name(command, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert f"error: {command} is a program of one process" in program.main([command])


# the program


def start(out: Path, *flags: str, restarts: int = 0) -> subprocess.Popen[str]:
    """Two processes, on epochs of 16 steps of 16 samples, with a checkpoint every few steps.

    In float32, rounding would flip signs of statistic gradients next to zero; the rule of lengths has no such jumps.
    """
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", f"--max-restarts={restarts}"]
    command += ["-m", "experiments", "train", "--data", "digits", "--batch-size", "16", "--groups", str(GROUPS)]
    command += ["--epochs", str(EPOCHS), "--sync-batch-norm", "on", "--checkpoint-seconds", "0.1"]
    command += ["--rule", "l2", "--epsilon", "0.5"]
    return subprocess.Popen(
        [*command, "--device", "cpu", "--out", str(out), *flags],
        cwd=EXAMPLES,
        env=os.environ | {"GLOO_SOCKET_IFNAME": "lo"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        encoding="utf-8",
    )


def wait_for_epoch(process: subprocess.Popen[str], epoch: int) -> None:
    said = []
    for line in process.stdout:
        said.append(line)
        if line.startswith(f"epoch {epoch}/"):
            return
    pytest.fail(f"the run ended before epoch {epoch}: {''.join(said)}")


def losses(out: Path) -> Tensor:
    return torch.tensor([[float(row["train_loss"]), float(row["adversarial_loss"])] for row in rows(out)])


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    with start(out) as process:
        said = process.communicate()[0]
    assert process.returncode == 0, said
    assert said.count("Network: ") == 1
    return out


@pytest.fixture(scope="module")
def alone(undisturbed, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("alone")
    training.train([replace(read_config(undisturbed / "config.json"), out=out)], lambda progress: None)
    return out


@pytest.mark.slow
def test_two_processes_end_with_one_run_folder_that_is_the_run_of_one(undisturbed, alone):
    assert {path.name for path in undisturbed.iterdir()} == {path.name for path in alone.iterdir()}
    assert [row["step"] for row in rows(undisturbed)] == [row["step"] for row in rows(alone)]
    torch.testing.assert_close(losses(undisturbed), losses(alone), rtol=1e-3, atol=1e-3)
    assert rows(undisturbed)[0]["train_error"] == rows(alone)[0]["train_error"]


@pytest.mark.slow
def test_the_test_error_that_ranks_count_together_is_that_of_the_network(undisturbed):
    data = digits()
    model = make_network("small_resnet", data)
    model.load_state_dict(load_file(undisturbed / "model.safetensors"))
    ((samples, labels),) = evaluation_batches(data, data.test, batch_size=len(data.test))
    assert len(labels) % RANKS  # the ranks' shares are uneven
    wrong = int((model.eval()(samples).argmax(dim=1) != labels).sum())
    assert float(rows(undisturbed)[-1]["test_error"]) == pytest.approx(100 * wrong / len(labels))


@pytest.fixture
def stopped(tmp_path) -> Path:
    """A run of two processes that was asked to stop within an epoch."""
    with start(tmp_path / "run") as process:
        wait_for_epoch(process, 1)
        process.terminate()
        said = process.communicate()[0]
    assert said.count("stopped by SIGTERM; a checkpoint is written") >= 1, said
    assert not (tmp_path / "run" / "model.safetensors").exists()
    return tmp_path / "run"


@pytest.mark.slow
def test_a_run_of_two_processes_goes_on_in_one_and_in_two_again(stopped, alone):
    settings = read_config(stopped / "config.json")
    first = checkpoints(stopped)[-1]

    def stop(progress: Any) -> None:
        if progress.epoch == 2:
            signal.raise_signal(signal.SIGTERM)

    with pytest.raises(Interrupted):
        training.train([settings], stop)
    assert first < checkpoints(stopped)[-1]
    with start(stopped, "--resume") as process:
        said = process.communicate()[0]
    assert process.returncode == 0, said
    torch.testing.assert_close(losses(stopped), losses(alone), rtol=1e-3, atol=1e-3)


def pid_of_rank(launcher: int, rank: int) -> int:
    """Which child of torchrun is that rank."""
    for listed in Path(f"/proc/{launcher}/task").glob("*/children"):
        for child in listed.read_text().split():
            if f"RANK={rank}" in Path(f"/proc/{child}/environ").read_bytes().decode().split("\0"):
                return int(child)
    raise AssertionError(f"rank {rank} is not running")


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds the process of a rank in /proc")
def test_a_run_comes_back_after_a_rank_was_killed_and_ends_as_the_undisturbed_one(undisturbed, tmp_path):
    with start(tmp_path / "killed", restarts=1) as process:
        wait_for_epoch(process, 2)
        os.kill(pid_of_rank(process.pid, 1), signal.SIGKILL)
        said = process.communicate()[0]
    assert process.returncode == 0, said
    assert "exitcode: -9" in said
    assert outcome(tmp_path / "killed") == outcome(undisturbed)
