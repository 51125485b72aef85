"""The layer: batch norm with perturbed statistics, on tensors alone.

With batch mean μ, biased variance σ², s = sqrt(σ² + eps), x̂ = (x − μ)/s and sg = stop-gradient,

    y = γ (1 + δσ) (x̂ − δμ · sg(μ/s)) + β                                              (DESIGN section 2)

for every channel of every ghost group. Ghost groups are channels of their own: `(b g) c -> b (g c)`. So one
kernel serves both passes, and a perturbed layer costs what a plain one costs.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor
from torch.autograd.function import once_differentiable

from apart_func.autodiff import is_traced
from apart_func.errors import BatchError, SettingError
from apart_func.pytrees import BatchStats, Perturbation


class Taps(NamedTuple):
    """The affine parameters of one call of a layer: what the loss is differentiated by for `statistic_gradients`.

    Attributes:
        weight: scale γ of this call, `(C,)`.
        bias: shift β of this call, `(C,)`.
    """

    weight: Tensor
    bias: Tensor


class Call(NamedTuple):
    """One call of a layer in a proxy pass.

    Attributes:
        stats: batch statistics, `(C,)` each.
        size: values a channel in the batch.
        eps: BN's constant.
        taps: the affine parameters, where the pass is eager.
    """

    stats: BatchStats
    size: int
    eps: float
    taps: Taps | None


class RunningStats(NamedTuple):
    """The statistics that a layer keeps for evaluation.

    Attributes:
        mean: running mean `(C,)`.
        var: running variance `(C,)`, unbiased.
        batches: `num_batches_tracked`, 0-d, integer.
    """

    mean: Tensor
    var: Tensor
    batches: Tensor


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of moments for activations of `dtype`: at least float32."""
    return torch.promote_types(dtype, torch.float32)


def clean_batch_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, BatchStats, Taps]:
    """Plain training-mode batch norm, by PyTorch's own call, and what the method wants to know of it. Eager only.

    Args:
        x: activations `(N, C, ...)`.
        weight: scale γ `(C,)`; None is 1.
        bias: shift β `(C,)`; None is 0.
        eps: BN's constant, added to the variance.

    Returns:
        The output, of `x`'s shape and dtype; batch statistics, `(C,)`, in at least float32; and the taps.
    """
    channels, dtype = x.shape[1], statistics_dtype(x.dtype)
    taps = Taps(_tap(weight, 1.0, channels, dtype, x.device), _tap(bias, 0.0, channels, dtype, x.device))
    # Running statistics that start from nothing and take the batch whole are the batch's.
    mean, var = torch.zeros(2, channels, dtype=dtype, device=x.device)
    y = torch.batch_norm(x, *taps, mean, var, True, 1.0, eps, torch.backends.cudnn.enabled)
    size = x.numel() // channels
    return y, BatchStats(mean, var * ((size - 1) / size)), taps


def _tap(vector: Tensor | None, default: float, channels: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor of this call alone, which the loss can be differentiated by."""
    if vector is None:
        return torch.full((channels,), default, dtype=dtype, device=device, requires_grad=True)
    if vector.requires_grad:
        return vector.to(dtype).view_as(vector)
    return vector.to(dtype).detach().requires_grad_()


def statistic_gradients(calls: list[Call], grads: list[Taps]) -> list[BatchStats]:
    """Gradients by the relative shifts at zero, which BN's backward yields on the way. Eager only.

    From y = γ (1 + δσ) (x̂ − δμ · sg(μ/s)) + β:  ∂/∂δσ = γ ∂/∂γ  and  ∂/∂δμ = −γ (μ/s) ∂/∂β.

    Args:
        calls: calls of layers, with taps.
        grads: gradient of the loss by the taps of each.
    """

    def by_shift_and_scale(
        mean: Tensor, var: Tensor, weight: Tensor, g_weight: Tensor, g_bias: Tensor, eps: Any
    ) -> tuple[Tensor, ...]:
        return -weight * g_bias * mean * torch.rsqrt(var + eps), weight * g_weight

    vectors = [
        (call.stats.mean, call.stats.var, call.taps.weight.detach(), g.weight, g.bias)
        for call, g in zip(calls, grads, strict=True)
        if call.taps
    ]
    return [BatchStats(*pair) for pair in over_layers(by_shift_and_scale, vectors, [(call.eps,) for call in calls])]


def perturbed_batch_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    perturbation: Perturbation,
    *,
    groups: int = 1,
) -> tuple[Tensor, BatchStats]:
    """Normalise by batch statistics that are shifted by a perturbation.

    Args:
        x: activations `(N, C, ...)`; row i is in ghost group i mod `groups`.
        weight: scale γ `(C,)`; None is 1.
        bias: shift β `(C,)`; None is 0.
        eps: BN's constant, added to the variance.
        perturbation: relative shifts (δμ, δσ), `(C,)` for all groups or `(groups, C)` for each.
        groups: number of ghost groups G ≥ 1, a divisor of N.

    Returns:
        The output, of `x`'s shape and dtype, and the groups' statistics without the perturbation, `(C,)` for one
        group, `(groups, C)` else, in at least float32.
    """
    dtype = statistics_dtype(x.dtype)
    weight = x.new_ones(x.shape[1], dtype=dtype) if weight is None else weight.to(dtype)
    bias = x.new_zeros(x.shape[1], dtype=dtype) if bias is None else bias.to(dtype)
    shift, scale = (vector.to(dtype) for vector in perturbation)
    layer = _layer_of_ops if is_traced() or x.device.type not in _NATIVE_DEVICES else _NativeLayer.apply
    y, mean, var = layer(x, weight, bias, shift, scale, eps, groups)
    return y, BatchStats(mean, var) if groups == 1 else BatchStats(mean.view(groups, -1), var.view(groups, -1))


def number_of_groups(groups: int, samples: int) -> int:
    """G for a setting of `groups` (0: one, -1: one a sample).

    Raises:
        SettingError: `groups` is no such setting.
        BatchError: G does not divide the samples.
    """
    if groups < -1:
        raise SettingError(f"groups={groups}; expected a positive number, 0 for one group, or -1 for one a sample.")
    if groups == -1:
        return samples
    if groups > 1 and samples % groups:
        raise BatchError(
            f"groups={groups} does not divide the {samples} samples of the adversarial pass. Use a batch size and "
            "ratio that give a multiple, drop_last=True in the data loader, or remainder='drop'."
        )
    return max(groups, 1)


def check_input(name: str, x: Tensor, channels: int, groups: int = 1) -> None:
    """Make sure that every group has a variance in a layer.

    Raises:
        BatchError: naming the layer.
    """
    if x.dim() < 2 or x.shape[1] != channels:
        raise BatchError(f"layer {name!r} got input of shape {tuple(x.shape)}; expected (N, {channels}, ...).")
    rows = x.shape[0]
    if rows % groups:
        raise BatchError(f"layer {name!r} sees {rows} rows, which groups={groups} does not divide. Use another number.")
    if x.numel() > groups * channels:
        return
    positions = "×".join(map(str, x.shape[2:])) or "1"
    if groups == 1:
        raise BatchError(
            f"layer {name!r} sees one value a channel ({rows} samples, {positions} positions), so it has no variance. "
            "Use a larger batch, or put the layer in evaluation mode."
        )
    raise BatchError(
        f"layer {name!r} sees one value a channel in each of {groups} groups ({rows} samples, {positions} positions), "
        f"so it has no variance. Use fewer groups (groups={max(rows // 2, 1)} leaves two) or a larger batch."
    )


def fold_groups(x: Tensor, groups: int) -> Tensor:
    """Make channels of the ghost groups: sample i is in group i mod `groups`."""
    return x if groups == 1 else rearrange(x, "(b g) c ... -> b (g c) ...", g=groups)


def unfold_groups(x: Tensor, groups: int) -> Tensor:
    """Undo `fold_groups`."""
    return x if groups == 1 else rearrange(x, "b (g c) ... -> (b g) c ...", g=groups)


def batch_moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of every channel, in at least float32; where a reduction over ranks belongs."""
    dtype = statistics_dtype(x.dtype)
    # Running statistics of a wider dtype are what makes the kernel accumulate half precision in float32.
    blank = None if x.dtype == dtype else x.new_zeros(x.shape[1], dtype=dtype)
    mean, var = torch.batch_norm_update_stats(x, blank, blank, 0.0)
    return mean, var


# Where batch_norm_update_stats and native_batch_norm exist as kernels.
_NATIVE_DEVICES = ("cpu", "cuda")


class _NativeLayer(torch.autograd.Function):
    """The eager layer: BN's own kernels, forward and backward, and arithmetic on `(G·C,)` vectors."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, shift: Tensor, scale: Tensor, eps: float, groups: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        def normalize(x: Tensor, gamma: Tensor, beta: Tensor, move: Tensor) -> tuple[Tensor, ...]:
            # BN in evaluation mode computes any affine map of x: give it the perturbed centre and scale.
            mean, var = batch_moments(x)
            return torch.native_batch_norm(x, gamma, beta, mean * move, var, False, 0.0, eps)[0], mean, var

        factor = 1 + scale
        gamma, beta, move = (_for_each_group(vector, groups) for vector in (weight * factor, bias, 1 + shift))
        y, mean, var = _by_group(normalize, groups, [x], [gamma, beta, move])
        ctx.eps, ctx.groups, ctx.shape = eps, groups, shift.shape
        ctx.save_for_backward(x, weight, gamma, factor, move, mean, (var + eps).rsqrt_())
        ctx.mark_non_differentiable(mean, var)
        ctx.set_materialize_grads(False)  # no zeros for these two
        return y, mean, var

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None, *_: Tensor) -> tuple[Tensor | None, ...]:
        if grad is None:
            return (None,) * 7
        x, weight, gamma, factor, move, mean, invstd = ctx.saved_tensors
        for_x, for_weight, for_bias, for_shift, for_scale = ctx.needs_input_grad[:5]

        def differentiate(grad: Tensor, x: Tensor, gamma: Tensor, mean: Tensor, invstd: Tensor) -> tuple[Tensor, ...]:
            # BN's own backward, with the perturbed scale: g_gamma = Σ grad · x̂ and g_beta = Σ grad.
            backward: Callable[..., tuple[Tensor, ...]] = torch.ops.aten.native_batch_norm_backward
            return backward(grad, x, gamma, None, None, mean, invstd, True, ctx.eps, [for_x, True, True])

        grad_x, g_gamma, g_beta = _by_group(differentiate, ctx.groups, [grad, x], [gamma, mean, invstd])
        # y = γ' (x̂ − δμ · offset) + β with γ' = γ (1 + δσ) and offset = sg(μ/s)
        g_offset = mean * invstd * g_beta
        g_gamma = torch.addcmul(g_gamma, g_offset, move - 1, value=-1).view(ctx.groups, -1)
        return (
            grad_x if for_x else None,
            _summed(g_gamma * factor, weight.shape) if for_weight else None,
            _summed(g_beta, weight.shape) if for_bias else None,
            _summed(-gamma * g_offset, ctx.shape) if for_shift else None,
            _summed(g_gamma * weight, ctx.shape) if for_scale else None,
            None,
            None,
        )


def _by_group(
    kernel: Callable[..., tuple[Tensor, ...]], groups: int, activations: list[Tensor], vectors: list[Tensor]
) -> tuple[Tensor, ...]:
    """Run a batch-norm kernel with ghost groups.

    Where channels are the innermost dimension of the memory, folding would copy all activations back and forth. A
    group at a time is copied there, which stays in the processor's cache until the kernel is through with it.

    Args:
        kernel: from activations and vectors of a batch to one activation and further vectors.
        groups: number of ghost groups.
        activations: `(N, C, ...)`, all of the memory format of the first.
        vectors: `(G·C,)`.

    Returns:
        The activation `(N, C, ...)`, which is no view, and the vectors `(G·C,)`.
    """
    x = activations[0]
    channels_last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(x.dim())
    if groups == 1 or x.is_contiguous() or channels_last is None or not x.is_contiguous(memory_format=channels_last):
        y, *results = kernel(*(fold_groups(activation, groups) for activation in activations), *vectors)
        return _unfold_fresh(y, x), *results
    y, pieces = torch.empty_like(x), []
    scratch = [torch.empty_like(x[::groups], memory_format=channels_last) for _ in activations]
    for g in range(groups):
        of_group = [room.copy_(activation[g::groups]) for room, activation in zip(scratch, activations, strict=True)]
        part, *results = kernel(*of_group, *(vector.view(groups, -1)[g] for vector in vectors))
        if part is not None:
            y[g::groups] = part
        pieces.append(results)
    return y, *(torch.cat(piece) for piece in zip(*pieces, strict=True))


def _layer_of_ops(
    x: Tensor, weight: Tensor, bias: Tensor, shift: Tensor, scale: Tensor, eps: float, groups: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The layer in operators that every transform, compiler and device knows.

    Compiled, the moments below and those inside a large batch_norm are one loop, and the perturbation a fused one.
    """
    folded = fold_groups(x, groups)
    dims = [0, *range(2, x.dim())]
    var, mean = torch.var_mean(folded.to(weight.dtype), dims, correction=0, keepdim=True)
    var, mean = var.flatten(), mean.flatten()
    gamma = _for_each_group(weight * (1 + scale), groups)
    offset = (mean * torch.rsqrt(var + eps)).detach()
    beta = _for_each_group(bias, groups) - gamma * _for_each_group(shift, groups) * offset
    y = F.batch_norm(folded, None, None, gamma, beta, True, 0.0, eps)
    return unfold_groups(y, groups), mean, var


def _unfold_fresh(y: Tensor, like: Tensor) -> Tensor:
    """Undo `fold_groups` on a tensor nobody else holds.

    Autograd must not see a view here: an in-place activation after it would copy gradients.
    """
    return y if y is None or y.shape == like.shape else torch.ops.aten._unsafe_view(y, like.shape)


def _for_each_group(vector: Tensor, groups: int) -> Tensor:
    """`(C,)` or `(G, C)` as `(G·C,)`, contiguous in memory: the kernels do not look at strides."""
    if groups > 1 and vector.dim() == 1:
        vector = vector.expand(groups, -1)
    return vector.contiguous().view(-1)


def _summed(grad: Tensor, shape: torch.Size) -> Tensor:
    """The gradient of a `(C,)` or `(G, C)` vector from that of its `(G·C,)` use."""
    return grad.view(shape) if grad.numel() == shape.numel() else grad.view(-1, shape[-1]).sum(0)


def advance_running_stats(
    running: list[RunningStats], stats: list[BatchStats], sizes: list[int], momenta: list[float | None]
) -> list[RunningStats]:
    """Move running statistics by one batch, as plain batch norm does, for several layers.

    Args:
        running: the values before.
        stats: batch statistics, `(C,)` each.
        sizes: values a channel in the batch; the running variance takes the unbiased estimate.
        momenta: weight of this batch; None weighs all batches alike (cumulative average).

    Returns:
        The values after, in the dtypes they had.
    """
    counts = [before.batches + 1 for before in running]

    def moved(
        old_mean: Tensor, old_var: Tensor, mean: Tensor, var: Tensor, correction: Any, weight: Any
    ) -> tuple[Tensor, ...]:
        # computed in the dtype of the batch's statistics, and returned in that of the running ones
        mean = torch.lerp(old_mean.to(mean.dtype), mean, weight).to(old_mean.dtype)
        var = torch.lerp(old_var.to(var.dtype), var * correction, weight).to(old_var.dtype)
        return mean, var

    vectors = [(old.mean, old.var, new.mean, new.var) for old, new in zip(running, stats, strict=True)]
    numbers = [
        (size / (size - 1), torch.reciprocal(count.to(new.mean.dtype)) if momentum is None else momentum)
        for size, momentum, count, new in zip(sizes, momenta, counts, stats, strict=True)
    ]
    after = over_layers(moved, vectors, numbers)
    return [RunningStats(mean, var, count) for (mean, var), count in zip(after, counts, strict=True)]


def over_layers(
    function: Callable[..., tuple[Tensor, ...]],
    vectors: Sequence[tuple[Tensor, ...]],
    numbers: Sequence[tuple[Any, ...]],
) -> list[tuple[Tensor, ...]]:
    """Apply elementwise arithmetic to the statistics of all layers at once: a kernel for all, and not one for each.

    Args:
        function: of as many vectors and numbers as a layer has; elementwise.
        vectors: for every layer, vectors of one length.
        numbers: for every layer, floats or 0-d tensors.

    Returns:
        What the function returns, for every layer.
    """
    columns = list(zip(*vectors, strict=True))
    alike = all(len({(v.device, v.dtype) for v in column}) == 1 for column in columns)
    if is_traced() or not alike or len(vectors) == 1:
        return [function(*of_layer, *values) for of_layer, values in zip(vectors, numbers, strict=True)]
    lengths = [of_layer[0].numel() for of_layer in vectors]
    joined = [torch.cat(column) for column in columns]
    results = function(*joined, *(_per_channel(values, lengths, joined[-1]) for values in zip(*numbers, strict=True)))
    return list(zip(*(torch.split(result, lengths) for result in results), strict=True))


def _per_channel(values: tuple[Any, ...], lengths: list[int], like: Tensor) -> Any:
    """One number for all layers where they agree, else a vector with each layer's number in all of its channels."""
    if not any(isinstance(value, Tensor) for value in values):
        if len(set(values)) == 1:
            return values[0]
        values = tuple(like.new_tensor(values).unbind())
    return torch.cat(
        [
            torch.as_tensor(v, dtype=like.dtype, device=like.device).expand(n)
            for v, n in zip(values, lengths, strict=True)
        ]
    )
