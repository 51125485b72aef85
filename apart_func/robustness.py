"""Robustness: how accurate a trained model is when its running statistics are off.

    μ' = μ(1 + δμ),  s' = s/(1 + δσ)                     with s = sqrt(running variance + eps)
    δ  = ε · sign(direction)                             for all layers, or for one alone
    direction                                            random signs, or the gradient of the loss by δ at δ = 0

Everything is computed on a copy of the model in evaluation mode. An ApartError says what cannot be measured: settings
out of range, batches that hold no sample, layers without running statistics, outputs or losses of another shape.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from apart_func.errors import BatchError, ModelError, SettingError, StateError, UsageError
from apart_func.functional import call_module
from apart_func.intercept import batch_norm_layers
from apart_func.losses import LossFunction, scalar_loss
from apart_func.perturbed import perturbed_stats
from apart_func.rules import sign_perturbation
from apart_func.samples import batch_size
from apart_func.snapshot import copy_model
from apart_func.summary import summarised
from apart_func.trees import BatchStats, PerturbationTree, StatGrads, StatGradTree, StatTree, input_and_target

Batches = Iterable[tuple[Any, Any]]
NO_SAMPLE = "the batches held no sample. Pass a list or a data loader: a generator is used up after one pass."


@summarised
class Robustness(NamedTuple):
    """Accuracies, as fractions, by radius; all curves begin with the model as it is.

    Attributes:
        radii: ε, `(R,)`, from 0 upwards.
        random: all layers shifted at random, mean over draws, `(R,)`.
        adversarial: all layers shifted against the model, `(R,)`.
        layer_random: each layer alone at random, `(R,)` by name.
        layer_adversarial: each layer alone against the model, `(R,)` by name.
    """

    radii: Tensor
    random: Tensor
    adversarial: Tensor
    layer_random: dict[str, Tensor]
    layer_adversarial: dict[str, Tensor]


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
        held_out: batches `(input, target)` for that gradient, other ones than in `test`.
        test: batches that accuracy is measured on, as in `accuracy_under_shift`.
        radii: ascending, in (0, 1); 0 is always measured.
        draws: random shifts of all layers at each radius.
        layer_draws: random shifts of each layer alone; 0 leaves `layer_random` empty.
        seed: of the random shifts, which are the same for every model of the same layers.
    """
    check_radii(radii)
    if draws < 1 or layer_draws < 0:
        raise SettingError(f"draws={draws}, layer_draws={layer_draws}; expected draws ≥ 1 and layer_draws ≥ 0.")
    stats, gradient = running_stats(model), evaluation_gradients(model, loss_fn, held_out)
    generator = torch.Generator().manual_seed(seed)
    together, alone = ([_random_signs(stats, generator) for _ in range(number)] for number in (draws, layer_draws))
    single = [{layer: direction[layer]} for direction in (gradient, *alone) for layer in stats]
    directions = [gradient, *together, *single]
    sizes = torch.tensor(radii, dtype=torch.float64)  # a 0-d tensor leaves float32 statistics as they are
    shifts = [{}, *(sign_perturbation(stats, direction, size) for direction in directions for size in sizes)]
    clean, shifted = accuracy_under_shift(model, shifts, test).split([1, len(shifts) - 1])
    curves = torch.cat([clean.expand(len(directions), 1), shifted.view(len(directions), -1)], dim=1)
    of_all, of_layers = curves.split([1 + draws, len(single)])
    by_layer = of_layers.unflatten(0, (1 + layer_draws, len(stats)))
    return Robustness(
        radii=torch.tensor([0.0, *radii], dtype=curves.dtype),
        random=of_all[1:].mean(0),
        adversarial=of_all[0],
        layer_random=dict(zip(stats, by_layer[1:].mean(0), strict=True)) if layer_draws else {},
        layer_adversarial=dict(zip(stats, by_layer[0], strict=True)),
    )


def check_radii(radii: Sequence[float]) -> None:
    """Raise a SettingError if radii do not ascend between 0 and 1."""
    if not radii or not all(low < high for low, high in zip((0, *radii), (*radii, 1), strict=True)):
        raise SettingError(f"radii={list(radii)}; expected ascending numbers in (0, 1): s/(1 + δσ) needs |δσ| < 1.")


def area(radii: Tensor, accuracies: Tensor) -> Tensor:
    """Return the area under curves `(..., R)` over ascending radii `(R,)`, divided by its range: the mean, `(...)`."""
    return torch.trapezoid(accuracies, radii, dim=-1) / (radii[-1] - radii[0])


def running_stats(model: nn.Module) -> StatTree:
    """Return the running statistics of every batch-norm layer that keeps them, by name; a ModelError if none does."""
    return {name: BatchStats(layer.running_mean, layer.running_var) for name, layer in _tracking_layers(model).items()}


def shifted_running_stats(
    stats: StatTree, perturbation: PerturbationTree, eps: float | Mapping[str, float] = 1e-5
) -> StatTree:
    """Return running statistics under which batch norm sees μ(1 + δμ) and s/(1 + δσ), of the layers in `perturbation`.

    |δσ| < 1; where δ is zero, `stats` come back bit for bit. `eps` is BN's constant, one for all layers or for each.
    """
    if unknown := sorted(set(perturbation) - set(stats)):
        raise StateError(f"{unknown} are shifted and keep no running statistics. These do: {sorted(stats)}.")
    shifted = {}
    for name, (mean, std) in perturbed_stats({name: stats[name] for name in perturbation}, perturbation, eps).items():
        var, constant = stats[name].var, eps[name] if isinstance(eps, Mapping) else eps
        # s'² − s² is exactly zero at δ = 0, where s'² − eps would be a rounding away from the variance.
        shifted[name] = BatchStats(mean, var + (std.square() - (var + constant).sqrt().square()))
    return shifted


def evaluation_gradients(model: nn.Module, loss_fn: LossFunction, batches: Batches) -> StatGradTree:
    """Differentiate the loss in evaluation mode by the relative shifts of all running statistics, at zero.

    A shift acts like other affine parameters, γ(1 + δσ) and β − γ(1 + δσ) δμ μ/s: with their gradients gw and gb, the
    gradients are γ·gw by δσ and −γ·(μ/s)·gb by δμ; zero for a layer that the forward does not call.
    The loss is a mean over samples, and every batch `(input, target)` counts by its number of samples.
    """
    copy = copy_model(model).eval().requires_grad_(False)
    layers, samples = _tracking_layers(copy), 0
    for layer in layers.values():  # each gets a weight and bias that it shares with no other, to differentiate by
        weight = torch.ones_like(layer.running_mean) if layer.weight is None else layer.weight
        bias = torch.zeros_like(layer.running_mean) if layer.bias is None else layer.bias
        layer.weight, layer.bias = nn.Parameter(weight.detach().clone()), nn.Parameter(bias.detach().clone())
        layer.weight.grad, layer.bias.grad = torch.zeros_like(weight), torch.zeros_like(bias)
    leaves = [leaf for layer in layers.values() for leaf in (layer.weight, layer.bias)]
    for batch in batches:
        (inputs, target), size = input_and_target(batch), batch_size(batch)
        with torch.enable_grad():
            loss = scalar_loss(loss_fn(call_module(copy, inputs), target))
            if loss.requires_grad:
                (size * loss).backward(inputs=leaves)
        samples += size
    if not samples:
        raise BatchError(NO_SAMPLE)
    result = {}
    for name, layer in layers.items():
        weight, std = layer.weight.detach(), (layer.running_var + layer.eps).sqrt()
        of_mean = -weight * layer.running_mean / std * layer.bias.grad
        result[name] = StatGrads(of_mean / samples, weight * layer.weight.grad / samples)
    return result


@torch.no_grad()
def accuracy_under_shift(model: nn.Module, perturbations: Sequence[PerturbationTree], batches: Batches) -> Tensor:
    """Measure accuracies in evaluation mode, as fractions in float64, one for each shift of the running statistics.

    Layers that a perturbation leaves out stay as they are. The model's output is class scores `(N, classes, ...)`, and
    the target of every batch `(input, target)` class indices `(N, ...)`.
    """
    copy = copy_model(model).eval()
    layers, stats = _tracking_layers(copy), running_stats(model)
    eps = {name: layer.eps for name, layer in layers.items()}
    versions = [stats | shifted_running_stats(stats, perturbation, eps) for perturbation in perturbations]
    correct, count = torch.zeros(len(versions), dtype=torch.float64), 0
    for batch in batches:
        (inputs, target), hits = input_and_target(batch), []
        for version in versions:
            for name, (mean, var) in version.items():
                layers[name].running_mean.copy_(mean)
                layers[name].running_var.copy_(var)
            hits.append(_hits(call_module(copy, inputs), target))
        correct += torch.stack(hits).to(correct)
        count += target.numel()
    if not count:
        raise BatchError(NO_SAMPLE)
    return correct / count


def _tracking_layers(model: nn.Module) -> dict[str, Any]:
    layers = batch_norm_layers(model)
    tracking = {name: layer for name, layer in layers.items() if layer.running_mean is not None}
    if not tracking:
        problem = f"none of the {len(layers)} batch-norm layers of {type(model).__name__} keeps running statistics"
        raise ModelError(f"{problem} to shift. Train one with BatchNorm1d, 2d or 3d and track_running_stats=True.")
    return tracking


def _random_signs(stats: StatTree, generator: torch.Generator) -> StatGradTree:
    """Draw +1 or −1 for every channel, on the CPU, so that they are the same for every device."""
    return {
        layer: StatGrads(*((2 * torch.randint(2, part.shape, generator=generator) - 1).to(part) for part in moments))
        for layer, moments in stats.items()
    }


def _hits(output: Any, target: Any) -> Tensor:
    """Return how many samples (or positions) get the right class, 0-d."""
    given, wanted = (tuple(t.shape) if isinstance(t, Tensor) else type(t).__name__ for t in (output, target))
    if isinstance(given, str) or len(given) < 2 or given[:1] + given[2:] != wanted:
        expected = "expected class scores (N, classes, ...) and class indices (N, ...); wrap a model of other outputs"
        raise UsageError(f"the model's output is {given} and the target {wanted}; {expected}.")
    return torch.eq(output.argmax(dim=1), target).sum()
