"""Networks in training, with all state that a step moves: `Learner`.

    step   = the method's, or a plain one when it is due       one network, one batch
    steps  = vmap(step), where there are several networks      every network, each on the batch of its own seed
    SGD on the tensors of all of them

Networks of runs that differ in their seed alone can be trained at the same time: each starts from the weights and gets
the batches that it has when it is trained alone, and the numbers agree up to rounding. Where steps draw at random, the
draws are others.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from apart_func import StepOutput, load_state_, split_state
from experiments import ranks
from experiments.methods import Batch, Step, initially_carried, is_plain_step, make_step, radius
from experiments.nonfinite import NonFiniteError, Start, nonfinite_error
from experiments.settings import MethodSettings, Settings, SettingsError

AMP_DTYPES = {None: None, "bf16": torch.bfloat16}

# What the program of one run has beyond that of several, and its value where it is not used.
ALONE = {"clip": None, "channels_last": False}


def check_fit(runs: Sequence[Settings]) -> None:
    """Make sure that runs can be trained together."""
    first = runs[0]
    if any(replace(run, seed=first.seed, out=first.out) != first for run in runs):
        raise SettingsError("only runs that differ in their seed alone can be trained together.")
    values = {name: getattr(first.training, name) for name in ALONE}
    used = [f"{name} {value}" for name, value in values.items() if value != ALONE[name]]
    if ranks.count() > 1 < len(runs):
        raise SettingsError("torchrun trains one run: leave --together to one process.")
    if used and len(runs) > 1:
        raise SettingsError(
            f"runs with {', '.join(used)} cannot be trained together. Leave it out, or train each by itself."
        )


class Counted(NamedTuple):
    """What a step tells.

    Attributes:
        sums: loss, second loss, wrong labels, and one, of every run, (runs, 4). Of several ranks, each takes its own
            wrong labels for those of all: their mean over ranks is the number.
        out: of the step; of several runs in stacked tensors.
    """

    sums: Tensor
    out: StepOutput


class Learner:
    """Networks of one architecture, their optimizer, and what else a training step moves.

    Args:
        models: the networks, in training mode, on their device.
        runs: their settings, which differ in the seed alone.

    Attributes:
        device: where the networks are.
        state: params, buffers, what the method carries from step to step, and momenta; of several networks in stacked
            tensors, of which entry i belongs to run i.
    """

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
        plain = MethodSettings("plain", label_smoothing=self.method.label_smoothing)
        self._methods = {False: self.method, True: plain}  # by whether a step is a plain one for once
        self._steps = {
            is_plain: make_step(self.model, method, self._dtype, self.training.momentum)
            for is_plain, method in self._methods.items()
        }
        self._mapped: dict[bool, Callable[..., Any]] = {}

    def rehearse(self, batch: Batch) -> None:
        """Compute one step and forget it, so that settings that do not fit are refused before a run begins.

        Raises:
            ApartError: they do not fit the network or the batch.
        """
        batch = self.placed([batch])
        params, buffers, carried, _ = self._of_run(0)
        with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
            self._steps[False](params, buffers, batch, carried)  # a plain one fits wherever this one does

    def placed(self, batches: Sequence[Batch]) -> Batch:
        """The batches of all runs, stacked if there are several, on the device and in the network's memory order."""
        if len(batches) > 1:
            samples, labels = (torch.stack(part) for part in zip(*batches, strict=True))
        else:
            ((samples, labels),) = batches
        order = torch.channels_last if self.training.channels_last else torch.preserve_format
        samples = samples.to(self.device, non_blocking=True, memory_format=order)
        return samples, labels.to(self.device, non_blocking=True)

    def train(self, batches: Sequence[Batch], lr: float, number: int, done: float = 0.0) -> Counted:
        """Train every network on its batch.

        Args:
            batches: samples and labels for each run.
            lr: learning rate.
            number: of the step in the run, from 1.
            done: share of the run's steps that lie behind.

        Raises:
            NonFiniteError: a value of this step is infinite or not a number.
        """
        batch = self.placed(batches)
        is_plain = is_plain_step(self.method, number, done)
        epsilon = None if is_plain else radius(self.method, done)
        options = {} if epsilon is None else {"epsilon": torch.tensor(epsilon)}
        random_state = torch.get_rng_state()
        params, buffers, carried, momenta = self.state.values()
        out, carried = self._step(is_plain)(params, buffers, batch, carried, options)
        if not out.all_finite.all():
            raise self._explained(int(out.all_finite.view(-1).int().argmin()), batch, number, random_state, is_plain)
        self.state |= {"buffers": out.buffers, "carried": carried}
        self._descend([out.grads[name] for name in params], list(params.values()), list(momenta.values()), lr)
        wrong = (out.output.argmax(dim=-1) != batch[1]).sum(dim=-1) * ranks.count()
        counted = [out.loss, out.adversarial_loss, wrong, torch.ones_like(out.loss)]
        return Counted(torch.stack([value.double() for value in counted], dim=-1).view(len(self.runs), 4), out)

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

    def _step(self, is_plain: bool) -> Callable[..., Any]:
        """The step of all networks, compiled if it shall be."""
        if is_plain not in self._mapped:
            step: Step = self._steps[is_plain]

            def one(params: Any, buffers: Any, batch: Any, carried: Any, options: Any) -> Any:
                return step(params, buffers, batch, carried, **options)

            mapped = one
            if len(self.runs) > 1:
                mapped = torch.func.vmap(one, in_dims=(0, 0, 0, 0, None), randomness="different")
            if self.training.compile:  # batches are all of one size; symbolic sizes would take Inductor minutes
                mapped = torch.compile(mapped, fullgraph=True, dynamic=False)
            self._mapped[is_plain] = mapped
        return self._mapped[is_plain]

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
        return self.state | {"carried": tree_flatten(self.state["carried"])[0]}  # plain, as checkpoints are

    def load_state_dict(self, stored: dict[str, Any]) -> None:
        """Continue from what `state_dict` returned, in place."""
        leaves, form = tree_flatten(self.state["carried"])
        if len(leaves) != len(stored["carried"]):
            raise ValueError(f"{len(stored['carried'])} tensors are carried, where {len(leaves)} are expected")
        carried = tree_unflatten([leaf.to(self.device) for leaf in stored["carried"]], form)
        with torch.no_grad():
            for kind in ("params", "momenta"):
                for name, tensor in self.state[kind].items():
                    tensor.copy_(stored[kind][name].to(self.device))
        buffers = {name: stored["buffers"][name].to(self.device) for name in self.state["buffers"]}
        self.state |= {"buffers": buffers, "carried": carried}

    def _of_run(self, run: int) -> list[Any]:
        """The state of one network."""
        if len(self.runs) == 1:
            return list(self.state.values())
        return [tree_map(lambda tensor: tensor[run], part) for part in self.state.values()]

    def _explained(self, run: int, batch: Batch, number: int, random_state: Tensor, is_plain: bool) -> NonFiniteError:
        """The error for a step of a run that was not finite."""
        params, buffers, carried, _ = self._of_run(run)
        is_single = len(self.runs) == 1
        samples, labels = batch if is_single else (part[run] for part in batch)
        start = Start(number, params, buffers, (samples, labels), carried, random_state)
        error = nonfinite_error(self.model, self._methods[is_plain], self._dtype, start)
        if is_single:
            return error
        return NonFiniteError(f"of the runs that are trained together, that of seed {self.runs[run].seed}: {error}")
