"""What a perturbation does to a layer's γ and β, as vectors of all channels of all ghost groups.

    y = γ' x̂ + β'     with  γ' = γ (1 + δσ),  β' = β − ω · sg(μ/s)  and  ω = γ' δμ

Every form of the layer takes (γ', ω, β). Autograd differentiates them by γ, β and δ: in one layer by `affine`, or for
all layers of a pass in a few operations by `affine_of_layers`.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from apart_func._torch import parts
from apart_func.layer.formula import statistics_dtype
from apart_func.trees import BatchStats, Perturbation, StatGrads


class Affine(NamedTuple):
    """The vectors that a layer is computed with, `(G·C,)` each, contiguous, in the dtype of its statistics.

    Attributes:
        gamma: γ' = γ (1 + δσ).
        omega: ω = γ' δμ.
        beta: β.
    """

    gamma: Tensor
    omega: Tensor
    beta: Tensor


class Parameters(NamedTuple):
    """The affine parameters of a layer, `(C,)`; None is γ = 1, β = 0."""

    weight: Tensor | None
    bias: Tensor | None


def affine(x: Tensor, parameters: Parameters, perturbation: Perturbation, groups: int) -> Affine:
    """The vectors of one layer.

    Args:
        x: its activations `(N, C, ...)`, whose dtype and device they get.
        parameters: γ and β.
        perturbation: δ, `(C,)` for all groups or `(G, C)` for each.
        groups: number of ghost groups G.
    """
    dtype = statistics_dtype(x.dtype)
    weight, bias = parameters
    weight = x.new_ones(x.shape[1], dtype=dtype) if weight is None else weight.to(dtype)
    bias = x.new_zeros(x.shape[1], dtype=dtype) if bias is None else bias.to(dtype)
    shift, scale = (part.to(dtype) for part in perturbation)
    gamma = torch.addcmul(weight, weight, scale)
    return Affine(*(_of_groups(vector, groups) for vector in (gamma, gamma * shift, bias)))


def _of_groups(vector: Tensor, groups: int) -> Tensor:
    """`(C,)` or `(G, C)` as `(G·C,)`, contiguous in memory: the kernels do not look at strides."""
    if groups > 1 and vector.dim() == 1:
        vector = vector.expand(groups, -1)
    return vector.contiguous().view(-1)


class FlatShifts(NamedTuple):
    """The perturbation of all layers in every ghost group, as two vectors: what an eager pass is differentiated by.

    Attributes:
        mean: δμ, layer by layer, `(G·C,)` of each.
        scale: δσ, likewise.
    """

    mean: Tensor
    scale: Tensor

    def by_layer(self, channels: Mapping[str, int], groups: int) -> dict[str, tuple[Tensor, Tensor]]:
        """The same by layer: `(C,)` in one group, `(G, C)` else."""
        lengths = [groups * size for size in channels.values()]
        pairs = zip(self.mean.split(lengths), self.scale.split(lengths), strict=True)
        if groups == 1:
            return dict(zip(channels, pairs, strict=True))
        return {
            name: (mean.view(groups, -1), scale.view(groups, -1))
            for name, (mean, scale) in zip(channels, pairs, strict=True)
        }


def flat_shifts(
    perturbation: Mapping[str, Perturbation], channels: Mapping[str, int], groups: int, clean: int, dtype: torch.dtype
) -> FlatShifts:
    """A perturbation `(C,)` of every layer in every ghost group but the first `clean` ones, where it is zero."""
    shifts = [perturbation[name] for name in channels]
    sizes = tuple(channels.values())
    together = [torch.cat(column).detach().to(dtype) for column in zip(*shifts, strict=True)]
    if groups > 1:
        together = [vector.index_select(0, _places(sizes, groups, like=together[0])) for vector in together]
    if clean:
        together = [vector.mul_(_perturbed(sizes, groups, clean, like=vector)) for vector in together]
    return FlatShifts(*together)


def affine_of_layers(
    parameters: Mapping[str, Parameters], channels: Mapping[str, int], shifts: FlatShifts, groups: int
) -> dict[str, Affine]:
    """The vectors of all layers at once, eagerly: where layers are small, starting operators is what they cost.

    Args:
        parameters: γ and β by layer.
        channels: C by layer.
        shifts: their perturbation.
        groups: number of ghost groups G.

    Returns:
        By layer; none where dtypes or devices differ, or a γ or β is missing.
    """
    weights, biases = zip(*(parameters[name] for name in channels), strict=True)
    if not _are_alike((*weights, *biases)):
        return {}
    weight, bias = _joined(weights, biases, groups)
    gamma = torch.addcmul(weight, weight, shifts.scale)
    lengths = [groups * size for size in channels.values()]
    split = (vector.split(lengths) for vector in (gamma, gamma * shifts.mean, bias))
    return dict(zip(channels, map(Affine, *split), strict=True))


def _are_alike(column: Sequence[Tensor | None]) -> bool:
    first = column[0]
    return first is not None and all(
        # no DTensor: what FullyShardedDataParallel holds is there once its own layer runs
        tensor is not None
        and type(tensor) in (Tensor, nn.Parameter)
        and (tensor.dtype, tensor.device) == (first.dtype, first.device)
        for tensor in column
    )


def _joined(weights: Sequence[Tensor], biases: Sequence[Tensor], groups: int) -> list[Tensor]:
    """γ and β of all layers one after the other, each as often as there are groups, in the dtype of statistics."""
    channels = tuple(weight.shape[0] for weight in weights)
    joined = [torch.cat(column) for column in (weights, biases)]  # type: ignore[arg-type]  # cat takes any sequence
    if groups > 1:
        joined = [vector.index_select(0, _places(channels, groups, like=vector)) for vector in joined]
    dtype = statistics_dtype(joined[0].dtype)
    return joined if joined[0].dtype == dtype else [vector.to(dtype) for vector in joined]


def _kept(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Make a tensor of numbers once for a device and dtype; anew where it is to be like a fake tensor."""

    @lru_cache(maxsize=64)
    def kept(*numbers: Any, device: torch.device, dtype: torch.dtype) -> Tensor:
        return make(*numbers, device=device, dtype=dtype)

    def made(*numbers: Any, like: Tensor) -> Tensor:
        return (kept if type(like) is Tensor else make)(*numbers, device=like.device, dtype=like.dtype)

    return made


@_kept
def _places(channels: tuple[int, ...], groups: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Where in the vectors of all layers the channels of all layers in all groups are."""
    parts = torch.arange(sum(channels), device=device).split(list(channels))
    return torch.cat([part for part in parts for _ in range(groups)])


@_kept
def _perturbed(channels: tuple[int, ...], groups: int, clean: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """1 for the channels of all layers in all groups that are not clean, else 0."""
    groups_of = (torch.arange(groups, device=device) >= clean).to(dtype)
    return torch.cat([groups_of.repeat_interleave(size) for size in channels])


@_kept
def spread(values: tuple[float, ...], sizes: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    """A number of each layer for all of its channels."""
    parts = zip(values, sizes, strict=True)
    return torch.cat([torch.full((size,), value, dtype=dtype, device=device) for value, size in parts])


class Clean(NamedTuple):
    """The vectors of one call of a layer at δ = 0, or of one of all layers, one after the other.

    Attributes:
        weight: γ, `(C,)`, in the dtype of statistics, which the loss can be differentiated by.
        bias: β, likewise.
        mean: where the batch's mean is left.
        unbiased: where its unbiased variance is left.
    """

    weight: Tensor
    bias: Tensor
    mean: Tensor
    unbiased: Tensor


def clean_vectors(x: Tensor, parameters: Parameters) -> Clean:
    """The vectors of one call of a layer."""
    channels, dtype = x.shape[1], statistics_dtype(x.dtype)
    weight, bias = _tap(parameters.weight, 1.0, x, dtype), _tap(parameters.bias, 0.0, x, dtype)
    mean, unbiased = torch.zeros(2, channels, dtype=dtype, device=x.device)
    return Clean(weight, bias, mean, unbiased)


def _tap(vector: Tensor | None, default: float, x: Tensor, dtype: torch.dtype) -> Tensor:
    if vector is None:
        return torch.full((x.shape[1],), default, dtype=dtype, device=x.device, requires_grad=True)
    copied = vector.to(dtype, copy=True)  # what FullyShardedDataParallel lends is gone after the backward
    return copied if copied.requires_grad else copied.requires_grad_()


def clean_of_layers(
    parameters: Mapping[str, Parameters], channels: Mapping[str, int]
) -> tuple[Clean | None, dict[str, Clean]]:
    """The vectors of one call of every layer: all together, and each layer's part of them.

    Returns:
        Nothing where dtypes or devices differ, or a γ or β is missing.
    """
    weights, biases = zip(*(parameters[name] for name in channels), strict=True)
    if not _are_alike((*weights, *biases)):
        return None, {}
    taps = [vector if vector.requires_grad else vector.requires_grad_() for vector in _joined(weights, biases, 1)]
    weight, bias = taps
    mean, unbiased = torch.zeros_like(weight, requires_grad=False), torch.zeros_like(weight, requires_grad=False)
    together = Clean(weight, bias, mean, unbiased)
    lengths = list(channels.values())
    split = (*(tap.split(lengths) for tap in taps), *(parts(vector, lengths) for vector in (mean, unbiased)))
    return together, dict(zip(channels, map(Clean, *split), strict=True))


class Tapped(NamedTuple):
    """One call of a layer at δ = 0, or one of all layers.

    Attributes:
        vectors: those that it was computed with, and its statistics.
        unbias: (n − 1)/n of the n values a channel, which makes the variance the biased one.
        eps: BN's constant.
    """

    vectors: Clean
    unbias: float | Tensor
    eps: float | Tensor

    def stats(self) -> BatchStats:
        """Batch statistics, `(C,)`."""
        return BatchStats(self.vectors.mean, self.vectors.unbiased * self.unbias)

    def statistic_gradients(self, by_weight: Tensor, by_bias: Tensor) -> StatGrads:
        """Gradients by the relative shifts at zero, which BN's backward yields on the way.

        From y = γ (1 + δσ) (x̂ − δμ · sg(μ/s)) + β:  ∂/∂δσ = γ ∂/∂γ  and  ∂/∂δμ = −γ (μ/s) ∂/∂β.
        """
        weight = self.vectors.weight.detach()
        mean, var = self.stats()
        by_mean = torch.mul(weight, by_bias).mul_(mean).mul_(torch.rsqrt(var + self.eps)).neg_()
        return StatGrads(by_mean, weight * by_weight)


def together(vectors: Clean, calls: Sequence[Tapped]) -> Tapped:
    """One call of every layer as one call of all."""
    sizes = tuple(call.vectors.mean.shape[0] for call in calls)
    numbers = (
        spread(tuple(column), sizes, like=vectors.mean)
        for column in zip(*((call.unbias, call.eps) for call in calls), strict=True)
    )
    return Tapped(vectors, *numbers)
