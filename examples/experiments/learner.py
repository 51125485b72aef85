"""Networks in training, with all state that a step moves: `Learner`.

    step   = the method's                                      one network, one batch
    steps  = vmap(step), where there are several networks      every network, each on the batch of its own seed
    SGD on the tensors of all of them

Networks of runs that differ in their seed alone can be trained at the same time: each starts from the weights and gets
the batches that it has when it is trained alone, and the numbers agree up to rounding. Where steps draw at random, the
draws are others. A step that is not finite is refused, before anything has moved.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from apart_func import load_state_, split_state
from experiments import ranks
from experiments.methods import Batch, initially_carried, make_step
from experiments.settings import Settings, SettingsError

AMP_DTYPES = {None: None, "bf16": torch.bfloat16}
ALONE = {"clip": None, "channels_last": False}  # what a run has beyond several, and its value where it is not used


class NonFiniteError(RuntimeError):
    """A loss or gradient is infinite or not a number."""


def check_fit(runs: Sequence[Settings]) -> None:
    """Make sure that runs can be trained together."""
    first = runs[0]
    if any(replace(run, seed=first.seed, out=first.out) != first for run in runs):
        raise SettingsError("only runs that differ in their seed alone can be trained together.")
    if ranks.count() > 1 < len(runs):
        raise SettingsError("torchrun trains one run: leave --together to one process.")
    values = {name: getattr(first.training, name) for name in ALONE}
    used = [f"{name} {value}" for name, value in values.items() if value != ALONE[name]]
    if used and len(runs) > 1:
        raise SettingsError(
            f"runs with {', '.join(used)} cannot be trained together. Leave it out, or train each by itself."
        )


class Learner:
    """Networks of one architecture and all that a step moves: `state`, of several networks in stacked tensors."""

    def __init__(self, models: Sequence[nn.Module], runs: Sequence[Settings]) -> None:
        check_fit(runs)
        self.runs, self.training, self.method = runs, runs[0].training, runs[0].method
        self.model = models[0]
        if self.training.channels_last:
            self.model = self.model.to(memory_format=torch.channels_last)
        self.device = next(self.model.parameters()).device
        self._dtype = AMP_DTYPES[self.training.amp]
        states = [(*split_state(model), initially_carried(model, self.method)) for model in models]
        params, buffers, carried = states[0]
        if len(runs) > 1:
            params, buffers, carried = tree_map(lambda *tensors: torch.stack(tensors).detach(), *states)
        momenta = {name: torch.zeros_like(param) for name, param in params.items()}
        self.state: dict[str, Any] = {"params": params, "buffers": buffers, "carried": carried, "momenta": momenta}
        self._step = make_step(self.model, self.method, self._dtype)
        self._steps: Callable[..., Any] = self._step
        if len(runs) > 1:
            self._steps = torch.func.vmap(self._step, randomness="different")
        if self.training.compile:  # batches are all of one size; symbolic sizes would take Inductor minutes
            self._steps = torch.compile(self._steps, fullgraph=True, dynamic=False)

    def rehearse(self, batch: Batch) -> None:
        """Compute one step and forget it, so that settings that do not fit are refused before a run begins."""
        params, buffers, carried, _ = self._of_run(0)
        with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
            self._step(params, buffers, self.placed([batch]), carried)

    def placed(self, batches: Sequence[Batch]) -> Batch:
        """The batches of all runs, stacked if there are several, on the device and in the network's memory order."""
        if len(batches) > 1:
            samples, labels = (torch.stack(part) for part in zip(*batches, strict=True))
        else:
            ((samples, labels),) = batches
        order = torch.channels_last if self.training.channels_last else torch.preserve_format
        samples = samples.to(self.device, non_blocking=True, memory_format=order)
        return samples, labels.to(self.device, non_blocking=True)

    def train(self, batches: Sequence[Batch], lr: float, epoch: int, step: int) -> Tensor:
        """Train every network on its batch; epoch and step, counted from 1, are named if the step is not finite.

        Returns:
            Loss, second loss, wrong labels, and one, of every run, (runs, 4), float64; of several ranks, each takes
            its own wrong labels for those of all: their mean over ranks is the number.
        """
        batch = self.placed(batches)
        params, buffers, carried, momenta = self.state.values()
        out, carried = self._steps(params, buffers, batch, carried)
        if not out.all_finite.all():
            seed = self.runs[int(out.all_finite.view(-1).int().argmin())].seed
            raise NonFiniteError(
                f"epoch {epoch}, step {step} is not finite: with seed {seed} a loss or gradient is infinite or NaN. "
                "Try a lower --lr, or --clip 1."
            )
        self.state |= {"buffers": out.buffers, "carried": carried}
        self._descend([out.grads[name] for name in params], list(params.values()), list(momenta.values()), lr)
        wrong = (out.output.argmax(dim=-1) != batch[1]).sum(dim=-1) * ranks.count()
        counted = [out.loss, out.adversarial_loss, wrong, torch.ones_like(out.loss)]
        return torch.stack([value.double() for value in counted], dim=-1).view(len(self.runs), 4)

    @torch.no_grad()
    def _descend(self, grads: list[Tensor], params: list[Tensor], momenta: list[Tensor], lr: float) -> None:
        """SGD with momentum and weight decay, as torch has it, on the tensors of all networks."""
        if self.training.clip is not None:
            norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads)))
            grads = list(torch._foreach_mul(grads, (self.training.clip / (norm + 1e-6)).clamp(max=1)))
        grads = list(torch._foreach_add(grads, params, alpha=self.training.weight_decay))
        torch._foreach_mul_(momenta, self.training.momentum)
        torch._foreach_add_(momenta, grads)
        if self.training.nesterov:
            momenta = list(torch._foreach_add(grads, momenta, alpha=self.training.momentum))
        torch._foreach_add_(params, momenta, alpha=-lr)

    def evaluated(self, run: int) -> nn.Module:
        """The network of a run as it is measured and saved, with the running statistics of its last step."""
        params, buffers, *_ = self._of_run(run)
        load_state_(self.model, params, buffers)
        return self.model

    @torch.no_grad()
    def scores(self, model: nn.Module, samples: Tensor) -> Tensor:
        """Class scores of samples; the network is in evaluation mode."""
        samples, _ = self.placed([(samples, torch.empty(0))])
        with torch.autocast(samples.device.type, self._dtype, enabled=self._dtype is not None):
            scores: Tensor = model(samples)
        return scores

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next step depends on, but for the random generators."""
        return self.state | {"carried": tree_leaves(self.state["carried"])}  # plain, as checkpoints are

    def load_state_dict(self, stored: dict[str, Any]) -> None:
        """Continue from what `state_dict` returned, in place."""
        with torch.no_grad():
            for kind, tensors in self.state_dict().items():
                for key in range(len(tensors)) if kind == "carried" else tensors:
                    tensors[key].copy_(stored[kind][key].to(self.device))

    def _of_run(self, run: int) -> list[Any]:
        """The state of one network."""
        if len(self.runs) == 1:
            return list(self.state.values())
        return [tree_map(lambda tensor: tensor[run], part) for part in self.state.values()]
