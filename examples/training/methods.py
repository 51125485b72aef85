"""The methods as training steps of one form: `make_step(model, settings)`.

    plain       one forward and backward                   its gradient
    sam         a second one at θ + ρ ∇L/‖∇L‖              the gradient of the second alone
    apart       a second one with perturbed statistics     the weighted sum of both
    apart_sam   a second one with both                     the weighted sum of both
    one_pass    some groups of the batch perturbed         the weighted sum of both, by one backward

`step(params, buffers, batch, carried)` is pure whatever the method is: gradients, new buffers and what the next step
gets as `carried` come out. The last three are `apart_func`'s; the first two are PyTorch's own forward and backward, as
a plain loop has them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from apart_func import (
    OnePassStep,
    Rule,
    StepOutput,
    init_perturbation,
    l2_perturbation,
    make_apart_sam_step,
    make_apart_step,
    make_one_pass_step,
    multi_step,
    random_sign_perturbation,
    sign_perturbation,
)
from apart_func.autodiff import Opened, gradient_eager, gradient_traced, is_traced
from apart_func.pytrees import PerturbationTree
from apart_func.sam import climbed
from apart_func.step import all_finite, over_microbatches
from training.carry import CarryingStep, make_carrying_step
from training.settings import MethodName, MethodSettings, SettingsError

Tensors = dict[str, Tensor]
Batch = tuple[Tensor, Tensor]

# What the forward-backward passes of a step are called, in their order.
PASSES: dict[MethodName, tuple[str, ...]] = {
    "plain": ("training",),
    "sam": ("first", "second"),
    "apart": ("proxy", "adversarial"),
    "apart_sam": ("proxy", "adversarial"),
    "one_pass": ("training",),
}

ONE_GRADIENT_RULES: dict[str, Rule] = {
    "sign": sign_perturbation,
    "random_sign": random_sign_perturbation,
    "l2": l2_perturbation,
}


class Step(Protocol):
    """One training step as a pure function."""

    def __call__(
        self,
        params: Tensors,
        buffers: Tensors,
        batch: Batch,
        carried: PerturbationTree,
        *,
        loss_scale: Tensor | None = None,
    ) -> tuple[StepOutput, PerturbationTree]:
        """Take one step.

        Args:
            params: trained tensors by name.
            buffers: all other tensors by name.
            batch: samples and labels.
            carried: `initially_carried`, then what the step before returned.
            loss_scale: 0-d factor on the losses during their backward, divided out of the gradients.

        Returns:
            The output as `apart_func` has it, and what is carried to the next step. `adversarial_loss` is that of the
            second pass or the perturbed groups, NaN where there is neither; the trees of statistics are empty but for
            APART.
        """


def passes_of(settings: MethodSettings) -> tuple[str, ...]:
    """What the passes of a step are called, with those that a rule of several steps adds."""
    passes = PASSES[settings.name]
    if settings.rule != "multi_step" or "adversarial" not in passes:
        return passes
    return (passes[0], *["ascent"] * (settings.ascent_steps - 1), passes[-1])


def initially_carried(model: nn.Module, settings: MethodSettings) -> PerturbationTree:
    """What the first step of a method carries: the perturbation of one pass, zero, and nothing for the others."""
    return init_perturbation(model) if settings.name == "one_pass" else {}


def make_step(model: nn.Module, settings: MethodSettings, autocast_dtype: torch.dtype | None = None) -> Step:
    """Make the training step of a method, with cross-entropy as the loss.

    Args:
        model: the network, in training mode. It is not changed.
        settings: which method, and its parameters.
        autocast_dtype: dtype of an autocast region around each forward; None opens none.

    Returns:
        The step, which `torch.compile(step, fullgraph=True, dynamic=False)` takes as well.

    Raises:
        ApartError: a setting is out of range, or the network has no batch norm to perturb.
    """
    if settings.name in ("plain", "sam"):
        return _carrying_nothing(_make_ordinary_step(model, settings, autocast_dtype))
    shared: dict[str, Any] = {
        "epsilon": settings.epsilon,
        "groups": settings.groups,
        "microbatches": settings.microbatches,
        "rule": ONE_GRADIENT_RULES.get(settings.rule) or multi_step(settings.ascent_steps),
        "autocast_dtype": autocast_dtype,
    }
    if settings.name == "one_pass" and settings.carry == "clean":
        return _carrying_the_perturbation(
            make_one_pass_step(model, F.cross_entropy, clean_fraction=settings.clean_fraction, **shared)
        )
    if settings.name == "one_pass":
        if autocast_dtype is not None or settings.microbatches > 1:
            raise SettingsError(
                f"carry {settings.carry} is an experiment, without amp and microbatches. Leave them out."
            )
        return _carrying_otherwise(make_carrying_step(model, settings, shared["rule"]))
    shared |= {"ratio": settings.ratio, "remainder": settings.remainder}
    if settings.name == "apart_sam":
        return _carrying_nothing(make_apart_sam_step(model, F.cross_entropy, rho=settings.rho, **shared))
    return _carrying_nothing(make_apart_step(model, F.cross_entropy, **shared))


def _carrying_the_perturbation(one_pass_step: OnePassStep) -> Step:
    def step(
        params: Tensors, buffers: Tensors, batch: Batch, carried: PerturbationTree, *, loss_scale: Tensor | None = None
    ) -> tuple[StepOutput, PerturbationTree]:
        out = one_pass_step(params, buffers, batch, carried, loss_scale=loss_scale)
        return out, out.perturbation

    return step


def _carrying_otherwise(carrying_step: CarryingStep) -> Step:
    def step(
        params: Tensors, buffers: Tensors, batch: Batch, carried: PerturbationTree, *, loss_scale: Tensor | None = None
    ) -> tuple[StepOutput, PerturbationTree]:
        return carrying_step(params, buffers, batch, carried)

    return step


def _carrying_nothing(stateless_step: Callable[..., StepOutput]) -> Step:
    def step(
        params: Tensors, buffers: Tensors, batch: Batch, carried: PerturbationTree, *, loss_scale: Tensor | None = None
    ) -> tuple[StepOutput, PerturbationTree]:
        return stateless_step(params, buffers, batch, loss_scale=loss_scale), carried

    return step


def _make_ordinary_step(
    model: nn.Module, settings: MethodSettings, autocast_dtype: torch.dtype | None
) -> Callable[..., StepOutput]:
    """Plain training or SAM.

    SAM is written as a function, since packages have it as an optimizer that moves the weights in place between two
    backward calls of the user's: that form can be neither compiled into one graph nor dropped after an overflow. The
    running statistics are those of its first pass.
    """

    def step(params: Tensors, buffers: Tensors, batch: Batch, *, loss_scale: Tensor | None = None) -> StepOutput:
        def one_batch(moved: Tensors, part: Any) -> StepOutput:
            run = partial(_gradient, model, buffers=moved, batch=part, dtype=autocast_dtype, loss_scale=loss_scale)
            first = run(params)
            if settings.name == "plain":
                return _output(first.loss, torch.full_like(first.loss, torch.nan), first.grads, first)
            second = run(climbed(params, first.grads, settings.rho))
            return _output(first.loss, second.loss, second.grads, first)

        return over_microbatches(one_batch, buffers, batch, settings.microbatches)

    return step


class _Pass(NamedTuple):
    """What an ordinary forward and backward yields."""

    loss: Tensor
    output: Tensor
    grads: Tensors
    buffers: Tensors


def _gradient(
    model: nn.Module,
    params: Tensors,
    buffers: Tensors,
    batch: Batch,
    dtype: torch.dtype | None,
    loss_scale: Tensor | None,
) -> _Pass:
    """An ordinary forward and backward."""
    images, labels = batch

    @contextmanager
    def run(trained: Tensors) -> Iterator[Opened]:
        moved = {name: buffer.clone() for name, buffer in buffers.items()}  # batch norm moves them in place
        with torch.autocast(images.device.type, dtype=dtype, enabled=dtype is not None):
            output = functional_call(model, {**trained, **moved}, (images,))
            loss = F.cross_entropy(output, labels)
        yield Opened(loss if loss_scale is None else loss * loss_scale, (loss.detach(), output.detach(), moved))

    (grads,), (loss, output, moved), _ = (gradient_traced if is_traced() else gradient_eager)(run, params)
    if loss_scale is not None:
        grads = {name: grad / loss_scale for name, grad in grads.items()}
    return _Pass(loss, output, grads, moved)


def _output(loss: Tensor, second_loss: Tensor, grads: Tensors, first: _Pass) -> StepOutput:
    # A second loss that is not finite leaves its mark on the gradients.
    finite = all_finite([loss, *grads.values()])
    return StepOutput(grads, first.buffers, loss, second_loss, first.output, {}, {}, {}, finite)
