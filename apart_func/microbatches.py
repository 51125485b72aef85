"""Micro-batches: a batch in equal parts, and one output of those of its parts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from apart_func.autodiff import is_unreached
from apart_func.errors import BatchError
from apart_func.samples import batch_size, cut_batch
from apart_func.trees import StepOutput, concatenate, stack_by_layer


def split_batch(batch: Any, parts: int) -> list[Any]:
    """Cut a batch into equal parts, or raise a BatchError if there are none."""
    if parts == 1:
        return [batch]
    samples = batch_size(batch)
    if samples % parts:
        raise BatchError(
            f"microbatches={parts} does not divide the batch of {samples} samples. Use a divisor, and "
            "drop_last=True in the data loader."
        )
    size = samples // parts
    return [cut_batch(batch, start, start + size, samples) for start in range(0, samples, size)]


def mean_output(outputs: Sequence[StepOutput]) -> StepOutput:
    """Make one output of those of micro-batches: means of losses and gradients, the rest joined."""
    return StepOutput(
        grads={name: _mean([out.grads[name] for out in outputs]) for name in outputs[0].grads},
        buffers=outputs[-1].buffers,
        loss=torch.stack([out.loss for out in outputs]).mean(),
        adversarial_loss=torch.stack([out.adversarial_loss for out in outputs]).mean(),
        output=concatenate([out.output for out in outputs]),
        stats=stack_by_layer([out.stats for out in outputs]),
        stat_grads=stack_by_layer([out.stat_grads for out in outputs]),
        perturbation=stack_by_layer([out.perturbation for out in outputs]),
        adversarial_stats=stack_by_layer([out.adversarial_stats for out in outputs]),
        all_finite=torch.stack([out.all_finite for out in outputs]).all(),
        aux=concatenate([out.aux for out in outputs]),
    )


def _mean(grads: Sequence[Tensor]) -> Tensor:
    if all(map(is_unreached, grads)):
        return grads[0]
    if any(grad.is_sparse for grad in grads):
        return sum(grads[1:], grads[0]) / len(grads)
    return torch.stack(list(grads)).mean(0)
