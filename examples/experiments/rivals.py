"""What APART is compared with, as steps that are pure functions: plain training and its rivals.

    plain          ∇L(θ)
    sam            ∇L at θ + ρ ∇L/‖∇L‖                                                 (arXiv 2010.01412)
    sam_on         ∇L at θ + δ, where δ moves the γ and β of normalisation layers       (arXiv 2306.04226)
                   alone: ρ sign(∇L) for linf, ρ ∇L/‖∇L‖ over them for l2
    momentum_sam   ∇L at θ − ρ v/‖v‖, with v ← μ v + ∇L; one pass                       (arXiv 2401.12033)
    ghost_noise    ∇L with every sample of a layer normalised by the statistics of      (arXiv 2305.17205)
                   a random ghost group, without a gradient through the group; one pass

Packages have them as optimizers that move the weights in place between two backward calls of the user's: that form can
be neither mapped over networks nor compiled into one graph.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase

from apart_func import (
    FunctionalModel,
    Precision,
    StepOutput,
    Tensors,
    all_finite,
    functionalize,
    grad_and_value,
    proxy_pass,
    sam_ascent,
)
from experiments import ranks
from experiments.settings import MethodSettings, SettingsError

if TYPE_CHECKING:
    from experiments.methods import Batch, Carried, Step

LossFunction = Callable[[Tensor, Tensor], Tensor]
NORMALISATION = (_NormBase, nn.GroupNorm, nn.LayerNorm)


class Gradient(NamedTuple):
    """An ordinary forward and backward, as a function of the state; on several ranks that of all of them.

    Attributes:
        model: the network, in training mode.
        loss_fn: from output and labels to the loss.
        dtype: of an autocast region around the forward, or None.
        fmodel: the network as the library has it, where its SyncBatchNorm is needed: it knows CPUs as well.
    """

    model: nn.Module
    loss_fn: LossFunction
    dtype: torch.dtype | None
    fmodel: FunctionalModel | None = None

    def __call__(self, params: Tensors, buffers: Tensors, batch: Batch) -> StepOutput:
        """Run both. The output is that of a step with one pass."""
        if self.fmodel is None:
            grads, loss, output, moved = self._of_torch(params, buffers, batch)
        else:
            passed = proxy_pass(self.fmodel, self.loss_fn, params, buffers, batch, precision=Precision(self.dtype))
            grads, loss, output, moved = passed.grads, passed.loss, passed.output.detach(), passed.buffers
        out = StepOutput(
            grads=grads,
            buffers=moved,
            loss=loss,
            adversarial_loss=torch.full_like(loss, torch.nan),
            output=output,
            stats={},
            adversarial_stats={},
            stat_grads={},
            perturbation={},
            all_finite=all_finite([loss, *grads.values()]),
        )
        return out if ranks.count() == 1 else _over_ranks(out)

    def _of_torch(self, params: Tensors, buffers: Tensors, batch: Batch) -> tuple[Tensors, Tensor, Tensor, Tensors]:
        images, labels = batch

        def loss_of(trained: Tensors) -> tuple[Tensor, Any]:
            moved = {name: buffer.clone() for name, buffer in buffers.items()}  # batch norm moves them in place
            with torch.autocast(images.device.type, dtype=self.dtype, enabled=self.dtype is not None):
                output = functional_call(self.model, {**trained, **moved}, (images,))
                loss = self.loss_fn(output, labels)
            return loss, (output.detach(), moved)

        grads, loss, (output, moved) = grad_and_value(loss_of, params)
        return grads, loss, output, moved


def make_gradient(model: nn.Module, loss_fn: LossFunction, dtype: torch.dtype | None) -> Gradient:
    """The gradient of a network, on the ranks that there are."""
    is_synchronised = any(isinstance(module, nn.SyncBatchNorm) for module in model.modules())
    return Gradient(model, loss_fn, dtype, functionalize(model) if is_synchronised else None)


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


def make_rival_step(gradient: Gradient, settings: MethodSettings, momentum: float) -> Step:
    """Make the step of a method that is not APART's."""
    if settings.name == "ghost_noise":
        gradient = gradient._replace(model=with_ghost_noise(gradient.model, settings.ghost_size))
    moved = {"sam": sam_ascent, "sam_on": _normalisation_moved(gradient.model, settings.norm)}.get(settings.name)

    def step(
        params: Tensors, buffers: Tensors, batch: Batch, carried: Carried, *, epsilon: Tensor | None = None
    ) -> tuple[StepOutput, Carried]:
        at = params
        if settings.name == "momentum_sam":
            at = sam_ascent(params, {name: -velocity for name, velocity in carried.items()}, settings.rho)
        first = gradient(at, buffers, batch)
        if settings.name == "momentum_sam":
            carried = {name: momentum * velocity + first.grads[name] for name, velocity in carried.items()}
        if moved is None:
            return first, carried
        second = gradient(moved(params, first.grads, settings.rho), buffers, batch)
        # A second loss that is not finite leaves its mark on the gradients.
        finite = first.all_finite & second.all_finite
        return first._replace(grads=second.grads, adversarial_loss=second.loss, all_finite=finite), carried

    return step


def _normalisation_moved(model: nn.Module, norm: str) -> Callable[[Tensors, Tensors, float], Tensors]:
    """SAM-ON's move: that of the scales and biases of normalisation layers alone."""
    layers = [(name, module) for name, module in model.named_modules() if isinstance(module, NORMALISATION)]
    chosen = {f"{name}.{key}".lstrip(".") for name, layer in layers for key, _ in layer.named_parameters()}

    def moved(params: Tensors, grads: Tensors, rho: float) -> Tensors:
        at = {name: param for name, param in params.items() if name in chosen}
        if norm == "l2":
            return params | sam_ascent(at, {name: grads[name] for name in at}, rho)
        return params | {name: param + rho * grads[name].sign() for name, param in at.items()}

    return moved


def with_ghost_noise(model: nn.Module, size: int) -> nn.Module:
    """A copy of a network whose batch norm normalises every sample by the statistics of a random ghost group.

    With the batch's μ, s and those of `size` samples that are drawn with replacement, μ_g and s_g, the layer returns
    y = γ (x̂ − (μ_g − μ)/s) · s/s_g + β. What depends on the group is a constant for differentiation.

    Raises:
        SettingsError: a layer is another kind of batch norm, in which the affine map is not the last thing.
    """
    model = copy.deepcopy(model)

    def noisy(layer: Any, inputs: tuple[Tensor, ...], y: Tensor) -> Any:
        if not layer.training:
            return None
        x = inputs[0].detach().to(torch.promote_types(inputs[0].dtype, torch.float32))
        positions = tuple(range(2, x.dim()))
        shape = (*x.shape[:2], *[1] * len(positions))
        means, squares = (v.mean(positions) if positions else v for v in (x, x.square()))  # of every sample, (M, C)
        mean, variance = means.mean(0), squares.mean(0) - means.mean(0).square()
        drawn = torch.randint(len(x), (len(x), size), device=x.device)
        ghost_mean = means[drawn].mean(1)
        ghost_variance = (squares[drawn].mean(1) - ghost_mean.square()).clamp(min=0)
        shift = ((ghost_mean - mean) / torch.sqrt(variance + layer.eps)).view(shape).to(y.dtype)
        scale = torch.sqrt((variance + layer.eps) / (ghost_variance + layer.eps)).view(shape).to(y.dtype)
        across = (-1, *[1] * len(positions))
        gamma, beta = (None if p is None else p.view(across) for p in (layer.weight, layer.bias))
        if gamma is None or beta is None:
            return (y - shift) * scale
        return (y - beta - gamma * shift) * scale + beta

    for name, layer in model.named_modules():
        if isinstance(layer, _BatchNorm):
            if type(layer) not in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d):
                raise SettingsError(f"ghost noise does not know {type(layer).__name__}, layer {name!r}.")
            layer.register_forward_hook(noisy)
    return model
