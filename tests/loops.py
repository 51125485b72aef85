"""Training steps written as a user of `loss.backward()` writes them, and what they leave as a `StepOutput`."""

from typing import Any

import torch
import torch.nn.functional as F
from oracle import LossFunction, call, cut, map_tensors, sample_count
from torch import Tensor, nn

from apart_func import APART, StatGrads, StepOutput, split_state


def weights(samples: int, adversarial_samples: int) -> tuple[float, float]:
    """r and 1 − r."""
    r = samples / (samples + adversarial_samples)
    return r, 1 - r


def both_passes(
    apart: APART,
    batch: Any,
    ratio: float = 1.0,
    loss_fn: LossFunction = F.cross_entropy,
    *,
    scale: float = 1.0,
    model: nn.Module | None = None,
) -> tuple[Tensor, Tensor, Any]:
    """The four lines. Gradients add up in the model; the losses come back without their weights, and the output."""
    model = model or apart.model
    x, y = batch
    chosen = int(ratio * sample_count(x))
    r, rest = weights(sample_count(x), chosen)
    with apart.to_proxy():
        output = call(model, x)
        loss = loss_fn(output, y)
        (scale * r * loss).backward()
    with apart.to_adver():
        adversarial_loss = loss_fn(call(model, cut(x, chosen)), cut(y, chosen))
        (scale * rest * adversarial_loss).backward()
    return loss.detach(), adversarial_loss.detach(), map_tensors(Tensor.detach, output)


def in_one_pass(apart: APART, batch: Any, clean_fraction: float = 0.5) -> None:
    """The two lines of one pass; gradients add up in the model."""
    with apart.one_pass(clean_fraction):
        F.cross_entropy(apart.model(batch[0]), batch[1]).backward()


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """What an optimizer would use, zero where there is nothing."""
    return {
        name: torch.zeros_like(p) if p.grad is None else p.grad.clone()
        for name, p in model.named_parameters()
        if p.requires_grad
    }


def drop_in_step(
    model: nn.Module,
    batch: Any,
    *,
    loss_fn: LossFunction = F.cross_entropy,
    epsilon: float = 0.1,
    groups: int = 0,
    ratio: float = 1.0,
    rows: Any = None,
) -> StepOutput:
    """A step of `APART` from fresh gradients, in the words of the functional one."""
    apart = APART(model, epsilon, groups, rows=rows)
    model.zero_grad()
    loss, adversarial_loss, output = both_passes(apart, batch, ratio, loss_fn)
    r, _ = weights(sample_count(batch[0]), int(ratio * sample_count(batch[0])))
    _, buffers = split_state(model)
    return StepOutput(
        grads=gradients(model),
        buffers={name: buffer.clone() for name, buffer in buffers.items()},
        loss=loss,
        adversarial_loss=adversarial_loss,
        output=output,
        stats=apart.stats,
        stat_grads={layer: StatGrads(g.mean / r, g.scale / r) for layer, g in apart.stat_grads.items()},
        perturbation=apart.perturbation,
        adversarial_stats={},
        all_finite=torch.tensor(True),
    )
