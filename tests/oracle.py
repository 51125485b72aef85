"""The definition of APART: float64, plain arithmetic, ordinary autograd; slow and obvious.

    one layer     y = γ (1 + δσ) (x̂ − δμ · sg(μ/s)) + β,  with x̂ = (x − μ)/s, s = sqrt(σ² + eps), σ² biased
    proxy         L_p at δ = 0 on M samples                →  ∇L_p, g = ∂L_p/∂δ, batch and running statistics
    perturbation  δ = ε · sign(g)
    adversarial   L_a at δ on the first N samples, every group x[g::G] with its own μ and σ²   →  ∇L_a
    gradient      r ∇L_p + (1 − r) ∇L_a,  with r = M / (M + N)
    one pass      both at once: groups g < K at δ = 0 and the others at a given δ, with r = K / G

sg is stop-gradient. The library is compared with this file, so the two share no code: groups are a Python loop, and no
batch-norm kernel of PyTorch is called. Any model can be given: a copy of it is run, in which `F.batch_norm` computes
the line above while the forward of a batch-norm layer in training mode runs, whatever else that forward does. Layers in
evaluation mode compute what they always do. δ has a leaf for every value that a layer sees, so that a statistic
gradient is a sum over these, and it can be told how far it is above their rounding.
"""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

LossFunction = Callable[[Any, Any], Tensor]


class Stats(NamedTuple):
    """Batch statistics of a layer; the variance is biased."""

    mean: Tensor
    var: Tensor


class Shift(NamedTuple):
    """δμ and δσ of a layer, or the gradients by them."""

    mean: Tensor
    scale: Tensor


StatTree = dict[str, Stats]  # keyed by layer name
ShiftTree = dict[str, Shift]

# Which sample a row of a layer's input belongs to: "consecutive", "interleaved", or a function of the layer's name and
# its input. A function is always asked; else a row is a sample where there are as many rows as samples.
Rows = str | Callable[[str, Tensor], Tensor] | None


class RowsError(Exception):
    """A layer sees other than one row a sample, and nothing says how rows belong to samples."""


class Proxy(NamedTuple):
    """What the proxy pass yields; the loss and its gradients are not weighted."""

    loss: Tensor
    output: Any
    grads: dict[str, Tensor]
    stats: StatTree  # (C,), or (K, C) for a layer called K times; no entry for a layer never called
    stat_grads: ShiftTree  # (C,) always: a layer called K times adds them up
    buffers: dict[str, Tensor]  # the new ones, and the frozen parameters
    terms: ShiftTree  # the sum of the magnitudes of what each statistic gradient is the sum of


class Adversarial(NamedTuple):
    """What the adversarial pass yields; the loss and its gradients are not weighted."""

    loss: Tensor
    grads: dict[str, Tensor]


class Step(NamedTuple):
    """What one step of the method yields: losses not weighted, gradients weighted and added."""

    loss: Tensor
    adversarial_loss: Tensor
    output: Any
    grads: dict[str, Tensor]
    buffers: dict[str, Tensor]
    stats: StatTree
    stat_grads: ShiftTree
    perturbation: ShiftTree
    proxy: Proxy | None  # of a step of two passes


# One batch-norm layer.


class Call(NamedTuple):
    """A call of `F.batch_norm` by a layer in training mode."""

    running_mean: Tensor | None
    running_var: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    momentum: float
    eps: float


def normalize(layer: _BatchNorm | Call, x: Tensor, delta: Shift) -> tuple[Tensor, Stats]:
    """BN with perturbed statistics, on one group of samples; also the statistics of that group.

    A shift is a vector by channel, or has a value for each of x.
    """
    mean, var = moments(x)
    s = (var + layer.eps).sqrt()
    x_hat = (x.double() - per_channel(mean, x)) / per_channel(s, x)  # keeps BN's whole training-mode gradient
    # a constant but for δμ
    shift = per_channel(delta.mean, x) * per_channel((mean / s).detach(), x)
    y = (1 + per_channel(delta.scale, x)) * (x_hat - shift)
    if layer.weight is not None:
        y = per_channel(layer.weight, x) * y
    if layer.bias is not None:
        y = y + per_channel(layer.bias, x)
    return y.to(x.dtype), Stats(mean.detach(), var.detach())


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance by channel, in float64."""
    not_channel = [dim for dim in range(x.dim()) if dim != 1]
    mean = x.double().mean(not_channel)
    return mean, ((x.double() - per_channel(mean, x)) ** 2).mean(not_channel)


def per_channel(vector: Tensor, x: Tensor) -> Tensor:
    """A vector by channel in a shape that fits x; what has that shape already stays."""
    return vector.reshape(1, -1, *[1] * (x.dim() - 2)) if vector.dim() == 1 and x.dim() > 1 else vector


@torch.no_grad()
def advance_running_statistics(call: Call, x: Tensor, stats: Stats) -> None:
    """Move running statistics towards those of one more batch, as PyTorch defines it."""
    if call.running_mean is None or call.running_var is None:
        return
    count = x.numel() / x.shape[1]
    for running, new in ((call.running_mean, stats.mean), (call.running_var, stats.var * count / (count - 1))):
        running.copy_((1 - call.momentum) * running.double() + call.momentum * new)


class Layer:
    """A batch-norm layer of a copy, for one pass: its forward runs, with `F.batch_norm` as defined here.

    Args:
        name: of the layer.
        layer: the layer, whose forward is replaced.
        deltas: δ of every ghost group.
        samples: in the batch.
        clean: how many groups are clean, the first ones: what they see is remembered, and δ has leaves there.
        rows: how rows belong to samples.
    """

    def __init__(
        self, name: str, layer: _BatchNorm, deltas: list[Shift], samples: int, clean: int = 0, rows: Rows = None
    ) -> None:
        self.name, self.deltas, self.samples, self.clean, self.rows = name, deltas, samples, clean, rows
        self.layer, self.forward = layer, layer.forward
        self.stats: list[Stats] = []  # of every call
        self.leaves: list[Shift] = []  # likewise, with a value for each that the layer saw
        layer.forward = self  # type: ignore[method-assign]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The layer's own forward, whatever it does."""
        self.has_run, counter = False, self.layer.num_batches_tracked
        before = None if counter is None else counter.clone()
        with patch.object(F, "batch_norm", partial(self.batch_norm, F.batch_norm)):
            out = self.forward(*args, **kwargs)
        assert self.has_run, f"layer {self.name!r} does without F.batch_norm, so that nothing is defined here"
        if counter is not None and not self.clean:
            counter.copy_(before)  # perturbed samples move no statistics
        return out

    def batch_norm(
        self,
        native: Callable[..., Tensor],
        x: Tensor,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        training: bool = False,
        momentum: float = 0.1,
        eps: float = 1e-5,
    ) -> Tensor:
        """Normalise every group by itself, and remember the clean samples, all of their groups together."""
        self.has_run = True
        if not training:
            return native(x, running_mean, running_var, weight, bias, training, momentum, eps)
        call = Call(running_mean, running_var, weight, bias, momentum, eps)
        members = self.groups_of_rows(x)
        leaf = Shift(*(torch.zeros_like(x, dtype=torch.float64).requires_grad_() for _ in "μσ"))
        y = torch.empty_like(x)
        for number, (of_group, delta) in enumerate(zip(members, self.deltas, strict=True)):
            if number < self.clean:
                delta = Shift(*(per_channel(d, x) + value[of_group] for d, value in zip(delta, leaf, strict=True)))
            y[of_group], _ = normalize(call, x[of_group], delta)
        if self.clean:
            seen = x.detach()[[row for of_group in members[: self.clean] for row in of_group]]
            stats = Stats(*moments(seen))
            advance_running_statistics(call, seen, stats)
            self.stats.append(stats)
            self.leaves.append(leaf)
        return y

    def groups_of_rows(self, x: Tensor) -> list[list[int]]:
        """The rows of a layer's input in each group; sample i is in group i mod G."""
        groups, rows = len(self.deltas), range(len(x))
        if groups == 1:
            return [list(rows)]
        if callable(self.rows):
            sample_of = self.rows(self.name, x).tolist()
        elif len(x) == self.samples:
            sample_of = list(rows)
        elif self.rows is None or len(x) % self.samples:
            raise RowsError(f"layer {self.name!r} sees {len(x)} rows of {self.samples} samples")
        elif self.rows == "consecutive":
            sample_of = [row // (len(x) // self.samples) for row in rows]
        else:
            sample_of = [row % self.samples for row in rows]
        return [[row for row, sample in enumerate(sample_of) if sample % groups == g] for g in range(groups)]

    def summed(self, values: list[Tensor]) -> Shift:
        """What δμ and δσ have for every value, (μ, σ) call after call, summed by channel."""
        zero = torch.zeros(self.layer.num_features).double()
        parts = (values[::2], values[1::2])
        return Shift(*(sum((v.transpose(0, 1).flatten(1).sum(1) for v in of_calls), zero) for of_calls in parts))


# The passes.


def oracle_proxy(
    model: nn.Module, loss_fn: LossFunction, x: Any, y: Any, delta: ShiftTree | None = None, exact: bool = True
) -> Proxy:
    """Ordinary training, at δ (zero, unless given), by which it is differentiated.

    `exact=False` leaves model and batch in their precision; layers of batch norm still compute in float64.
    """
    model, x, y = (float64_copy(model), as_float64(x), as_float64(y)) if exact else (copy.deepcopy(model), x, y)
    params, delta = trained_parameters(model), delta or zero_perturbation(model)
    samples = sample_count(x)
    layers = {name: Layer(name, m, [delta[name]], samples, clean=1) for name, m in training_layers(model).items()}

    output = call(model, fresh(x))
    loss = loss_fn(output, fresh(y))
    # Taken before the backward: there, checkpointed layers run once more and would count twice.
    stats, buffers = stats_of(layers), buffers_of(model)
    values = {name: [part for leaf in layer.leaves for part in leaf] for name, layer in layers.items()}

    found = iter(gradients_of(loss, [*params.values(), *(part for name in layers for part in values[name])]))
    grads = {name: next(found) for name in params}
    by_value = {name: [next(found) for _ in values[name]] for name in layers}
    stat_grads = {name: layer.summed(by_value[name]) for name, layer in layers.items()}
    terms = {name: layer.summed([value.abs() for value in by_value[name]]) for name, layer in layers.items()}
    return Proxy(loss.detach(), map_tensors(Tensor.detach, output), grads, stats, stat_grads, buffers, terms)


def oracle_adversarial(
    model: nn.Module,
    loss_fn: LossFunction,
    x: Any,
    y: Any,
    perturbation: ShiftTree,
    groups: int,
    rows: Rows = None,
    exact: bool = True,
) -> Adversarial:
    """Training with every layer's statistics pushed by a constant δ; `x` and `y` hold the N samples already."""
    model, x, y = (float64_copy(model), as_float64(x), as_float64(y)) if exact else (copy.deepcopy(model), x, y)
    params, samples = trained_parameters(model), sample_count(x)
    groups = {0: 1, -1: samples}.get(groups, groups)
    for name, layer in training_layers(model).items():
        delta = Shift(*(as_float64(part.double()) for part in perturbation[name]))
        # (C,): one perturbation for all groups; (G, C): one for each
        deltas = [Shift(*(part[g] if part.dim() == 2 else part for part in delta)) for g in range(groups)]
        Layer(name, layer, deltas, samples, rows=rows)

    loss = loss_fn(call(model, fresh(x)), fresh(y))
    return Adversarial(loss.detach(), dict(zip(params, gradients_of(loss, list(params.values())), strict=True)))


# Projected ascent by several gradients.


def oracle_ascent(
    model: nn.Module, loss_fn: LossFunction, x: Any, y: Any, *, epsilon: float, steps: int, step_size: float
) -> tuple[ShiftTree, list[ShiftTree]]:
    """Projected gradient ascent on the proxy loss from δ = 0: where it ends, and the gradients on the way."""
    delta, gradients = zero_perturbation(model), list[ShiftTree]()
    for _ in range(steps):
        gradients.append(oracle_proxy(model, loss_fn, x, y, delta).stat_grads)
        for name, pair in delta.items():
            moved = [part + step_size * epsilon * g.sign() for part, g in zip(pair, gradients[-1][name], strict=True)]
            delta[name] = Shift(*(part.clip(-epsilon, epsilon) for part in moved))
    return delta, gradients


# The step.


def oracle_step(
    model: nn.Module,
    loss_fn: LossFunction,
    batch: tuple[Any, Any],
    *,
    epsilon: float,
    groups: int,
    ratio: float,
    rho: float | None = None,
    perturbation: ShiftTree | None = None,
    rows: Rows = None,
    exact: bool = True,
) -> Step:
    """One step of APART; with `rho` of APART-SAM, whose adversarial pass is taken at θ + ρ r∇L_p/‖r∇L_p‖.

    A given `perturbation` takes the place of ε · sign(g). Give it when gradients are compared: where g is zero but for
    rounding, its sign is a coin toss, and two correct implementations may then differ in δ and in every gradient after
    it.
    """
    x, y = batch
    samples = sample_count(x)
    adversarial_samples = int(ratio * samples)
    r = samples / (samples + adversarial_samples)

    proxy = oracle_proxy(model, loss_fn, x, y, exact=exact)
    if perturbation is None:
        perturbation = {name: Shift(*(epsilon * g.sign() for g in pair)) for name, pair in proxy.stat_grads.items()}
    else:
        perturbation = {name: Shift(*(part.double() for part in pair)) for name, pair in perturbation.items()}
    model = float64_copy(model) if exact else copy.deepcopy(model)
    with torch.no_grad():
        for name, buffer in model.named_buffers():  # a model's own buffers go on from where the proxy pass left them
            buffer.copy_(proxy.buffers[name])
    if rho is not None:
        climb_(model, proxy.grads, rho)  # r cancels in r∇L_p/‖r∇L_p‖
    x, y = cut(x, adversarial_samples), cut(y, adversarial_samples)
    adversarial = oracle_adversarial(model, loss_fn, x, y, perturbation, groups, rows, exact)
    grads = {name: r * grad + (1 - r) * adversarial.grads[name] for name, grad in proxy.grads.items()}
    found = proxy.loss, adversarial.loss, proxy.output, grads, proxy.buffers, proxy.stats, proxy.stat_grads
    return Step(*found, perturbation, proxy)


@torch.no_grad()
def climb_(model: nn.Module, grads: dict[str, Tensor], rho: float) -> None:
    """Move a copy by ρ along the gradient; the norm is over all parameters together."""
    norm = sum((grad**2).sum() for grad in grads.values()) ** 0.5
    for name, parameter in trained_parameters(model).items():
        parameter += rho * grads[name] / norm


def oracle_one_pass_step(
    model: nn.Module,
    loss_fn: LossFunction,
    batch: tuple[Any, Any],
    perturbation: ShiftTree,
    *,
    epsilon: float,
    groups: int,
    clean: int,
    rows: Rows = None,
    apart: bool = True,
    exact: bool = True,
) -> Step:
    """One step in one pass. `perturbation` is the δ of this step, and what comes back the δ of the next one.

    `apart=False` takes one loss of all samples, as a loop with `backward()` does, in place of one for either kind.
    """
    x, y = (as_float64(part) if exact else part for part in batch)
    model = float64_copy(model) if exact else copy.deepcopy(model)
    params, samples = trained_parameters(model), sample_count(x)
    groups = samples if groups == -1 else groups
    none = zero_perturbation(model)
    layers = {
        name: Layer(name, layer, deltas, samples, clean, rows)
        for name, layer in training_layers(model).items()
        for deltas in [[none[name]] * clean + [Shift(*(p.double() for p in perturbation[name]))] * (groups - clean)]
    }

    output, r = call(model, fresh(x)), clean / groups
    if apart:
        kinds = ([i for i in range(samples) if (i % groups < clean) == kind] for kind in (True, False))
        clean_loss, perturbed_loss = (loss_fn(pick(output, of_kind), pick(fresh(y), of_kind)) for of_kind in kinds)
        total = r * clean_loss + (1 - r) * perturbed_loss
    else:
        clean_loss = perturbed_loss = total = loss_fn(output, fresh(y))
    stats, buffers = stats_of(layers), buffers_of(model)
    values = {name: [part for leaf in layer.leaves for part in leaf] for name, layer in layers.items()}
    found = iter(gradients_of(total, [*params.values(), *(part for name in layers for part in values[name])]))
    grads = {name: next(found) for name in params}
    # Clean samples alone have leaves, and their share of the loss is r.
    stat_grads = {name: layer.summed([next(found) / r for _ in values[name]]) for name, layer in layers.items()}
    after = {name: Shift(*(epsilon * g.sign() for g in pair)) for name, pair in stat_grads.items()}
    losses_and_output = map_tensors(Tensor.detach, (clean_loss, perturbed_loss, output))
    return Step(*losses_and_output, grads, buffers, stats, stat_grads, after, None)


# Models and batches.


def float64_copy(model: nn.Module) -> nn.Module:
    """A copy that shares no tensor with the model; half and single precision values are exact in it."""
    return copy.deepcopy(model).double()


def training_layers(model: nn.Module) -> dict[str, _BatchNorm]:
    """The layers that APART perturbs, under their first name."""
    return {name: m for name, m in model.named_modules() if isinstance(m, _BatchNorm) and m.training}


def zero_perturbation(model: nn.Module) -> ShiftTree:
    """δ = 0."""
    return {name: Shift(*torch.zeros(2, m.num_features).double()) for name, m in training_layers(model).items()}


def trained_parameters(model: nn.Module) -> dict[str, Tensor]:
    """What is differentiated, under its first name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def gradients_of(loss: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    """d loss / d leaf, which is zero where the loss does not depend on the leaf."""
    grads = torch.autograd.grad(loss, leaves, allow_unused=True) if leaves else []
    return [torch.zeros_like(leaf) if grad is None else grad for leaf, grad in zip(leaves, grads, strict=True)]


def stats_of(layers: dict[str, Layer]) -> StatTree:
    """What layers remember: `(C,)` for one call, `(K, C)` for K."""
    called = {name: layer.stats for name, layer in layers.items() if layer.stats}
    return {
        name: calls[0] if len(calls) == 1 else Stats(*(torch.stack(parts) for parts in zip(*calls, strict=True)))
        for name, calls in called.items()
    }


def buffers_of(model: nn.Module) -> dict[str, Tensor]:
    """Copies of the buffers, and the frozen parameters."""
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    return buffers | {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}


def call(model: nn.Module, x: Any) -> Any:
    """A tuple holds positional arguments, a dict holds keywords, anything else is the one argument."""
    if isinstance(x, tuple):
        return model(*x)
    return model(**x) if isinstance(x, dict) else model(x)


def map_tensors(function: Callable[[Tensor], Tensor], tree: Any) -> Any:
    """`function` of every tensor in nested tuples, lists and dicts."""
    if isinstance(tree, Tensor):
        return function(tree)
    if isinstance(tree, dict):
        return {key: map_tensors(function, value) for key, value in tree.items()}
    if isinstance(tree, tuple | list):
        children = [map_tensors(function, value) for value in tree]
        return tree._make(children) if hasattr(tree, "_make") else type(tree)(children)
    return tree


def fresh(tree: Any) -> Any:
    """Copies of tensors, for a model or a loss that works in place."""
    return map_tensors(Tensor.clone, tree)


def as_float64(tree: Any) -> Any:
    """Floating-point tensors in float64, and all others as they are."""
    return map_tensors(lambda t: t.detach().to(torch.float64 if t.is_floating_point() else t.dtype), tree)


def cut(tree: Any, samples: int) -> Any:
    """The first samples of every tensor that has a batch dimension."""
    return map_tensors(lambda t: t[:samples] if t.dim() else t, tree)


def pick(tree: Any, rows: list[int]) -> Any:
    """Some samples of every tensor that has a batch dimension."""
    return map_tensors(lambda t: t[rows] if t.dim() else t, tree)


def sample_count(tree: Any) -> int:
    """The batch size, that of the first tensor with a dimension."""
    sizes: list[int] = []
    map_tensors(lambda t: sizes.extend(t.shape[:1]) or t, tree)
    return sizes[0]
