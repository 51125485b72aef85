"""Robustness: how accurate a trained model is when its running statistics are off.

    μ' = μ(1 + δμ),  s' = s/(1 + δσ)                     with s = sqrt(running variance + eps)
    δ  = ε · sign(direction)                             for all layers, or for one alone
    direction                                            random signs, or the gradient of the loss by δ at δ = 0

Any model will do that has batch-norm layers with running statistics, however it was trained and whatever its mode. It
is not changed: everything is computed on a copy in evaluation mode.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from apart_func.errors import BatchError, ModelError, SettingError, StateError, UsageError
from apart_func.functional import LossFunction, call_module, copy_model, scalar_loss
from apart_func.rules import perturbed_stats, sign_perturbation
from apart_func.summary import summarised
from apart_func.trees import (
    BatchStats,
    PerturbationTree,
    StatGrads,
    StatGradTree,
    StatTree,
    Tensors,
    batch_size,
    input_and_target,
)

Batches = Iterable[tuple[Any, Any]]


@summarised
class Robustness(NamedTuple):
    """Accuracies, as fractions, by radius; all curves begin with the model as it is.

    Attributes:
        radii: ε, `(R,)`, from 0 upwards.
        random: all layers shifted at random, mean over draws, `(R,)`.
        adversarial: all layers shifted against the model, `(R,)`.
        layer_random: each layer alone at random, by name.
        layer_adversarial: each layer alone against the model, by name.
    """

    radii: Tensor
    random: Tensor
    adversarial: Tensor
    layer_random: Tensors
    layer_adversarial: Tensors


def robustness(
    model: nn.Module,
    loss_fn: LossFunction,
    held_out: Batches,
    test: Batches,
    radii: Sequence[float],
    *,
    draws: int = 4,
    layer_draws: int = 4,
    seed: int = 0,
) -> Robustness:
    """Measure how accuracy falls with the radius of a shift in the running statistics.

    Args:
        model: any module with batch-norm layers that keep running statistics.
        loss_fn: `(output, target) -> scalar`, a mean over samples; its gradient is the adversarial direction.
        held_out: batches `(input, target)` that the gradient is taken on; not those that measure.
        test: batches that accuracy is measured on. The model's output is class scores `(N, classes, ...)`.
        radii: ascending, in (0, 1); 0 is always measured.
        draws: random shifts of all layers at each radius.
        layer_draws: random shifts of each layer alone; 0 leaves `layer_random` empty.
        seed: of the random shifts, which are the same for every model of the same layers.

    Returns:
        A curve for all layers, and one for each.

    Raises:
        ApartError: a setting is out of range, there is no data, or the model has no running statistics.
    """
    check_radii(radii)
    if draws < 1 or layer_draws < 0:
        raise SettingError(f"draws={draws}, layer_draws={layer_draws}; expected draws ≥ 1 and layer_draws ≥ 0.")
    stats = running_stats(model)
    gradient = evaluation_gradients(model, loss_fn, held_out)
    generator = torch.Generator().manual_seed(seed)
    together = [_random_signs(stats, generator) for _ in range(draws)]
    alone = [_random_signs(stats, generator) for _ in range(layer_draws)]

    directions = [gradient, *together]
    directions += [{layer: direction[layer]} for direction in (gradient, *alone) for layer in stats]
    sizes = torch.tensor(radii, dtype=torch.float64)  # a 0-d tensor leaves float32 statistics as they are
    shifts = [{}, *(sign_perturbation(stats, direction, size) for direction in directions for size in sizes)]
    clean, shifted = accuracy_under_shift(model, shifts, test).split([1, len(shifts) - 1])

    curves = torch.cat([clean.expand(len(directions), 1), shifted.view(len(directions), -1)], dim=1)
    of_all, of_layers = curves.split([1 + draws, len(directions) - 1 - draws])
    by_layer = of_layers.unflatten(0, (1 + layer_draws, len(stats)))
    return Robustness(
        radii=torch.tensor([0.0, *radii], dtype=curves.dtype),
        random=of_all[1:].mean(0),
        adversarial=of_all[0],
        layer_random=dict(zip(stats, by_layer[1:].mean(0), strict=True)) if layer_draws else {},
        layer_adversarial=dict(zip(stats, by_layer[0], strict=True)),
    )


def check_radii(radii: Sequence[float]) -> None:
    """Make sure that radii are such as `robustness` takes.

    Raises:
        SettingError: they do not ascend between 0 and 1.
    """
    if not radii or not all(low < high for low, high in zip((0, *radii), (*radii, 1), strict=True)):
        raise SettingError(
            f"radii={list(radii)}; expected ascending numbers in (0, 1), such as (0.1, 0.2, 0.4): s/(1 + δσ) needs "
            "|δσ| < 1, and 0 is always measured."
        )


def area(radii: Tensor, accuracies: Tensor) -> Tensor:
    """The area under a curve, divided by its range: the mean accuracy over the radii.

    Args:
        radii: `(R,)`, ascending.
        accuracies: `(..., R)`.

    Returns:
        `(...)`, between the lowest and the highest accuracy.
    """
    return torch.trapezoid(accuracies, radii, dim=-1) / (radii[-1] - radii[0])


def running_stats(model: nn.Module) -> StatTree:
    """The running mean and variance of every batch-norm layer that keeps them, in either mode, by layer name.

    Raises:
        ModelError: there is none.
    """
    return {
        name: BatchStats(layer.running_mean.detach(), layer.running_var.detach())
        for name, layer in _tracking_layers(model).items()
    }


def shifted_running_stats(
    stats: StatTree, perturbation: PerturbationTree, eps: float | Mapping[str, float] = 1e-5
) -> StatTree:
    """The running statistics under which batch norm sees μ(1 + δμ) and s/(1 + δσ), as a variance again.

    Args:
        stats: running statistics by layer.
        perturbation: relative shifts, of some of these layers or all.
        eps: BN's constant, one for all layers or one for each.

    Returns:
        Mean and variance of the layers in `perturbation`. They are those of `stats`, bit for bit, where δ is zero.

    Raises:
        SettingError: a |δσ| ≥ 1.
        StateError: a layer has no statistics, or others of another width.
    """
    unknown = sorted(set(perturbation) - set(stats))
    if unknown:
        raise StateError(f"{unknown} are shifted and keep no running statistics. These do: {sorted(stats)}.")
    chosen = {layer: stats[layer] for layer in perturbation}
    before = {name: eps[name] if isinstance(eps, Mapping) else eps for name in chosen}
    after = perturbed_stats(chosen, perturbation, before)
    # s'² − s² is exactly zero at δ = 0, where s'² − eps would be a rounding away from the variance.
    return {
        name: BatchStats(after[name].mean, var + (after[name].std.square() - (var + before[name]).sqrt().square()))
        for name, (_, var) in chosen.items()
    }


def evaluation_gradients(model: nn.Module, loss_fn: LossFunction, batches: Batches) -> StatGradTree:
    """Differentiate the loss in evaluation mode by the relative shifts of the running statistics, at zero.

    A shift acts like other affine parameters, γ(1 + δσ) and β − γ(1 + δσ) δμ μ/s, so with their gradients gw and gb,
    the gradients are γ·gw by δσ and −γ·(μ/s)·gb by δμ.

    Args:
        model: any module with batch-norm layers that keep running statistics.
        loss_fn: `(output, target) -> scalar`, a mean over samples.
        batches: of `(input, target)`; each counts by its number of samples.

    Returns:
        The gradients of every layer that keeps running statistics; zero where the forward does not call it.

    Raises:
        ApartError: there is no data, the loss is no scalar, or the model has no running statistics.
    """
    copy = copy_model(model).eval().requires_grad_(False)
    layers = _tracking_layers(copy)
    affine = {name: _own_affine(layer) for name, layer in layers.items()}
    leaves = [leaf for pair in affine.values() for leaf in pair]
    sums, samples = [torch.zeros_like(leaf) for leaf in leaves], 0
    for batch in batches:
        inputs, target = input_and_target(batch)
        size = batch_size(batch)
        with torch.enable_grad():
            loss = scalar_loss(loss_fn(call_module(copy, inputs), target))
            grads = torch.autograd.grad(size * loss, leaves, allow_unused=True) if loss.requires_grad else ()
        for total, grad in zip(sums, grads, strict=False):
            total += 0 if grad is None else grad
        samples += size
    _check_any(samples)

    result = {}
    for (name, layer), gw, gb in zip(layers.items(), sums[::2], sums[1::2], strict=True):
        weight, std = affine[name][0].detach(), (layer.running_var + layer.eps).sqrt()
        result[name] = StatGrads(-weight * layer.running_mean / std * gb / samples, weight * gw / samples)
    return result


@torch.no_grad()
def accuracy_under_shift(model: nn.Module, perturbations: Sequence[PerturbationTree], batches: Batches) -> Tensor:
    """The accuracy of a model in evaluation mode, under each of several shifts of its running statistics.

    Args:
        model: any module with batch-norm layers that keep running statistics. Its output is class scores
            `(N, classes, ...)`.
        perturbations: relative shifts by layer; layers that one leaves out stay as they are. `{}` shifts nothing.
        batches: of `(input, target)`; the target is class indices `(N, ...)`.

    Returns:
        A fraction for each perturbation, `(len(perturbations),)`, float64.

    Raises:
        ApartError: there is no data, a shift does not fit the model, or its output is no class scores.
    """
    copy = copy_model(model).eval()
    layers, stats = _tracking_layers(copy), running_stats(copy)
    eps = {name: layer.eps for name, layer in layers.items()}
    versions = [_buffers(shifted_running_stats(stats, perturbation, eps)) for perturbation in perturbations]
    correct, count = torch.zeros(len(versions), dtype=torch.float64), 0
    for batch in batches:
        inputs, target = input_and_target(batch)
        hits = [_hits(call_module(_with_buffers(copy, buffers), inputs), target) for buffers in versions]
        correct += torch.stack(hits).to(correct)
        count += target.numel()
    _check_any(count)
    return correct / count


def _tracking_layers(model: nn.Module) -> dict[str, Any]:
    """The batch-norm layers with running statistics, each under its first name."""
    layers = {name: module for name, module in model.named_modules() if isinstance(module, _BatchNorm)}
    tracking = {name: layer for name, layer in layers.items() if layer.running_mean is not None}
    if not tracking:
        raise ModelError(
            f"none of the {len(layers)} batch-norm layers of {type(model).__name__} keeps running statistics, and only "
            "those can be shifted. Train a model with BatchNorm1d, 2d or 3d and track_running_stats=True."
        )
    return tracking


def _own_affine(layer: Any) -> tuple[nn.Parameter, nn.Parameter]:
    """Give a layer a weight and bias that it shares with no other, of the same values, to differentiate by."""
    weight = torch.ones_like(layer.running_mean) if layer.weight is None else layer.weight
    bias = torch.zeros_like(layer.running_mean) if layer.bias is None else layer.bias
    layer.weight, layer.bias = nn.Parameter(weight.detach().clone()), nn.Parameter(bias.detach().clone())
    return layer.weight, layer.bias


def _random_signs(stats: StatTree, generator: torch.Generator) -> StatGradTree:
    """A direction: +1 or −1 for every channel."""

    def signs(like: Tensor) -> Tensor:
        return (2 * torch.randint(2, like.shape, generator=generator) - 1).to(like)

    return {layer: StatGrads(signs(moments.mean), signs(moments.var)) for layer, moments in stats.items()}


def _with_buffers(module: nn.Module, buffers: Tensors) -> Callable[..., Any]:
    def forward(*args: Any, **kwargs: Any) -> Any:
        return torch.func.functional_call(module, buffers, args, kwargs)

    return forward


def _buffers(stats: StatTree) -> Tensors:
    """Running statistics under the names that a model's buffers have."""
    prefixed = {f"{layer}.running_" if layer else "running_": moments for layer, moments in stats.items()}
    return {f"{prefix}{key}": value for prefix, moments in prefixed.items() for key, value in moments._asdict().items()}


def _hits(output: Any, target: Any) -> Tensor:
    """How many samples (or positions) get the right class, 0-d."""
    shape = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
    if not (isinstance(output, Tensor) and isinstance(target, Tensor) and output.dim() > 1) or (
        output.shape[:1] + output.shape[2:] != target.shape
    ):
        wanted = tuple(target.shape) if isinstance(target, Tensor) else type(target).__name__
        raise UsageError(
            f"the model's output is {shape} and the target {wanted}; accuracy needs class scores (N, classes, ...) and "
            "class indices (N, ...). Wrap a model that returns something else."
        )
    return (output.argmax(dim=1) == target).sum()


def _check_any(samples: int) -> None:
    if not samples:
        raise BatchError(
            "the batches held no sample. Pass a list or a data loader that is not empty; a generator is used up "
            "after one pass."
        )
