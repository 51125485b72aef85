"""A network in training, with all state that a step moves: `Learner`.

`take` is one training step on one batch. `evaluated` is the network as it is measured and saved: with an average of the
weights, that one. `state_dict` is everything that the next step depends on.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn

from apart_func import Perturbation, StepOutput, assign_grads_, load_state_, split_state
from training.methods import Batch, Step, initially_carried, make_step
from training.nonfinite import NonFiniteError, Start, Watch, nonfinite_error
from training.settings import Settings

AMP_DTYPES = {None: None, "bf16": torch.bfloat16, "fp16": torch.float16}

# The statistics of averaged weights are measured on as many training batches.
STATISTICS_BATCHES = 100


class Learner:
    """A network, its optimizer, and what else a training step moves.

    Args:
        model: the network, in training mode, on its device.
        settings: of the run.

    Attributes:
        device: where the network is.
        model: the network. Its parameters are always those of the last step; its buffers after `evaluated`.
        params: these parameters, by name.
        buffers: all other tensors, as the last step left them.
        carried: what the method hands from step to step.
    """

    def __init__(self, model: nn.Module, settings: Settings) -> None:
        training = settings.training
        if training.channels_last:
            model = model.to(memory_format=torch.channels_last)
        self.model = model
        self.device = next(model.parameters()).device
        self.params, self.buffers = split_state(model)
        self.carried = initially_carried(model, settings.method)
        self._settings = settings
        self._autocast_dtype = AMP_DTYPES[training.amp]
        self._optimizer = torch.optim.SGD(
            model.parameters(), training.lr, momentum=training.momentum, weight_decay=training.weight_decay
        )
        self._average = None
        if training.ema is not None:
            self._average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(training.ema))
        self._loss_scale = LossScale() if training.amp == "fp16" else None
        self._watch = Watch(self._explain)
        self._eager_step = make_step(model, settings.method, self._autocast_dtype)
        self._step: Step = self._eager_step
        if training.compile:  # batches are all of one size, and symbolic sizes would take Inductor minutes
            self._step = torch.compile(self._eager_step, fullgraph=True, dynamic=False)

    def rehearse(self, batch: Batch) -> None:
        """Compute one step and forget it, so that settings that do not fit are refused before a run begins.

        Raises:
            ApartError: they do not fit the network or the batch.
        """
        with self._kept_random_state():
            self._eager_step(self.params, self.buffers, self.placed(batch), self.carried)

    def placed(self, batch: Batch) -> Batch:
        """A batch on the network's device, in its memory order."""
        samples, labels = batch
        order = torch.channels_last if self._settings.training.channels_last else torch.preserve_format
        samples = samples.to(self.device, non_blocking=True, memory_format=order)
        return samples, labels.to(self.device, non_blocking=True)

    def take(self, batch: Batch, lr: float, number: int) -> StepOutput | None:
        """Train on one batch.

        Args:
            batch: samples and labels, `placed`.
            lr: learning rate.
            number: of the step in the run, for errors.

        Returns:
            What the step returned, or None where float16 overflowed: then only the loss scale has changed.

        Raises:
            NonFiniteError: a value of this step or the one before is infinite or not a number.
        """
        self._watch.settle()
        scale = None if self._loss_scale is None else torch.tensor(self._loss_scale.value, device=batch[0].device)
        start = Start(number, self.params, self.buffers, batch, self.carried, scale, torch.get_rng_state())
        out, carried = self._step(self.params, self.buffers, batch, self.carried, loss_scale=scale)
        if not self._accepts(out, start):
            return None
        self.carried = carried
        self._update(out, lr)
        return out

    def settle(self) -> None:
        """Make sure that the last step was finite.

        Raises:
            NonFiniteError: it was not.
        """
        self._watch.settle()

    def evaluated(self, batches: Iterable[Batch]) -> nn.Module:
        """The network as it is measured and saved.

        An average of the weights is another network than any that was trained. Neither the running statistics of one
        nor the average of those of all are its statistics, so they are measured anew.

        Args:
            batches: training batches to measure the statistics of averaged weights on; else they are not asked for.

        Returns:
            The network with the running statistics of its weights.
        """
        if self._average is None:
            load_state_(self.model, self.params, self.buffers)
            return self.model
        placed = (self.placed(batch) for batch in itertools.islice(batches, STATISTICS_BATCHES))
        with self._kept_random_state():
            update_bn(placed, self._average.module)
        return self._average.module

    @torch.no_grad()
    def wrong_labels(self, model: nn.Module, batch: Batch) -> Tensor:
        """How many samples a network gives a wrong label, 0-d; it is in evaluation mode, and they are placed."""
        samples, labels = batch
        with torch.autocast(samples.device.type, self._autocast_dtype, enabled=self._autocast_dtype is not None):
            wrong: Tensor = (model(samples).argmax(dim=1) != labels).sum()
        return wrong

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next step depends on, but for the random generators."""
        return {
            "params": self.params,
            "buffers": self.buffers,
            "carried": {layer: tuple(shift) for layer, shift in self.carried.items()},  # plain, as checkpoints are
            "optimizer": self._optimizer.state_dict(),
            "average": self._average and self._average.state_dict(),
            "loss_scale": self._loss_scale and self._loss_scale.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from what `state_dict` returned, in place."""
        load_state_(self.model, state["params"], state["buffers"])
        self.params, self.buffers = split_state(self.model)
        self.carried = {
            layer: Perturbation(*(part.to(self.device) for part in shift)) for layer, shift in state["carried"].items()
        }
        self._optimizer.load_state_dict(state["optimizer"])
        if self._average is not None:
            self._average.load_state_dict(state["average"])
        if self._loss_scale is not None:
            self._loss_scale.load_state_dict(state["loss_scale"])

    def _accepts(self, out: StepOutput, start: Start) -> bool:
        """Whether a step shall move the weights. Without a loss scale it may, and is looked at later."""
        if self._loss_scale is None:
            self._watch.expect(start, out.all_finite)
            return True
        finite = bool(out.all_finite)
        self._loss_scale.update(finite)
        if self._loss_scale.is_exhausted:
            raise self._explain(start)
        return finite

    def _update(self, out: StepOutput, lr: float) -> None:
        """Move the weights by the gradients of a step."""
        self.buffers = out.buffers
        assign_grads_(self.model, out.grads)
        if self._settings.training.clip is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), self._settings.training.clip)
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        self._optimizer.step()
        if self._average is not None:
            self._average.update_parameters(self.model)

    def _kept_random_state(self) -> AbstractContextManager[None]:
        """Put the random generators back at the end."""
        return torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else [])

    def _explain(self, start: Start) -> NonFiniteError:
        """The error for a step that was not finite."""
        return nonfinite_error(self.model, self._settings.method, self._autocast_dtype, start)


class LossScale:
    """The factor on a float16 loss that keeps small gradients from vanishing, as `torch.amp.GradScaler` has it.

    It is halved when a gradient overflows, and doubled after `interval` steps in which none did. That scaler wants to
    unscale the gradients itself, where the steps here return them unscaled.
    """

    interval = 2000

    def __init__(self) -> None:
        self.value, self._good_steps = 2.0**16, 0

    @property
    def is_exhausted(self) -> bool:
        """Whether gradients overflow without any factor, so that the fault is not the scale's."""
        return self.value < 1

    def update(self, all_finite: bool) -> None:
        """Learn whether a step was finite."""
        self._good_steps = self._good_steps + 1 if all_finite else 0
        if not all_finite:
            self.value /= 2
        elif self._good_steps == self.interval:
            self.value, self._good_steps = 2 * self.value, 0

    def state_dict(self) -> dict[str, Any]:
        """The factor, and how long it has been good."""
        return {"value": self.value, "good_steps": self._good_steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from what `state_dict` returned."""
        self.value, self._good_steps = state["value"], state["good_steps"]
