"""The method: a proxy pass, a perturbation, an adversarial pass, and the weighted sum of both gradients.

    proxy = proxy_pass(fmodel, loss_fn, params, buffers, batch)                        # ∇L_p, and g = ∂L_p/∂δ
    δ     = sign_perturbation(proxy.stats, proxy.stat_grads, epsilon)                  # ε · sign(g)
    adver = adversarial_pass(fmodel, loss_fn, params, buffers, first N samples, δ)     # ∇L_a at δ
    grads = r ∇L_p + (1 − r) ∇L_a                                                      # r = M / (M + N)

`make_apart_step` puts the four lines into one function; everything it does can be done by hand with these parts.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from apart_func.autodiff import gradient, is_compiling, is_traced
from apart_func.batch_norm import RunningStats, advance_running_stats, perturbed_batch_norm
from apart_func.errors import BatchError, SettingError, UsageError
from apart_func.functional import FunctionalModel, functionalize
from apart_func.perturbation import Rule, sign_perturbation
from apart_func.pytrees import (
    AdversarialOutput,
    BatchStats,
    Perturbation,
    PerturbationTree,
    ProxyOutput,
    StatTree,
    StepOutput,
    Tensors,
    batch_size,
    concatenate_trees,
    cut_batch,
    stack_trees,
)

LossFunction = Callable[[Any, Any], Tensor]


class Precision(NamedTuple):
    """How a pass computes.

    Attributes:
        autocast: dtype of an autocast region around the forward; None opens none.
        loss_scale: 0-d factor on the loss during the backward, divided out of all gradients; None is 1.
    """

    autocast: torch.dtype | None = None
    loss_scale: Tensor | None = None


FULL_PRECISION = Precision()


def proxy_pass(
    fmodel: FunctionalModel,
    loss_fn: LossFunction,
    params: Tensors,
    buffers: Tensors,
    batch: tuple[Any, Any],
    *,
    precision: Precision = FULL_PRECISION,
) -> ProxyOutput:
    """Run plain training's forward and backward, and differentiate by the batch statistics as well.

    Args:
        fmodel: the model, from `functionalize`.
        loss_fn: `(output, target) -> scalar`.
        params: trained tensors by name.
        buffers: all other tensors by name.
        batch: `(input, target)`, pytrees. A tuple input is splatted into the model, a dict passed as keywords.
        precision: mixed-precision settings.

    Returns:
        Loss, output, gradients, new buffers, batch statistics, and their gradients.

    Raises:
        ApartError: the state or batch does not fit the model, or a layer cannot be perturbed.
    """
    tensors = _checked_state(fmodel, params, buffers)

    @contextmanager
    def run(trained: Tensors, shifts: PerturbationTree) -> Iterator[tuple[Tensor, Any]]:
        record = _Record(shifts)
        with fmodel.opened({**tensors, **trained}, record) as (module, copy):
            loss, output = _forward(module, loss_fn, batch, precision)
            record.closed = True  # layers that are run again during the backward add nothing
            moved = {**buffers, **copy.own_buffers(), **_advanced(fmodel, tensors, record)}
            stats = {layer: _collect([call.stats for call in calls]) for layer, calls in record.calls.items()}
            yield _scaled(loss, precision), (loss, output, {name: moved[name] for name in buffers}, stats)

    (grads, shift_grads), _, (loss, output, new_buffers, stats) = gradient(run, params, _zero_shifts(fmodel, tensors))
    stat_grads = {layer: BatchStats(*shifts) for layer, shifts in shift_grads.items()}
    if precision.loss_scale is not None:
        grads = {name: grad / precision.loss_scale for name, grad in grads.items()}
        stat_grads = {
            layer: BatchStats(g.mean / precision.loss_scale, g.var / precision.loss_scale)
            for layer, g in stat_grads.items()
        }
    return ProxyOutput(loss, output, grads, new_buffers, stats, stat_grads)


def adversarial_pass(
    fmodel: FunctionalModel,
    loss_fn: LossFunction,
    params: Tensors,
    buffers: Tensors,
    batch: tuple[Any, Any],
    perturbation: PerturbationTree,
    *,
    groups: int = 0,
    precision: Precision = FULL_PRECISION,
) -> AdversarialOutput:
    """Run a forward and backward with perturbed statistics, in ghost groups. No buffer moves.

    Args:
        fmodel: the model, from `functionalize`.
        loss_fn: `(output, target) -> scalar`.
        params: trained tensors by name.
        buffers: all other tensors by name.
        batch: `(input, target)` with the N samples of this pass.
        perturbation: relative shifts of every BN layer, `(C,)`, or `(groups, C)` for one in each group. A constant:
            nothing is differentiated by it.
        groups: number of ghost groups; sample i is in group i mod `groups`. 0 and 1 make one group of the whole
            batch, -1 makes a group of every sample.
        precision: mixed-precision settings.

    Returns:
        Loss, output and gradients.

    Raises:
        ApartError: the state, batch or perturbation does not fit the model, or a layer cannot be perturbed.
    """
    tensors = _checked_state(fmodel, params, buffers)
    samples = batch_size(batch)
    groups = _number_of_groups(groups, samples)
    _check_perturbation(fmodel, perturbation, groups)

    def layer(name: str, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
        _check_input(name, x, fmodel.layers[name].channels, groups, samples)
        return perturbed_batch_norm(x, weight, bias, eps, perturbation[name], groups=groups)[0]

    @contextmanager
    def run(trained: Tensors) -> Iterator[tuple[Tensor, Any]]:
        with fmodel.opened({**tensors, **trained}, layer) as (module, _):
            loss, output = _forward(module, loss_fn, batch, precision)
            yield _scaled(loss, precision), (loss, output)

    (grads,), _, (loss, output) = gradient(run, params)
    if precision.loss_scale is not None:
        grads = {name: grad / precision.loss_scale for name, grad in grads.items()}
    return AdversarialOutput(loss, output, grads)


class ApartStep(Protocol):
    """One training step as a function; see `make_apart_step`."""

    def __call__(
        self,
        params: Tensors,
        buffers: Tensors,
        batch: tuple[Any, Any],
        *,
        epsilon: float | Tensor | None = None,
        loss_scale: float | Tensor | None = None,
    ) -> StepOutput:
        """Take one step.

        Args:
            params: trained tensors by name.
            buffers: all other tensors by name.
            batch: `(input, target)`, pytrees of M samples.
            epsilon: overrides the radius for this call; a 0-d tensor that changes does not recompile.
            loss_scale: factor on both losses during their backward, divided out of all gradients.
        """


def make_apart_step(
    model: nn.Module | FunctionalModel,
    loss_fn: LossFunction,
    *,
    epsilon: float | Tensor = 0.1,
    groups: int = 0,
    ratio: float = 1.0,
    remainder: Literal["error", "drop"] = "error",
    microbatches: int = 1,
    rule: Rule = sign_perturbation,
    autocast_dtype: torch.dtype | None = None,
) -> ApartStep:
    """Make the training step of APART: a pure function of parameters, buffers and batch.

    Args:
        model: a module with BN layers in training mode, or what `functionalize` made of it.
        loss_fn: `(output, target) -> scalar`, a mean over samples if r is to weigh both passes as the method says.
        epsilon: perturbation radius ε ≥ 0, as a fraction of the statistic.
        groups: ghost groups G of the adversarial pass: 0 and 1 one group, -1 a group for every sample.
        ratio: N = int(ratio · M) of the M samples go through the adversarial pass, the first ones.
        remainder: what to do where G does not divide N: "error", or "drop" to lower N to a multiple of G.
        microbatches: k parts of the batch, one after another; each runs both passes with its own N and δ.
        rule: makes the perturbation from statistics and their gradients.
        autocast_dtype: dtype of an autocast region around each forward; None opens none.

    Returns:
        `apart_step(params, buffers, batch, *, epsilon=None, loss_scale=None) -> StepOutput`.

    Raises:
        ApartError: a setting is out of range, or the model has no batch norm to perturb.
    """
    fmodel = model if isinstance(model, FunctionalModel) else functionalize(model)
    _check_settings(epsilon, groups, ratio, remainder, microbatches)
    default_epsilon = epsilon

    def one_batch(
        params: Tensors, buffers: Tensors, batch: tuple[Any, Any], radius: Tensor, precision: Precision
    ) -> StepOutput:
        samples = batch_size(batch)
        chosen = _adversarial_samples(samples, ratio, groups, remainder)
        proxy = proxy_pass(fmodel, loss_fn, params, buffers, batch, precision=precision)
        perturbation = {
            layer: Perturbation(shift.mean.detach(), shift.var.detach())
            for layer, shift in rule(proxy.stats, proxy.stat_grads, radius).items()
        }
        adversarial = adversarial_pass(
            fmodel,
            loss_fn,
            params,
            proxy.buffers,
            cut_batch(batch, 0, chosen),
            perturbation,
            groups=groups,
            precision=precision,
        )
        return StepOutput(
            grads=_interpolate(proxy.grads, adversarial.grads, chosen / (samples + chosen)),
            buffers=proxy.buffers,
            loss=proxy.loss,
            adversarial_loss=adversarial.loss,
            output=proxy.output,
            stats=proxy.stats,
            stat_grads=proxy.stat_grads,
            perturbation=perturbation,
            all_finite=_all_finite([proxy.loss, adversarial.loss, radius], proxy.grads, adversarial.grads, proxy.stat_grads)
            & (radius >= 0),
        )

    def apart_step(
        params: Tensors,
        buffers: Tensors,
        batch: tuple[Any, Any],
        *,
        epsilon: float | Tensor | None = None,
        loss_scale: float | Tensor | None = None,
    ) -> StepOutput:
        radius = default_epsilon if epsilon is None else epsilon
        _check_epsilon(radius)
        like = next(iter(_zero_shifts(fmodel, {**params, **buffers}).values())).mean
        radius = _scalar(radius, like.dtype, like.device)
        precision = Precision(
            autocast_dtype, None if loss_scale is None else _scalar(loss_scale, torch.float32, like.device)
        )
        outputs, moved = [], buffers
        for part in _parts(batch, microbatches):
            outputs.append(one_batch(params, moved, part, radius, precision))
            moved = outputs[-1].buffers
        out = outputs[0] if microbatches == 1 else _mean_output(outputs)
        kept = {
            name: new if new is buffers[name] else torch.where(out.all_finite, new, buffers[name])
            for name, new in out.buffers.items()
        }
        return out._replace(buffers=kept)

    return apart_step


class _Call(NamedTuple):
    stats: BatchStats
    size: int


class _Record:
    """The proxy pass's layer: plain batch norm that can be differentiated by δ at zero, and is written down."""

    def __init__(self, shifts: PerturbationTree) -> None:
        self.shifts = shifts
        self.calls: dict[str, list[_Call]] = {}
        self.closed = False

    def __call__(self, name: str, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
        shift = self.shifts[name]
        _check_input(name, x, shift.mean.shape[0], 1, x.shape[0])
        y, stats = perturbed_batch_norm(x, weight, bias, eps, shift, at_zero=True)
        if not self.closed:
            dtype = shift.mean.dtype
            stats = BatchStats(stats.mean.to(dtype), stats.var.to(dtype))
            self.calls.setdefault(name, []).append(_Call(stats, x.numel() // x.shape[1]))
        return y


def _forward(
    module: nn.Module, loss_fn: LossFunction, batch: tuple[Any, Any], precision: Precision
) -> tuple[Tensor, Any]:
    if not (isinstance(batch, tuple | list) and len(batch) == 2):
        given = f"a {type(batch).__name__}" + (f" of {len(batch)}" if isinstance(batch, tuple | list) else "")
        raise BatchError(f"the batch is {given}; expected (input, target).")
    inputs, target = batch
    with _autocast(precision, batch):
        if isinstance(inputs, tuple):
            output = module(*inputs)
        elif isinstance(inputs, Mapping):
            output = module(**inputs)
        else:
            output = module(inputs)
        loss = loss_fn(output, target)
    if not isinstance(loss, Tensor) or loss.dim() != 0 or not loss.is_floating_point():
        given = f"a {loss.dtype} tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else repr(type(loss))
        raise UsageError(f"loss_fn returned {given}; expected a 0-d floating-point tensor. Reduce it, e.g. loss.mean().")
    return loss, output


def _autocast(precision: Precision, batch: Any) -> AbstractContextManager[Any]:
    if precision.autocast is None:
        return nullcontext()
    device = next(leaf.device.type for leaf in tree_flatten(batch)[0] if isinstance(leaf, Tensor))
    return torch.autocast(device, dtype=precision.autocast)


def _scalar(value: float | Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    if isinstance(value, Tensor):
        return value.to(device=device, dtype=dtype)
    return torch.full((), value, dtype=dtype, device=device)


def _scaled(loss: Tensor, precision: Precision) -> Tensor:
    return loss if precision.loss_scale is None else loss * precision.loss_scale


def _zero_shifts(fmodel: FunctionalModel, tensors: Tensors) -> PerturbationTree:
    """The point at which the proxy loss is differentiated."""
    floating = [tensor for tensor in tensors.values() if tensor.is_floating_point()]
    wide = any(tensor.dtype == torch.float64 for tensor in floating)
    dtype, device = torch.float64 if wide else torch.float32, floating[0].device

    def zero(name: str, channels: int) -> Tensor:
        own = tensors.get(f"{name}.weight", tensors.get(f"{name}.running_mean"))
        return torch.zeros(channels, dtype=dtype, device=device if own is None else own.device)

    return {name: Perturbation(zero(name, spec.channels), zero(name, spec.channels)) for name, spec in fmodel.layers.items()}


def _collect(calls: list[BatchStats]) -> BatchStats:
    return calls[0] if len(calls) == 1 else stack_trees(calls)


def _advanced(fmodel: FunctionalModel, tensors: Tensors, record: _Record) -> Tensors:
    """The running statistics after every recorded call."""
    moved: Tensors = {}
    for layer, calls in record.calls.items():
        if not fmodel.layers[layer].tracked:
            continue
        names = [f"{layer}.running_mean", f"{layer}.running_var", f"{layer}.num_batches_tracked"]
        running = RunningStats(*(tensors[name] for name in names))
        for call in calls:
            running = advance_running_stats(running, call.stats, call.size, fmodel.layers[layer].momentum)
        moved.update(zip(names, running, strict=True))
    return moved


def _interpolate(start: Tensors, end: Tensors, weight: float) -> Tensors:
    """(1 − weight) · start + weight · end."""
    if is_traced():  # foreach kernels know no vmap, and compilers fuse without them
        return {name: torch.lerp(grad, end[name], weight) for name, grad in start.items()}
    ends = [end[name] for name in start]
    return dict(zip(start, torch._foreach_lerp(list(start.values()), ends, weight), strict=True))


def _all_finite(*trees: Any) -> Tensor:
    """Whether no leaf holds an infinity or NaN, as a 0-d bool."""
    leaves = [leaf for leaf in tree_flatten(trees)[0] if leaf.numel()]
    if is_traced():
        return torch.stack([leaf.isfinite().all() for leaf in leaves]).all()
    return torch.stack([norm.float() for norm in torch._foreach_norm(leaves, math.inf)]).isfinite().all()


def _parts(batch: Any, microbatches: int) -> list[Any]:
    if microbatches == 1:
        return [batch]
    samples = batch_size(batch)
    if samples % microbatches:
        raise BatchError(
            f"microbatches={microbatches} does not divide the batch of {samples} samples. Use a divisor, and "
            "drop_last=True in the data loader."
        )
    size = samples // microbatches
    return [cut_batch(batch, start, start + size) for start in range(0, samples, size)]


def _mean_output(outputs: list[StepOutput]) -> StepOutput:
    """One output for all micro-batches: means of losses and gradients, the rest joined."""
    count = len(outputs)
    return StepOutput(
        grads={name: sum(out.grads[name] for out in outputs) / count for name in outputs[0].grads},
        buffers=outputs[-1].buffers,
        loss=torch.stack([out.loss for out in outputs]).mean(),
        adversarial_loss=torch.stack([out.adversarial_loss for out in outputs]).mean(),
        output=concatenate_trees([out.output for out in outputs]),
        stats=stack_trees([out.stats for out in outputs]),
        stat_grads=stack_trees([out.stat_grads for out in outputs]),
        perturbation=stack_trees([out.perturbation for out in outputs]),
        all_finite=torch.stack([out.all_finite for out in outputs]).all(),
    )


def _adversarial_samples(samples: int, ratio: float, groups: int, remainder: str) -> int:
    """N: how many of the M samples go through the adversarial pass."""
    chosen = int(ratio * samples)
    if remainder == "drop" and groups > 1:
        chosen -= chosen % groups
    if chosen < 1:
        raise BatchError(
            f"ratio={ratio} and groups={groups} leave no sample of a batch of {samples} for the adversarial pass. "
            "Use a larger batch or ratio, or fewer groups."
        )
    _number_of_groups(groups, chosen)
    return chosen


def _number_of_groups(groups: int, samples: int) -> int:
    if groups < -1:
        raise SettingError(f"groups={groups}; expected a positive number, 0 for one group, or -1 for one a sample.")
    if groups == -1:
        return samples
    if groups > 1 and samples % groups:
        raise BatchError(
            f"groups={groups} does not divide the {samples} samples of the adversarial pass. Use a batch size and ratio "
            "that give a multiple, drop_last=True in the data loader, or remainder='drop'."
        )
    return max(groups, 1)


def _check_input(name: str, x: Tensor, channels: int, groups: int, samples: int) -> None:
    """Every group must have a variance in this layer."""
    if x.dim() < 2 or x.shape[1] != channels:
        raise BatchError(f"layer {name!r} got input of shape {tuple(x.shape)}; expected (N, {channels}, ...).")
    rows = x.shape[0]
    if rows % groups:
        raise BatchError(f"layer {name!r} sees {rows} rows, which groups={groups} does not divide. Use another number.")
    positions = x.numel() // (rows * channels) if x.numel() else 0
    if rows // groups * positions > 1:
        return
    size = "×".join(map(str, x.shape[2:])) or "1"
    if groups == 1:
        raise BatchError(
            f"layer {name!r} sees one value a channel ({rows} samples, {size} positions), so it has no variance. "
            "Use a larger batch, or put the layer in evaluation mode."
        )
    raise BatchError(
        f"layer {name!r} sees one value a channel in each of {groups} groups ({rows} samples, {size} positions), "
        f"so it has no variance. Use fewer groups (groups={max(rows // 2, 1)} leaves two) or a larger batch."
    )


def _check_perturbation(fmodel: FunctionalModel, perturbation: PerturbationTree, groups: int) -> None:
    missing = sorted(set(fmodel.layers) - set(perturbation))
    unexpected = sorted(set(perturbation) - set(fmodel.layers))
    if missing or unexpected:
        raise SettingError(
            f"the perturbation does not fit the model's BN layers: missing {missing}, unexpected {unexpected}. "
            "A rule returns one entry for every layer in stat_grads."
        )
    for layer, spec in fmodel.layers.items():
        for shift in perturbation[layer]:
            if tuple(shift.shape) not in ((spec.channels,), (groups, spec.channels)):
                raise SettingError(
                    f"the perturbation of layer {layer!r} has shape {tuple(shift.shape)}; expected ({spec.channels},), "
                    f"or ({groups}, {spec.channels}) for one in each group."
                )


def _checked_state(fmodel: FunctionalModel, params: Tensors, buffers: Tensors) -> Tensors:
    if not is_compiling() and torch.is_inference_mode_enabled():  # Dynamo cannot ask
        raise UsageError("inference_mode is on, and no gradient exists there. Leave it; no_grad is fine.")
    return fmodel.check_state(params, buffers)


def _check_settings(epsilon: Any, groups: int, ratio: float, remainder: str, microbatches: int) -> None:
    _check_epsilon(epsilon)
    _number_of_groups(min(groups, 1), 1)
    if not 0 < ratio <= 1:
        raise SettingError(f"ratio={ratio}; expected 0 < ratio ≤ 1, the share of samples in the adversarial pass.")
    if remainder not in ("error", "drop"):
        raise SettingError(f"remainder={remainder!r}; expected 'error' or 'drop'.")
    if not isinstance(microbatches, int) or microbatches < 1:
        raise SettingError(f"microbatches={microbatches}; expected a positive number of parts.")


def _check_epsilon(epsilon: float | Tensor) -> None:
    if isinstance(epsilon, Tensor):
        if epsilon.dim():
            raise SettingError(
                f"epsilon has shape {tuple(epsilon.shape)}; expected a number or 0-d tensor. For a sweep, use "
                "vmap(lambda e: apart_step(params, buffers, batch, epsilon=e))(epsilons)."
            )
        if is_traced():
            return  # all_finite reports a bad value, which cannot be read here
        epsilon = epsilon.item()
    if not (math.isfinite(epsilon) and epsilon >= 0):
        raise SettingError(f"epsilon={epsilon}; expected a finite radius ≥ 0, such as 0.1.")
