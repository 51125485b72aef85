"""The methods as training steps of one form: `make_step(model, settings)`.

    plain          ∇L(θ)                                                               one pass
    apart          the weighted sum with the gradient at perturbed statistics          two
    one_pass       the same, where some groups of the batch are perturbed              one
    apart_sam      apart, with the second gradient at θ + ρ ∇L/‖∇L‖                    two
    sam            ∇L at θ + ρ ∇L/‖∇L‖                                                 two (arXiv 2010.01412)
    ghost_noise    ∇L with every sample of a layer normalised by the statistics of a   one (arXiv 2305.17205)
                   random ghost group, without a gradient through the group

`step(params, buffers, batch, carried)` is pure whatever the method is: it returns an output as `apart_func` has it, and
what the next step gets as `carried`: the perturbation, where one pass uses a gradient. Packages have SAM as an
optimizer that moves weights in place between two backward calls of the user's: that can be neither mapped nor compiled.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _BatchNorm

import apart_func as apart
from apart_func import StepOutput, Tensors
from experiments import ranks
from experiments.settings import MethodName, MethodSettings, RuleName, SettingsError

Batch = tuple[Tensor, Tensor]
Carried = dict[str, Any]  # tensors, or tuples of them, by name
LossFunction = Callable[[Tensor, Tensor], Tensor]
Gradient = Callable[[Tensors, Tensors, Batch], StepOutput]
# The adversarial loss is that of the second pass or the perturbed groups, and NaN where there is neither.
Step = Callable[[Tensors, Tensors, Batch, Carried], tuple[StepOutput, Carried]]

# What the forward-backward passes of a step are called, in their order.
PASSES: dict[MethodName, tuple[str, ...]] = {
    "plain": ("training",),
    "apart": ("proxy", "adversarial"),
    "one_pass": ("training",),
    "apart_sam": ("proxy", "adversarial"),
    "sam": ("first", "second"),
    "ghost_noise": ("training",),
}

# Settings that only some methods read; the others concern all.
_APART = ("apart", "one_pass", "apart_sam")
READ_BY: dict[str, tuple[str, ...]] = {
    "method.epsilon": _APART,
    "method.rule": _APART,
    "method.groups": _APART,
    "method.ratio": ("apart", "apart_sam"),
    "method.clean_fraction": ("one_pass",),
    "method.rho": ("apart_sam", "sam"),
    "method.ghost_size": ("ghost_noise",),
}
OWN_RULES: dict[str, RuleName] = {"one_pass": "random_sign"}  # where none is said, if it is not that of the settings
ONE_GRADIENT_RULES: dict[str, apart.Rule] = {
    "sign": apart.sign_perturbation,
    "random_sign": apart.random_sign_perturbation,
    "l2": apart.l2_perturbation,
}


def initially_carried(model: nn.Module, settings: MethodSettings) -> Carried:
    """What the first step carries."""
    draws = settings.rule == "random_sign"  # in every step
    return apart.init_perturbation(model) if settings.name == "one_pass" and not draws else {}


def make_step(model: nn.Module, settings: MethodSettings, autocast_dtype: torch.dtype | None = None) -> Step:
    """Make the training step of a method, with cross-entropy as the loss."""
    smoothing = settings.label_smoothing
    loss_fn: LossFunction = partial(F.cross_entropy, label_smoothing=smoothing) if smoothing else F.cross_entropy
    if settings.name not in _APART:
        if settings.name == "ghost_noise":
            model = with_ghost_noise(model, settings.ghost_size)
        gradient = make_gradient(model, loss_fn, autocast_dtype)
        return _sam_step(gradient, settings.rho) if settings.name == "sam" else _carrying(gradient)
    shared: dict[str, Any] = {
        "epsilon": settings.epsilon,
        "groups": settings.groups,
        "rule": ONE_GRADIENT_RULES[settings.rule],
        "autocast_dtype": autocast_dtype,
        "process_group": ranks.group(),
    }
    if settings.name == "one_pass":
        one_pass = apart.make_one_pass_step(model, loss_fn, clean_fraction=settings.clean_fraction, **shared)

        def step(params: Tensors, buffers: Tensors, batch: Batch, carried: Carried) -> tuple[StepOutput, Carried]:
            out = one_pass(params, buffers, batch, *([carried] if carried else []))
            return out, out.perturbation if carried else carried

        return step
    if settings.name == "apart_sam":
        return _carrying(apart.make_apart_sam_step(model, loss_fn, rho=settings.rho, ratio=settings.ratio, **shared))
    return _carrying(apart.make_apart_step(model, loss_fn, ratio=settings.ratio, **shared))


def _carrying(stateless: Callable[[Tensors, Tensors, Batch], StepOutput]) -> Step:
    return lambda params, buffers, batch, carried: (stateless(params, buffers, batch), carried)


def make_gradient(model: nn.Module, loss_fn: LossFunction, dtype: torch.dtype | None) -> Gradient:
    """An ordinary forward and backward as a function of the state; on several ranks that of all of them."""
    # The library's SyncBatchNorm is needed, which knows CPUs as well.
    is_synchronised = any(isinstance(module, nn.SyncBatchNorm) for module in model.modules())
    fmodel = apart.functionalize(model) if is_synchronised else None

    def of_torch(params: Tensors, buffers: Tensors, batch: Batch) -> tuple[Tensors, Tensor, Tensor, Tensors]:
        def loss_of(trained: Tensors) -> tuple[Tensor, Any]:
            moved = {name: buffer.clone() for name, buffer in buffers.items()}  # batch norm moves them in place
            with torch.autocast(batch[0].device.type, dtype=dtype, enabled=dtype is not None):
                output = functional_call(model, {**trained, **moved}, (batch[0],))
                loss = loss_fn(output, batch[1])
            return loss, (output.detach(), moved)

        grads, loss, (output, moved) = apart.grad_and_value(loss_of, params)
        return grads, loss, output, moved

    def gradient(params: Tensors, buffers: Tensors, batch: Batch) -> StepOutput:
        if fmodel is None:
            grads, loss, output, moved = of_torch(params, buffers, batch)
        else:
            passed = apart.proxy_pass(fmodel, loss_fn, params, buffers, batch, precision=apart.Precision(dtype))
            grads, loss, output, moved = passed.grads, passed.loss, passed.output.detach(), passed.buffers
        finite, nan = apart.all_finite([loss, *grads.values()]), torch.full_like(loss, torch.nan)
        none: dict[str, Any] = {"stats": {}, "adversarial_stats": {}, "stat_grads": {}, "perturbation": {}}
        out = StepOutput(
            grads=grads, buffers=moved, loss=loss, adversarial_loss=nan, output=output, all_finite=finite, **none
        )
        return out if ranks.count() == 1 else _over_ranks(out)

    return gradient


def _over_ranks(out: StepOutput) -> StepOutput:
    """The mean of gradients, losses and floating-point buffers over ranks; all are finite if they are on every rank."""
    moved = [name for name, buffer in out.buffers.items() if buffer.is_floating_point()]
    parts = [*out.grads.values(), *(out.buffers[name] for name in moved), out.loss, out.adversarial_loss]
    *means, loss, adversarial_loss, finite = ranks.mean([*parts, out.all_finite.to(out.loss.dtype)])
    return out._replace(
        grads=dict(zip(out.grads, means, strict=False)),
        buffers=out.buffers | dict(zip(moved, means[len(out.grads) :], strict=True)),
        loss=loss,
        adversarial_loss=adversarial_loss,
        all_finite=finite > 1 - 0.5 / ranks.count(),
    )


def _sam_step(gradient: Gradient, rho: float) -> Step:
    def step(params: Tensors, buffers: Tensors, batch: Batch, carried: Carried) -> tuple[StepOutput, Carried]:
        first = gradient(params, buffers, batch)
        second = gradient(apart.sam_ascent(params, first.grads, rho), buffers, batch)
        # A second loss that is not finite leaves its mark on the gradients.
        finite = first.all_finite & second.all_finite
        return first._replace(grads=second.grads, adversarial_loss=second.loss, all_finite=finite), carried

    return step


def with_ghost_noise(model: nn.Module, size: int) -> nn.Module:
    """A copy of a network whose batch norm normalises every sample by the statistics of a random ghost group.

    With the batch's μ, s and those of `size` samples that are drawn with replacement, μ_g and s_g, the layer returns
    y = γ (x̂ − (μ_g − μ)/s) · s/s_g + β. What depends on the group is a constant for differentiation.
    In another kind of batch norm the affine map may not be the last thing.
    """
    model = copy.deepcopy(model)

    def noisy(layer: Any, inputs: tuple[Tensor, ...], y: Tensor) -> Any:
        if not layer.training:
            return None
        x = inputs[0].detach().to(torch.promote_types(inputs[0].dtype, torch.float32))
        positions = tuple(range(2, x.dim()))
        means, squares = (v.mean(positions) if positions else v for v in (x, x.square()))  # of every sample, (M, C)
        mean, variance = means.mean(0), squares.mean(0) - means.mean(0).square()
        drawn = torch.randint(len(x), (len(x), size), device=x.device)
        ghost_mean = means[drawn].mean(1)
        ghost_variance = (squares[drawn].mean(1) - ghost_mean.square()).clamp(min=0)
        ones = [1] * len(positions)
        shift = ((ghost_mean - mean) / torch.sqrt(variance + layer.eps)).view(*x.shape[:2], *ones).to(y.dtype)
        scale = torch.sqrt((variance + layer.eps) / (ghost_variance + layer.eps)).view(*x.shape[:2], *ones).to(y.dtype)
        if not layer.affine:
            return (y - shift) * scale
        gamma, beta = (p.view(-1, *ones) for p in (layer.weight, layer.bias))
        return (y - beta - gamma * shift) * scale + beta

    for name, layer in model.named_modules():
        if isinstance(layer, _BatchNorm):
            if type(layer) not in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d):
                raise SettingsError(f"ghost noise does not know {type(layer).__name__}, layer {name!r}.")
            layer.register_forward_hook(noisy)
    return model
