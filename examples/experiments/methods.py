"""Training steps: every method as a function of one form, and `Learner`, which takes the steps.

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

A learner holds all that a step moves, and may hold several networks, of runs that differ in their seed alone: one step
is then that of the method under `vmap`, each network on the batch of its own seed. Numbers agree up to rounding with
those of a run by itself; where steps draw at random, the draws are others.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_leaves, tree_map

import apart_func as apart
from apart_func import StepOutput, Tensors
from experiments import machine
from experiments.settings import APART_METHODS, MethodSettings, Settings, SettingsError

Batch = tuple[Tensor, Tensor]
Carried = dict[str, Any]  # tensors, or tuples of them, by name
LossFunction = Callable[[Tensor, Tensor], Tensor]
Gradient = Callable[[Tensors, Tensors, Batch], StepOutput]
# The adversarial loss is that of the second pass or the perturbed groups, and NaN where there is neither.
Step = Callable[[Tensors, Tensors, Batch, Carried], tuple[StepOutput, Carried]]

RULES: dict[str, apart.Rule] = {
    "sign": apart.sign_perturbation,
    "random_sign": apart.random_sign_perturbation,
    "l2": apart.l2_perturbation,
}
AMP_DTYPES = {None: None, "bf16": torch.bfloat16}
ALONE = {"clip": None, "channels_last": False}  # what only a single run can use, and the value that leaves it out


def initially_carried(model: nn.Module, settings: MethodSettings) -> Carried:
    """What the first step carries."""
    draws = settings.rule == "random_sign"  # in every step
    return apart.init_perturbation(model) if settings.name == "one_pass" and not draws else {}


def make_step(model: nn.Module, settings: MethodSettings, autocast_dtype: torch.dtype | None = None) -> Step:
    """Make the training step of a method, with cross-entropy as the loss."""
    smoothing = settings.label_smoothing
    loss_fn: LossFunction = partial(F.cross_entropy, label_smoothing=smoothing) if smoothing else F.cross_entropy
    if settings.name not in APART_METHODS:
        if settings.name == "ghost_noise":
            model = with_ghost_noise(model, settings.ghost_size)
        gradient = make_gradient(model, loss_fn, autocast_dtype)
        return _sam_step(gradient, settings.rho) if settings.name == "sam" else _carrying(gradient)
    shared: dict[str, Any] = {
        "epsilon": settings.epsilon,
        "groups": settings.groups,
        "rule": RULES[settings.rule],
        "autocast_dtype": autocast_dtype,
        "process_group": machine.process_group(),
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
        return out if machine.world_size() == 1 else _over_ranks(out)

    return gradient


def _over_ranks(out: StepOutput) -> StepOutput:
    """The mean of gradients, losses and floating-point buffers over ranks; all are finite if they are on every rank."""
    moved = [name for name, buffer in out.buffers.items() if buffer.is_floating_point()]
    parts = [*out.grads.values(), *(out.buffers[name] for name in moved), out.loss, out.adversarial_loss]
    *means, loss, adversarial_loss, finite = machine.mean_over_ranks([*parts, out.all_finite.to(out.loss.dtype)])
    return out._replace(
        grads=dict(zip(out.grads, means, strict=False)),
        buffers=out.buffers | dict(zip(moved, means[len(out.grads) :], strict=True)),
        loss=loss,
        adversarial_loss=adversarial_loss,
        all_finite=finite > 1 - 0.5 / machine.world_size(),
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


class NonFiniteError(RuntimeError):
    """A loss or gradient is infinite or not a number."""


def check_fit(runs: Sequence[Settings]) -> None:
    """Make sure that runs can be trained together."""
    first = runs[0]
    if any(replace(run, seed=first.seed, out=first.out) != first for run in runs):
        raise SettingsError("only runs that differ in their seed alone can be trained together.")
    if machine.world_size() > 1 < len(runs):
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
        states = [(*apart.split_state(model), initially_carried(model, self.method)) for model in models]
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
        wrong = (out.output.argmax(dim=-1) != batch[1]).sum(dim=-1) * machine.world_size()
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
        apart.load_state_(self.model, params, buffers)
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
