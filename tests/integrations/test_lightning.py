"""The callbacks of Lightning against loops written by hand, which have the same random signs."""

import copy
import importlib
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from loops import both_passes
from small import convolutional, images
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn, update_bn
from torch.utils.data import DataLoader, TensorDataset

from apart_func import APART, BatchError, SettingError, UsageError

EPSILON, GROUPS, RATIO, LEARNING_RATE = 0.2, 2, 0.5, 0.1
# Rounding of float64 in another order, and its growth over a few steps.
ROUNDING = {"rtol": 1e-9, "atol": 1e-13}
STEPS, SAMPLES = 6, 8

lightning = pytest.importorskip("lightning.pytorch", reason="needs Lightning: pip install 'apart_func[lightning]'")

from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging  # noqa: E402
from lightning.pytorch.plugins import MixedPrecision  # noqa: E402
from lightning.pytorch.strategies import DDPStrategy  # noqa: E402
from torchmetrics.classification import MulticlassAccuracy  # noqa: E402

from apart_func.integrations.lightning import OnePassApart, TwoPassApart  # noqa: E402

# Lightning's advice on how to set up a run, such as logging less often than there are steps.
pytestmark = pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning")


class Classifier(lightning.LightningModule):
    """A model, its loss and its optimizer, as anyone writes them."""

    def __init__(self, model: nn.Module | None = None) -> None:
        super().__init__()
        self.model = convolutional() if model is None else model
        self.accuracy = MulticlassAccuracy(3)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        torch.manual_seed(batch_idx)  # of the random signs

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        output = self.model(x)
        loss = F.cross_entropy(output, y)
        self.accuracy(output, y)
        self.log("loss", loss, on_epoch=True)
        self.log("accuracy", self.accuracy, on_epoch=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        self.log("validation loss", F.cross_entropy(self.model(x), y))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), LEARNING_RATE, momentum=0.9)


def batches(dtype: torch.dtype = torch.float64) -> list[tuple[Tensor, Tensor]]:
    return [images(SAMPLES, dtype, seed=t) for t in range(STEPS)]


def loader(dtype: torch.dtype = torch.float64) -> DataLoader[Any]:
    x, y = (torch.cat(parts) for parts in zip(*batches(dtype), strict=True))
    return DataLoader(TensorDataset(x, y), batch_size=SAMPLES)


def fit(
    module: Any, *callbacks: Any, path: Any = None, data: Any = None, val_dataloaders: Any = None, **options: Any
) -> Any:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "max_epochs": 1}
    quiet |= {"enable_checkpointing": False, "accelerator": "cpu", "devices": 1}
    trainer = lightning.Trainer(callbacks=list(callbacks), **(quiet | options))
    trainer.fit(module, loader() if data is None else data, val_dataloaders, ckpt_path=path)
    return trainer


def callback_of(form: str) -> OnePassApart | TwoPassApart:
    return OnePassApart(EPSILON, GROUPS) if form == "one pass" else TwoPassApart(EPSILON, GROUPS, RATIO)


class Loop:
    """The same training by hand, with the contexts of `APART`: `steps()` yields the number and the batch of each step.

    What is done with a batch comes between; after it, the optimizer takes its step if `accumulated` have added up.
    """

    def __init__(self, form: str, dtype: torch.dtype = torch.float64, accumulated: int = 1) -> None:
        self.form, self.accumulated, self.dtype = form, accumulated, dtype
        self.model = convolutional(dtype=dtype)
        self.apart = APART(self.model, EPSILON, GROUPS)
        self.optimizer = torch.optim.SGD(self.model.parameters(), LEARNING_RATE, momentum=0.9)

    def steps(self) -> Iterator[tuple[int, tuple[Tensor, Tensor]]]:
        for t, batch in enumerate(batches(self.dtype)):
            torch.manual_seed(t)
            yield t, batch
            if (t + 1) % self.accumulated == 0:
                self.optimizer.step()
                self.optimizer.zero_grad()

    def backward(self, batch: Any) -> Tensor:
        """Add the gradient of a batch, and return the loss that plain training would log."""
        scale = 1 / self.accumulated
        if self.form == "two passes":
            return both_passes(self.apart, batch, RATIO, scale=scale)[0]
        with self.apart.one_pass():
            loss = F.cross_entropy(self.model(batch[0]), batch[1])
            (scale * loss).backward()
        return loss.detach()


def assert_same(one: nn.Module, other: nn.Module, **tolerance: Any) -> None:
    torch.testing.assert_close(dict(one.state_dict()), dict(other.state_dict()), **(tolerance or ROUNDING))


FORMS = ["one pass", "two passes"]
both_forms = pytest.mark.parametrize("form", FORMS)
EXACTLY = {"rtol": 0, "atol": 0}


# Lightning's own loop, around the callbacks.


@both_forms
@pytest.mark.parametrize(("accumulated", "clip"), [(1, 0.0), (3, 0.0), (1, 0.05), (2, 0.05)])
def test_a_callback_takes_the_steps_of_the_loop_by_hand(form: str, accumulated: int, clip: float) -> None:
    module, loop = Classifier(), Loop(form, accumulated=accumulated)
    fit(module, callback_of(form), accumulate_grad_batches=accumulated, gradient_clip_val=clip or None)
    for t, batch in loop.steps():
        loop.backward(batch)
        if clip and (t + 1) % accumulated == 0:
            assert nn.utils.clip_grad_norm_(loop.model.parameters(), clip) > clip
    assert_same(module.model, loop.model)


@both_forms
@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed"])
def test_precision_plugins_do_what_autocast_and_a_scaler_do_by_hand(form: str, precision: str) -> None:
    dtype = torch.bfloat16 if precision == "bf16-mixed" else torch.float16
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0, enabled=precision == "16-mixed")
    plugin = MixedPrecision(precision, "cpu", copy.deepcopy(scaler) if scaler.is_enabled() else None)
    module = Classifier(convolutional(dtype=torch.float32))
    fit(module, callback_of(form), data=loader(torch.float32), plugins=[plugin])

    loop = Loop(form, torch.float32)
    apart, model = loop.apart, loop.model
    for t, (x, y) in enumerate(batches(torch.float32)):
        torch.manual_seed(t)
        loop.optimizer.zero_grad()
        passes = [(apart.to_proxy(), 8, 2 / 3), (apart.to_adver(), 4, 1 / 3)]
        for context, samples, weight in [(apart.one_pass(), 8, 1.0)] if form == "one pass" else passes:
            with context:
                with torch.autocast("cpu", dtype):
                    loss = F.cross_entropy(model(x[:samples]), y[:samples])
                scaler.scale(weight * loss).backward()
        scaler.step(loop.optimizer)
        scaler.update()
    # The weight is multiplied in float32, once with r and once with 1 − r, in another order.
    assert_same(module.model, model, rtol=1e-4, atol=1e-6)


@both_forms
def test_a_closure_that_the_optimizer_calls_again_is_a_whole_step_each_time(form: str) -> None:
    class WithLBFGS(Classifier):
        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.LBFGS(self.parameters(), lr=0.1, max_iter=3)

    module, loop = WithLBFGS(), Loop(form)
    fit(module, callback_of(form), max_steps=2)
    optimizer = torch.optim.LBFGS(loop.model.parameters(), lr=0.1, max_iter=3)
    for t, batch in enumerate(batches()[:2]):
        torch.manual_seed(t)

        def closure(batch: Any = batch) -> Tensor:
            optimizer.zero_grad()
            return loop.backward(batch)

        optimizer.step(closure)
    assert loop.model[1].num_batches_tracked == 6
    assert_same(module.model, loop.model)


@both_forms
def test_validation_and_averaged_weights_are_beside_it(form: str) -> None:
    module, loop = Classifier(), Loop(form)
    average = WeightAveraging(avg_fn=get_ema_avg_fn(0.5), use_buffers=False)
    trainer = fit(module, callback_of(form), average, data=loader(), val_dataloaders=loader(), val_check_interval=2)
    assert trainer.callback_metrics["validation loss"].isfinite()

    twin = AveragedModel(loop.model, avg_fn=get_ema_avg_fn(0.5))
    for t, batch in loop.steps():
        if t:
            twin.update_parameters(loop.model)
        loop.backward(batch)
    twin.update_parameters(loop.model)
    torch.testing.assert_close(dict(module.model.named_parameters()), dict(twin.module.named_parameters()), **ROUNDING)
    torch.testing.assert_close(dict(module.model.named_buffers()), dict(loop.model.named_buffers()), **ROUNDING)


@both_forms
def test_the_last_epoch_of_swa_takes_the_statistics_of_plain_passes(form: str) -> None:
    averaged = []

    class Keep(lightning.Callback):
        """The model as it goes into the last epoch: Lightning steps the optimizer once more after it."""

        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            if trainer.fit_loop._skip_backward and not averaged:
                averaged.append(copy.deepcopy(pl_module.model))

    module = Classifier()
    fit(module, callback_of(form), StochasticWeightAveraging(0.05, swa_epoch_start=1), Keep(), max_epochs=2)
    update_bn([x for x, _ in batches()], averaged[0])
    torch.testing.assert_close(dict(module.model.named_buffers()), dict(averaged[0].named_buffers()), **ROUNDING)


def test_what_is_logged_is_of_the_clean_pass() -> None:
    callback, module = callback_of("two passes"), Classifier()
    logged = fit(module, callback).callback_metrics
    loop, accuracy, losses = Loop("two passes"), MulticlassAccuracy(3), []
    for _, batch in loop.steps():
        loss, _, output = both_passes(loop.apart, batch, RATIO)
        losses.append(loss)
        accuracy(output, batch[1])
    assert logged["loss_epoch"].item() == pytest.approx(torch.stack(losses).mean().item())
    assert logged["accuracy_epoch"].item() == pytest.approx(accuracy.compute().item())
    assert module.accuracy is module._modules["accuracy"]
    assert "log" not in vars(module)
    assert len(callback._spares) == 1  # one metric for all steps


class ByHand(lightning.Callback):
    """After training, trains again by hand on each rank, in the process group that is still there, and compares."""

    def __init__(self, form: str, accumulated: int) -> None:
        self.form, self.accumulated, self.batches = form, accumulated, []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.batches.append((batch_idx, batch))

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        loop = Loop(self.form, accumulated=self.accumulated)
        model = DistributedDataParallel(loop.model)
        loop.model, loop.apart = model, APART(model, EPSILON, GROUPS)
        for t, batch in self.batches:
            torch.manual_seed(t)
            last = (t + 1) % self.accumulated == 0
            with nullcontext() if last else model.no_sync():
                loop.backward(batch)
            if last:
                loop.optimizer.step()
                loop.optimizer.zero_grad()
        assert_same(pl_module.model, model.module)


@both_forms
@pytest.mark.parametrize("accumulated", [1, 3])
def test_two_ranks_take_the_steps_of_two_ranks_by_hand(form: str, accumulated: int) -> None:
    module, alone = Classifier(), Classifier()
    strategy = DDPStrategy(start_method="fork")
    options = {"accumulate_grad_batches": accumulated, "max_epochs": 2}
    fit(module, callback_of(form), ByHand(form, accumulated), strategy=strategy, devices=2, **options)
    fit(alone, callback_of(form), **options)
    assert (module.model[0].weight - alone.model[0].weight).abs().max() > 1e-3


UNDER_THE_OTHER_NAME = """
import torch, torch.nn.functional as F
from pytorch_lightning import LightningModule, Trainer
from apart_func.integrations.lightning import OnePassApart
from small import convolutional, images
from torch.utils.data import DataLoader

class Classifier(LightningModule):
    def __init__(self):
        super().__init__()
        self.model = convolutional()

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.model(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)

callback = OnePassApart(0.2, 2)
trainer = Trainer(max_steps=2, callbacks=[callback], accelerator="cpu", logger=False, enable_checkpointing=False)
trainer.fit(Classifier(), DataLoader([images(), images()], batch_size=None))
print(len(callback.apart.perturbation), "layers")
"""


@pytest.mark.slow
def test_the_trainer_may_be_of_pytorch_lightning() -> None:
    pytest.importorskip("pytorch_lightning")
    command = [sys.executable, "-c", UNDER_THE_OTHER_NAME]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.stdout.splitlines()[-1:] == ["2 layers"], done.stderr


# Checkpoints.


@both_forms
def test_a_resumed_run_ends_bit_for_bit_as_an_undisturbed_one(form: str, tmp_path: Path) -> None:
    undisturbed, first, resumed = Classifier(), Classifier(), Classifier()
    fit(undisturbed, callback_of(form), max_epochs=2)
    fit(first, callback_of(form)).save_checkpoint(tmp_path / "run.ckpt")
    fit(resumed, callback_of(form), path=tmp_path / "run.ckpt", max_epochs=2)
    assert_same(resumed.model, undisturbed.model, **EXACTLY)


def test_the_radius_changes_with_the_next_batch() -> None:
    class Halving(lightning.Callback):
        """A schedule of the radius."""

        def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
            trainer.callbacks[0].apart.set_epsilon(EPSILON / 2)

    callback = callback_of("one pass")
    fit(Classifier(), callback, Halving(), max_steps=2)
    assert callback.apart is not None
    assert all((part.abs() == EPSILON / 2).all() for shift in callback.apart.perturbation.values() for part in shift)


# Several loaders, and several networks.


class SemiSupervised(Classifier):
    """Labelled and unlabelled images, of two loaders, each in a call of its own."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        (x, y), (unlabelled,) = batch["labelled"], batch["unlabelled"]
        return F.cross_entropy(self.model(x), y) + self.model(unlabelled).square().mean()

    @staticmethod
    def data() -> dict[str, DataLoader[Any]]:
        unlabelled = torch.cat([images(3 * SAMPLES, seed=100 + t)[0] for t in range(STEPS)])
        return {"labelled": loader(), "unlabelled": DataLoader(TensorDataset(unlabelled), 3 * SAMPLES)}


@both_forms
def test_each_call_of_a_network_is_a_batch_of_its_own(form: str) -> None:
    module, loop = SemiSupervised(), Loop(form)
    callback = OnePassApart(EPSILON, GROUPS) if form == "one pass" else TwoPassApart(EPSILON, GROUPS)
    fit(module, callback, data=SemiSupervised.data())
    apart, model = loop.apart, loop.model
    for t, (x, y) in loop.steps():
        contexts = [apart.one_pass()] if form == "one pass" else [apart.to_proxy(), apart.to_adver()]
        for context in contexts:
            with context:
                loss = F.cross_entropy(model(x), y) + model(images(3 * SAMPLES, seed=100 + t)[0]).square().mean()
                (loss / len(contexts)).backward()
    assert_same(module.model, model)


def test_networks_in_lists_and_a_forward_of_the_module_are_calls_too() -> None:
    class Several(SemiSupervised):
        def __init__(self) -> None:
            super().__init__()
            self.heads = nn.ModuleList([nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)).double()])

        def forward(self, x: Tensor) -> Tensor:
            return self.heads[0](self.model(x))

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            (x, y), (unlabelled,) = batch["labelled"], batch["unlabelled"]
            return F.cross_entropy(self(x), y) + self.heads[0](self.model(unlabelled)).square().mean()

    module = Several()
    callback = OnePassApart(EPSILON, GROUPS)
    fit(module, callback, data=Several.data())
    assert callback.apart is not None
    assert len(callback.apart.perturbation) == 3


def test_a_part_of_the_batches_of_several_loaders_is_refused() -> None:
    with pytest.raises(BatchError, match="With several loaders use ratio=1"):
        fit(SemiSupervised(), TwoPassApart(EPSILON, ratio=0.5), data=SemiSupervised.data())


def test_ddp_needs_one_batch_size_of_all_loaders() -> None:
    data, ddp = SemiSupervised.data(), {"strategy": "ddp", "devices": 1}
    with pytest.raises(BatchError, match="tensors of unlike lengths"):
        fit(SemiSupervised(), callback_of("one pass"), data=data, **ddp)
    data["unlabelled"] = DataLoader(data["unlabelled"].dataset, SAMPLES)
    fit(SemiSupervised(), callback_of("one pass"), data=data, max_steps=1, **ddp)


# What is refused.


@both_forms
@pytest.mark.parametrize("contexts", [True, False])
def test_half_a_gradient_is_refused_before_a_parameter_moves(form: str, contexts: bool) -> None:
    class ByHand(Classifier):
        """Lightning clears the gradient of the first backward before it comes to the second."""

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            x, y = batch
            if contexts:
                apart = APART(self.model, EPSILON)
                with apart.to_proxy():
                    F.cross_entropy(self.model(x), y).backward()
            F.cross_entropy(self.model(x), y).backward()
            return F.cross_entropy(self.model(x), y)

    module = ByHand()
    with pytest.raises(UsageError, match="another APART" if contexts else "half of a gradient"):
        fit(module, callback_of(form))
    before = convolutional()
    torch.testing.assert_close(dict(module.model.named_parameters()), dict(before.named_parameters()), **EXACTLY)
    assert all("forward" not in vars(layer) for layer in module.model)


@both_forms
def test_an_error_leaves_the_strategy_and_the_model_as_they_were(form: str) -> None:
    class Failing(Classifier):
        def on_before_zero_grad(self, optimizer: Any) -> None:
            raise ZeroDivisionError  # between the forward and its backward

    module, callback = Failing(), callback_of(form)
    trainer = lightning.Trainer(callbacks=[callback], logger=False, enable_checkpointing=False, accelerator="cpu")
    with pytest.raises(ZeroDivisionError):
        trainer.fit(module, loader())
    assert not {"training_step", "backward"} & vars(trainer.strategy).keys()
    assert all("forward" not in vars(layer) and not layer._forward_pre_hooks for layer in module.model)


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`:UserWarning")
def test_a_batch_that_training_step_skips_is_skipped() -> None:
    class Skipping(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
            loss = super().training_step(batch, batch_idx)
            return None if batch_idx == 2 else loss

    module, loop = Skipping(), Loop("one pass")
    fit(module, callback_of("one pass"))
    for t, batch in loop.steps():
        if t == 2:  # its forward moves the running statistics
            with loop.apart.one_pass():
                loop.model(batch[0])
        else:
            loop.backward(batch)
    assert_same(module.model, loop.model)


def test_without_lightning_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'apart_func\[lightning\]'"):
        importlib.reload(sys.modules["apart_func.integrations.lightning"])


def test_what_cannot_work_is_refused_by_name() -> None:
    class Manual(Classifier):
        automatic_optimization = False

    class Iterating(Classifier):
        def training_step(self, dataloader_iter: Iterator[Any]) -> Tensor:
            raise AssertionError

    for module, callbacks, error, message in (
        (Manual(), [callback_of("one pass")], UsageError, "Manual has automatic_optimization = False"),
        (Iterating(), [callback_of("two passes")], UsageError, "dataloader_iter"),
        (Classifier(), map(callback_of, FORMS), UsageError, "another callback of APART"),
        (Classifier(), [TwoPassApart(EPSILON, ratio=0.1)], BatchError, "leave no sample of a batch of 8"),
        (Classifier(), [OnePassApart(EPSILON, 1)], SettingError, "groups=1"),
        (Classifier(), [OnePassApart(EPSILON, 3)], BatchError, "drop_last=True"),
    ):
        with pytest.raises(error, match=message):
            fit(module, *callbacks)
    with pytest.raises(SettingError, match="ratio"):
        TwoPassApart(EPSILON, ratio=2.0)
