"""Loads golden cases, and puts what a replay yields into the words of the recorded keys (see README.md)."""

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy
import torch
from golden.models import MODELS
from torch import Tensor, nn

FOLDER = Path(__file__).parent
NAMES = sorted(path.stem for path in FOLDER.glob("*.npz"))
INPUTS = ("param/", "buffer/", "x/", "y/")


@dataclass(frozen=True)
class Case:
    """One recorded run: its settings, its batches, and what came out of it."""

    model_name: str
    epsilon: float
    groups: int
    ratio: float
    steps: int
    learning_rate: float
    recorded: dict[str, Tensor]

    def model(self) -> nn.Module:
        """The model in its state before step 0."""
        model = MODELS[self.model_name]().double().train()
        model.load_state_dict(self.under("param/") | self.under("buffer/"))
        return model

    def batches(self) -> list[tuple[Tensor, Tensor]]:
        """Samples and labels, step by step."""
        return [(self.recorded[f"x/{t}"], self.recorded[f"y/{t}"]) for t in range(self.steps)]

    def results(self) -> dict[str, Tensor]:
        """All that a replay has to yield."""
        return {key: value for key, value in self.recorded.items() if not key.startswith(INPUTS)}

    def under(self, prefix: str) -> dict[str, Tensor]:
        """All that is recorded under a prefix, keyed by the rest of the key."""
        return {key.removeprefix(prefix): value for key, value in self.recorded.items() if key.startswith(prefix)}


class Outcome(NamedTuple):
    """What a replay yields for one step.

    Attributes:
        loss: the proxy pass's, not weighted.
        adversarial_loss: the adversarial pass's, not weighted.
        output: model output of the proxy pass.
        grads: weighted and added, by parameter name.
        stat_grads: (mean, var) by layer name, of the loss, not weighted.
        params: after the step, by name.
        buffers: after the step, by name.
    """

    loss: Tensor
    adversarial_loss: Tensor
    output: Tensor
    grads: dict[str, Tensor]
    stat_grads: dict[str, tuple[Tensor, Tensor]]
    params: dict[str, Tensor]
    buffers: dict[str, Tensor]


def load(name: str) -> Case:
    """The case of that name; `NAMES` holds all of them."""
    with numpy.load(FOLDER / f"{name}.npz") as file:
        arrays = dict(file)
    return Case(
        model_name=str(arrays.pop("model")),
        epsilon=float(arrays.pop("epsilon")),
        groups=int(arrays.pop("groups")),
        ratio=float(arrays.pop("ratio")),
        steps=int(arrays.pop("steps")),
        learning_rate=float(arrays.pop("lr")),
        recorded={key: torch.from_numpy(value) for key, value in arrays.items()},
    )


def as_recorded(outcomes: list[Outcome]) -> dict[str, Tensor]:
    """The outcomes of all steps, under the keys of `Case.results`."""
    first, last = outcomes[0], outcomes[-1]
    results = {"output/0": first.output}
    for t, outcome in enumerate(outcomes):
        results |= {f"loss/{t}": outcome.loss, f"adversarial_loss/{t}": outcome.adversarial_loss}
    results |= {f"grad/{name}": grad for name, grad in first.grads.items()}
    for layer, (mean, var) in first.stat_grads.items():
        results |= {f"stat_grad_mean/{layer}": mean, f"stat_grad_var/{layer}": var}
    results |= {f"final_param/{name}": param for name, param in last.params.items()}
    for name, buffer in last.buffers.items():
        if not name.endswith("num_batches_tracked"):
            results[f"final_buffer/{name}"] = buffer
    return results


def assert_as_recorded(case: Case, outcomes: list[Outcome]) -> None:
    """Check a replay: every key that is recorded is there, no other, and each with its value."""
    # All sums are float64 (2e-16) in another order, and their error grows by a small factor from layer to layer and
    # from step to step; 1e-12 is a thousand times what is seen. Some gradients are zero by mathematics (a bias before
    # BN) and 1e-17 in fact: the absolute part is for them, next to gradients of size 0.01 to 1.
    torch.testing.assert_close(as_recorded(outcomes), case.results(), rtol=1e-12, atol=1e-14)
