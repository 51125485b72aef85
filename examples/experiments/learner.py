"""A network in training, with all state that a step moves: `Learner`.

`train` is one training step on one batch, `evaluated` the network as it is measured and saved, and `state_dict`
everything that the next step depends on. `Learns` is what the runner asks of it, and of many networks that are trained
together (together.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from apart_func import StepOutput, assign_grads_, load_state_, split_state
from experiments.methods import Batch, Carried, Step, initially_carried, is_plain_step, make_step, radius
from experiments.nonfinite import NonFiniteError, Start, Watch, nonfinite_error
from experiments.settings import MethodSettings, Settings

AMP_DTYPES = {None: None, "bf16": torch.bfloat16}


class Counted(NamedTuple):
    """What a step tells.

    Attributes:
        sums: loss, second loss, wrong labels, and one, of every run, (runs, 4).
        out: of the step, where it is that of a single run.
    """

    sums: Tensor
    out: StepOutput | None


class Learns(Protocol):
    """One network in training, or several that are trained together."""

    device: torch.device

    def train(self, batches: Sequence[Batch], lr: float, number: int, done: float) -> Counted:
        """Train every network on its batch; see `Learner.train`."""

    def settle(self) -> None:
        """Make sure that the last step was finite."""

    def evaluated(self, run: int) -> nn.Module:
        """The network of a run as it is measured and saved."""

    def scores(self, model: nn.Module, samples: Tensor) -> Tensor:
        """Class scores of samples, without a gradient, for a network in evaluation mode."""

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next step depends on, but for the random generators."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from what `state_dict` returned."""


class Steps:
    """The step that is due: the method's, or a plain one where its settings say so.

    Args:
        model: the network.
        settings: of the run.
    """

    def __init__(self, model: nn.Module, settings: Settings) -> None:
        self.method = settings.method
        dtype, momentum = AMP_DTYPES[settings.training.amp], settings.training.momentum
        plain = MethodSettings("plain", label_smoothing=self.method.label_smoothing)
        self.of_method = make_step(model, self.method, dtype, momentum)
        self.plain = make_step(model, plain, dtype, momentum)

    def due(self, number: int, done: float) -> tuple[Step, dict[str, Tensor]]:
        """The step of a number, and the options that it is called with."""
        if is_plain_step(self.method, number, done):
            return self.plain, {}
        epsilon = radius(self.method, done)
        return self.of_method, {} if epsilon is None else {"epsilon": torch.tensor(epsilon)}


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
        self._watch = Watch(self._explain)
        self._steps = Steps(model, settings)
        self._compiled: dict[Step, Step] = {}

    def rehearse(self, batch: Batch) -> None:
        """Compute one step and forget it, so that settings that do not fit are refused before a run begins.

        Raises:
            ApartError: they do not fit the network or the batch.
        """
        with self._kept_random_state():
            for step in (self._steps.of_method, self._steps.plain):
                step(self.params, self.buffers, self.placed(batch), self.carried)

    def placed(self, batch: Batch) -> Batch:
        """A batch on the network's device, in its memory order."""
        samples, labels = batch
        order = torch.channels_last if self._settings.training.channels_last else torch.preserve_format
        samples = samples.to(self.device, non_blocking=True, memory_format=order)
        return samples, labels.to(self.device, non_blocking=True)

    def train(self, batches: Sequence[Batch], lr: float, number: int, done: float = 0.0) -> Counted:
        """Train on one batch.

        Raises:
            NonFiniteError: a value of this step or the one before is infinite or not a number.
        """
        batch = self.placed(batches[0])
        self._watch.settle()
        eager, options = self._steps.due(number, done)
        is_plain = eager is not self._steps.of_method
        start = Start(number, self.params, self.buffers, batch, self.carried, torch.get_rng_state(), is_plain)
        out, self.carried = self._as_run(eager)(self.params, self.buffers, batch, self.carried, **options)
        self._watch.expect(start, out.all_finite)
        self._update(out, lr)
        wrong = (out.output.argmax(dim=1) != batch[1]).sum()
        counted = [out.loss, out.adversarial_loss, wrong, torch.ones_like(out.loss)]
        return Counted(torch.stack([value.double() for value in counted])[None], out)

    def _as_run(self, step: Step) -> Step:
        """A step, compiled if it shall be."""
        if not self._settings.training.compile:
            return step
        if step not in self._compiled:  # batches are all of one size, and symbolic sizes would take Inductor minutes
            self._compiled[step] = torch.compile(step, fullgraph=True, dynamic=False)
        return self._compiled[step]

    def settle(self) -> None:
        """Make sure that the last step was finite.

        Raises:
            NonFiniteError: it was not.
        """
        self._watch.settle()

    def evaluated(self, run: int) -> nn.Module:
        """The network with the running statistics of its last step; `run` is 0, the only one."""
        load_state_(self.model, self.params, self.buffers)
        return self.model

    @torch.no_grad()
    def scores(self, model: nn.Module, samples: Tensor) -> Tensor:
        """Class scores of samples, placed here; the network is in evaluation mode."""
        samples, _ = self.placed((samples, torch.empty(0)))
        with torch.autocast(samples.device.type, self._autocast_dtype, enabled=self._autocast_dtype is not None):
            scores: Tensor = model(samples)
        return scores

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next step depends on, but for the random generators."""
        return {
            "params": self.params,
            "buffers": self.buffers,
            "carried": tree_flatten(self.carried)[0],  # plain, as checkpoints are
            "optimizer": self._optimizer.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from what `state_dict` returned, in place."""
        load_state_(self.model, state["params"], state["buffers"])
        self.params, self.buffers = split_state(self.model)
        self.carried = carried_again(self.carried, state["carried"], self.device)
        self._optimizer.load_state_dict(state["optimizer"])

    def _update(self, out: StepOutput, lr: float) -> None:
        """Move the weights by the gradients of a step."""
        self.buffers = out.buffers
        assign_grads_(self.model, out.grads)
        if self._settings.training.clip is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), self._settings.training.clip)
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        self._optimizer.step()

    def _kept_random_state(self) -> AbstractContextManager[None]:
        """Put the random generators back at the end."""
        return torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else [])

    def _explain(self, start: Start) -> NonFiniteError:
        """The error for a step that was not finite."""
        return nonfinite_error(self.model, self._settings.method, self._autocast_dtype, start)


def carried_again(like: Carried, leaves: Sequence[Tensor], device: torch.device) -> Carried:
    """What a method carries, from its tensors as a checkpoint has them."""
    found, form = tree_flatten(like)
    if len(found) != len(leaves):
        raise ValueError(f"{len(leaves)} tensors are carried from step to step, where {len(found)} are expected")
    carried: Carried = tree_unflatten([leaf.to(device) for leaf in leaves], form)
    return carried
