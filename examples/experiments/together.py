"""Networks of runs that differ in their seed alone, trained at the same time in one program: `Together`.

    one    = the method's step                                one network, one batch
    all    = vmap(one), and SGD on the stacked tensors        every network, each on the batches of its own seed

Each run starts from the weights and gets the batches that it has when it is trained alone, and the numbers agree up to
rounding. Where steps draw at random, the draws are others.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import vmap
from torch.utils._pytree import tree_flatten, tree_map

from apart_func import Tensors, load_state_, split_state
from experiments.learner import AMP_DTYPES, Counted, Steps, carried_again
from experiments.methods import Batch, Carried, Step, initially_carried
from experiments.nonfinite import NonFiniteError, Start, nonfinite_error
from experiments.settings import Settings, SettingsError, TrainingSettings

# What the program of one run has beyond this one, and its value where it is not used.
ALONE = {"clip": None, "channels_last": False}


def check_fit(runs: Sequence[Settings]) -> None:
    """Make sure that runs can be trained together.

    Raises:
        SettingsError: they cannot.
    """
    first = runs[0]
    if any(replace(run, seed=first.seed, out=first.out) != first for run in runs):
        raise SettingsError("only runs that differ in their seed alone can be trained together.")
    used = [
        f"{name} {getattr(first.training, name)}" for name, no in ALONE.items() if getattr(first.training, name) != no
    ]
    if used:
        raise SettingsError(
            f"runs with {', '.join(used)} cannot be trained together. Leave it out, or train each by itself."
        )


class Members(NamedTuple):
    """The state of all networks, in stacked tensors: entry i belongs to run i.

    Attributes:
        params: trained tensors by name.
        buffers: all others.
        carried: what the method hands from step to step.
        momenta: of SGD, keyed as `params`.
    """

    params: Tensors
    buffers: Tensors
    carried: Carried
    momenta: Tensors

    def of_run(self, number: int) -> Members:
        """The state of one network."""
        return Members(*(tree_map(lambda tensor: tensor[number], part) for part in self))


Update = Callable[[Members, Batch, Tensor, dict[str, Tensor]], tuple[Members, Tensor, Tensor]]


def make_update(step: Step, training: TrainingSettings) -> Update:
    """Make the training step of all networks: the method's under vmap, and SGD.

    Returns:
        A pure function of members, stacked batches, a 0-d learning rate and further options of the step. It returns new
        members, what they have counted (see `Counted.sums`), and whether each was finite.
    """

    def one(
        params: Tensors, buffers: Tensors, carried: Carried, samples: Tensor, labels: Tensor, options: dict[str, Tensor]
    ) -> tuple[Tensors, Tensors, Carried, Tensor, Tensor]:
        out, carried = step(params, buffers, (samples, labels), carried, **options)
        wrong = (out.output.argmax(dim=1) != labels).sum()
        sums = torch.stack([out.loss, out.adversarial_loss, wrong.to(out.loss.dtype), torch.ones_like(out.loss)])
        return out.grads, out.buffers, carried, sums, out.all_finite

    def update(
        members: Members, batches: Batch, lr: Tensor, options: dict[str, Tensor]
    ) -> tuple[Members, Tensor, Tensor]:
        grads, buffers, carried, sums, all_finite = vmap(one, in_dims=(0, 0, 0, 0, 0, None), randomness="different")(
            members.params, members.buffers, members.carried, *batches, options
        )
        momenta = {
            name: training.momentum * members.momenta[name] + (grads[name] + training.weight_decay * param)
            for name, param in members.params.items()
        }
        params = {name: param - lr * momenta[name] for name, param in members.params.items()}
        return Members(params, buffers, carried, momenta), sums, all_finite

    return update


class Together:
    """Networks in training, as the runner sees them; see `experiments.learner.Learns`.

    Args:
        models: networks of one architecture, before the first step, on their device.
        runs: their settings.
    """

    def __init__(self, models: Sequence[nn.Module], runs: Sequence[Settings]) -> None:
        self.runs, self.model, self.training = runs, models[0], runs[0].training
        self.device = next(self.model.parameters()).device
        self._dtype = AMP_DTYPES[self.training.amp]
        states = [(*split_state(model), initially_carried(model, runs[0].method)) for model in models]
        params, buffers, carried = tree_map(lambda *tensors: torch.stack(tensors).detach(), *states)
        self.members = Members(params, buffers, carried, {name: torch.zeros_like(p) for name, p in params.items()})
        self._steps = Steps(self.model, runs[0])
        self._updates: dict[Step, Any] = {}

    def train(self, batches: Sequence[Batch], lr: float, number: int, done: float) -> Counted:
        """See `Learns`."""
        step, options = self._steps.due(number, done)
        if step not in self._updates:
            update = make_update(step, self.training)
            compiled = self.training.compile
            self._updates[step] = torch.compile(update, fullgraph=True, dynamic=False) if compiled else update
        samples, labels = (torch.stack(part).to(self.device) for part in zip(*batches, strict=True))
        before, rate = self.members, torch.tensor(lr, device=self.device)
        self.members, sums, all_finite = self._updates[step](before, (samples, labels), rate, options)
        if not all_finite.all():
            failed = int(all_finite.int().argmin())
            is_plain = step is not self._steps.of_method
            raise self._explained(failed, before.of_run(failed), (samples[failed], labels[failed]), number, is_plain)
        return Counted(sums.double(), None)

    def settle(self) -> None:
        """Nothing: every step was looked at."""

    def evaluated(self, run: int) -> nn.Module:
        """See `Learns`."""
        members = self.members.of_run(run)
        load_state_(self.model, members.params, members.buffers)
        return self.model

    @torch.no_grad()
    def scores(self, model: nn.Module, samples: Tensor) -> Tensor:
        """See `Learns`."""
        with torch.autocast(self.device.type, self._dtype, enabled=self._dtype is not None):
            scores: Tensor = model(samples.to(self.device))
        return scores

    def state_dict(self) -> dict[str, Any]:
        """See `Learns`."""
        return self.members._asdict() | {"carried": tree_flatten(self.members.carried)[0]}  # plain, as checkpoints are

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See `Learns`."""
        carried = carried_again(self.members.carried, state["carried"], self.device)
        trees = {
            kind: {name: state[kind][name].to(self.device) for name in tensors}
            for kind, tensors in self.members._asdict().items()
            if kind != "carried"
        }
        self.members = Members(carried=carried, **trees)

    def _explained(self, run: int, before: Members, batch: Batch, number: int, is_plain: bool) -> NonFiniteError:
        """The error for a step of a run that was not finite."""
        state = (before.params, before.buffers, batch, before.carried)
        start = Start(number, *state, torch.get_rng_state(), is_plain)
        error = nonfinite_error(self.model, self.runs[0].method, self._dtype, start)
        return NonFiniteError(f"of the runs that are trained together, that of seed {self.runs[run].seed}: {error}")
