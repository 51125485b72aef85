"""The subclasses of the `Trainer` of transformers, against loops written by hand, which have the same random signs."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from small import convolutional, images
from torch import Tensor, nn

from apart_func import APART, SettingError, UsageError

transformers = pytest.importorskip("transformers", reason="needs transformers: pip install 'apart_func[frameworks]'")

from apart_func.integrations.transformers import OnePassTrainer, TwoPassTrainer  # noqa: E402

EPSILON, GROUPS, LEARNING_RATE, SAMPLES, STEPS = 0.2, 2, 0.1, 8, 4
# Rounding of float64 in another order, and its growth over a few steps.
ROUNDING = {"rtol": 1e-9, "atol": 1e-13}
both_forms = pytest.mark.parametrize("form", ["one pass", "two passes"])


class Model(nn.Module):
    """A model as the `Trainer` takes it: its forward has the loss."""

    accepts_loss_kwargs = False

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.net = convolutional(dtype=dtype)

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.net(x)
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


class InOrder(transformers.Trainer):
    """A `Trainer` that takes images in their order, and seeds the random signs of each micro-batch."""

    micro_batches = 0

    def _get_train_sampler(self, *args: Any) -> Any:
        return torch.utils.data.SequentialSampler(self.train_dataset)

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        torch.manual_seed(self.micro_batches)
        self.micro_batches += 1
        return super().training_step(*args, **kwargs)


class OnePass(InOrder, OnePassTrainer):
    """As a user would have it."""


class TwoPasses(InOrder, TwoPassTrainer):
    """As a user would have it."""


def dataset(dtype: torch.dtype = torch.float64, steps: int = STEPS) -> list[dict[str, Tensor]]:
    batches = [images(SAMPLES, dtype, seed=t) for t in range(steps)]
    return [{"x": x, "labels": y} for batch in batches for x, y in zip(*batch, strict=True)]


def trainer(form: str, folder: Path, dtype: torch.dtype = torch.float64, **options: Any) -> Any:
    """A `Trainer` on the CPU, with SGD at a constant rate."""
    fixed = {"use_cpu": True, "disable_tqdm": True, "report_to": "none", "save_strategy": "no", "max_grad_norm": 0.0}
    fixed |= {"num_train_epochs": 1, "optim": "sgd", "lr_scheduler_type": "constant", "learning_rate": LEARNING_RATE}
    fixed |= {"per_device_train_batch_size": SAMPLES, "dataloader_drop_last": True, "logging_strategy": "no"}
    return (OnePass if form == "one pass" else TwoPasses)(
        Model(dtype),
        transformers.TrainingArguments(str(folder), **(fixed | options)),
        train_dataset=dataset(dtype),
        eval_dataset=dataset(dtype, steps=1),
        epsilon=EPSILON,
        groups=GROUPS,
    )


def by_hand(form: str, accumulated: int = 1, dtype: torch.dtype = torch.float64, autocast: bool = False) -> nn.Module:
    """The same training, with the contexts of `APART` in a loop."""
    model = Model(dtype)
    apart, optimizer = APART(model, EPSILON, GROUPS), torch.optim.SGD(model.parameters(), LEARNING_RATE)
    for t in range(STEPS):
        torch.manual_seed(t)
        contexts = [apart.one_pass()] if form == "one pass" else [apart.to_proxy(), apart.to_adver()]
        for context in contexts:
            with context:
                with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                    loss = model(*images(SAMPLES, dtype, seed=t))["loss"]
                (loss / accumulated / len(contexts)).backward()
        if (t + 1) % accumulated == 0:
            optimizer.step()
            optimizer.zero_grad()
    return model


def assert_same(one: nn.Module, other: nn.Module, **tolerance: Any) -> None:
    torch.testing.assert_close(dict(one.state_dict()), dict(other.state_dict()), **(tolerance or ROUNDING))


@both_forms
@pytest.mark.parametrize("accumulated", [1, 2])
def test_training_takes_the_steps_of_the_loop_by_hand(form: str, accumulated: int, tmp_path: Path) -> None:
    run = trainer(form, tmp_path, gradient_accumulation_steps=accumulated)
    run.train()
    assert_same(run.model, by_hand(form, accumulated))


@both_forms
def test_evaluation_during_training_changes_no_step(form: str, tmp_path: Path) -> None:
    run = trainer(form, tmp_path, eval_strategy="steps", eval_steps=1)
    run.train()
    assert_same(run.model, by_hand(form))


@both_forms
def test_autocast_is_that_of_a_loop_by_hand(form: str, tmp_path: Path) -> None:
    run = trainer(form, tmp_path, torch.float32, bf16=True)
    run.train()
    # The weight ½ is exact, and the order of float32 sums is another one.
    assert_same(run.model, by_hand(form, dtype=torch.float32, autocast=True), rtol=1e-4, atol=1e-6)


@both_forms
def test_the_clean_loss_is_logged(form: str, tmp_path: Path) -> None:
    run = trainer(form, tmp_path, logging_strategy="steps", logging_steps=1, max_steps=1)
    run.train()
    model = Model()
    torch.manual_seed(0)
    apart = APART(model, EPSILON, GROUPS)
    with apart.one_pass() if form == "one pass" else apart.to_proxy():
        loss = model(*images(SAMPLES, seed=0))["loss"]
    assert run.state.log_history[0]["loss"] == pytest.approx(loss.item(), abs=1e-4)  # the Trainer logs four digits


def test_a_resumed_run_ends_bit_for_bit_as_an_undisturbed_one(tmp_path: Path) -> None:
    undisturbed, resumed = (trainer("one pass", tmp_path, save_strategy="steps", save_steps=2) for _ in range(2))
    undisturbed.train()
    resumed.micro_batches = 2
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert (undisturbed.state.global_step, resumed.state.global_step) == (STEPS, STEPS)
    assert_same(resumed.model, undisturbed.model, rtol=0, atol=0)


def test_the_radius_is_set_before_training_or_during_it(tmp_path: Path) -> None:
    run = trainer("one pass", tmp_path)
    run.apart.set_epsilon(EPSILON / 2)
    run.train()
    assert all((part.abs() == EPSILON / 2).all() for shift in run.apart.perturbation.values() for part in shift)


@both_forms
def test_an_error_leaves_the_trainer_as_it_was(form: str, tmp_path: Path) -> None:
    run = trainer(form, tmp_path)
    run.model.net[-1] = nn.Linear(1, 1, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        run.train()
    assert "backward" not in vars(run.accelerator)
    assert all("forward" not in vars(layer) for layer in run.model.modules())


def test_what_cannot_work_is_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="dataloader_drop_last=True"):
        trainer("one pass", tmp_path, dataloader_drop_last=False)
    run = OnePass(Model(), trainer("one pass", tmp_path).args, train_dataset=dataset(), epsilon=0.2, groups=1)
    with pytest.raises(SettingError, match="groups=1"):
        run.train()
    monkeypatch.setattr(transformers.TrainingArguments, "n_gpu", 2)
    with pytest.raises(UsageError, match="torchrun"):
        trainer("one pass", tmp_path)


RANKS = """
import os, sys, torch
import torch.distributed as dist
from pathlib import Path
from test_transformers import trainer
run = trainer(sys.argv[1], Path(sys.argv[2]), ddp_backend="gloo", gradient_accumulation_steps=2)
run.train()
assert type(run.apart.model).__name__ == "DistributedDataParallel"
values = torch.cat([part for shift in run.apart.perturbation.values() for part in shift])
values = torch.cat([values, *(parameter.detach().flatten() for parameter in run.model.parameters())])
of_first = values.clone()
dist.broadcast(of_first, 0)
assert torch.equal(values, of_first)
(Path(sys.argv[2]) / f"agrees-{dist.get_rank()}").touch()
dist.barrier()
dist.destroy_process_group()
os._exit(0)  # threads of the data loaders and of gloo may abort an interpreter that ends
"""


@pytest.mark.slow
@both_forms
def test_ranks_have_one_perturbation(form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "ranks.py"
    script.write_text(RANKS)
    monkeypatch.setenv("PYTHONPATH", ":".join([str(Path(__file__).parent), *sys.path]))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run([*command, str(script), form, str(tmp_path)], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in tmp_path.glob("agrees-*")) == ["agrees-0", "agrees-1"]
