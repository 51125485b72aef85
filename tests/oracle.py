"""The definition of APART: float64, plain arithmetic, ordinary autograd; slow and obvious.

    one layer     y = γ (1 + δσ) (x̂ − δμ · sg(μ/s)) + β,  with x̂ = (x − μ)/s, s = sqrt(σ² + eps), σ² biased
    proxy         L_p at δ = 0 on M samples                →  ∇L_p, g = ∂L_p/∂δ, batch and running statistics
    perturbation  δ = ε · sign(g)
    adversarial   L_a at δ on the first N samples, every group x[g::G] with its own μ and σ²   →  ∇L_a
    gradient      r ∇L_p + (1 − r) ∇L_a,  with r = M / (M + N)
    one pass      both at once: groups g < K at δ = 0 and the others at the δ of the step before, with r = K / G

sg is stop-gradient. The library is compared with this file, so the two share no code: δ is an explicit leaf tensor
here, groups are a Python loop, and no batch-norm kernel of PyTorch is called. Any model can be given. A float64 copy
of it is run, in which every batch-norm layer in training mode computes the line above; the caller's model is never
changed. Layers in evaluation mode compute what they always do.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
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

# Which sample a row of a layer's input belongs to. A function is always asked; else a row is a sample where there are
# no more rows than samples.
Rows = Literal["consecutive", "interleaved"] | Callable[[str, Tensor], Tensor] | None
Grouped = Callable[[Tensor], list[list[int]]]  # from a layer's input to the rows of every group


class Proxy(NamedTuple):
    """What the proxy pass yields; the loss and its gradients are not weighted."""

    loss: Tensor
    output: Any
    grads: dict[str, Tensor]
    stats: StatTree  # (C,), or (K, C) for a layer called K times; no entry for a layer never called
    stat_grads: ShiftTree  # (C,) always: a layer called K times adds them up
    buffers: dict[str, Tensor]  # the new ones, and the frozen parameters


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


# One batch-norm layer.


def normalize(layer: _BatchNorm, x: Tensor, delta: Shift) -> tuple[Tensor, Stats]:
    """BN with perturbed statistics, on one group of samples; also the statistics of that group."""

    def per_channel(vector: Tensor) -> Tensor:
        return vector.reshape(1, -1, *[1] * (x.dim() - 2))

    not_channel = [dim for dim in range(x.dim()) if dim != 1]
    mean = x.mean(not_channel)
    var = ((x - per_channel(mean)) ** 2).mean(not_channel)  # biased
    s = (var + layer.eps).sqrt()

    x_hat = (x - per_channel(mean)) / per_channel(s)  # keeps BN's whole training-mode gradient
    shift = delta.mean * (mean / s).detach()  # a constant but for δμ
    y = per_channel(1 + delta.scale) * (x_hat - per_channel(shift))
    if layer.weight is not None:
        y = per_channel(layer.weight) * y
    if layer.bias is not None:
        y = y + per_channel(layer.bias)
    return y, Stats(mean.detach(), var.detach())


@torch.no_grad()
def advance_running_statistics(layer: _BatchNorm, x: Tensor, stats: Stats) -> None:
    """Move the layer's own buffers towards the statistics of one more batch, as PyTorch defines it."""
    if not layer.track_running_stats:
        return
    layer.num_batches_tracked += 1
    # momentum=None asks for the average over all batches so far
    momentum = 1 / layer.num_batches_tracked.item() if layer.momentum is None else layer.momentum
    count = x.numel() / x.shape[1]
    unbiased_var = stats.var * count / (count - 1)
    layer.running_mean += momentum * (stats.mean - layer.running_mean)
    layer.running_var += momentum * (unbiased_var - layer.running_var)


def after_norm(layer: _BatchNorm, y: Tensor) -> Tensor:
    """What a norm-act layer (timm's BatchNormAct2d) does in its own forward once the affine has been applied."""
    return layer.act(layer.drop(y)) if hasattr(layer, "act") else y


def proxy_forward(layer: _BatchNorm, delta: Shift, calls: list[Stats], x: Tensor) -> Tensor:
    """The layer's forward in the proxy pass: the batch is one group, and running statistics advance."""
    y, stats = normalize(layer, x, delta)
    advance_running_statistics(layer, x, stats)
    calls.append(stats)
    return after_norm(layer, y)


def groups_of_rows(name: str, x: Tensor, groups: int, samples: int, rows: Rows) -> list[list[int]]:
    """The rows of a layer's input in each group; sample i is in group i mod G."""
    per_sample = len(x) // samples
    if callable(rows):
        sample_of = rows(name, x).tolist()
    elif len(x) == samples:
        sample_of = list(range(samples))
    elif rows == "consecutive":
        sample_of = [row // per_sample for row in range(len(x))]
    else:
        assert rows == "interleaved" or groups == 1
        sample_of = [row % samples for row in range(len(x))]
    return [[row for row, sample in enumerate(sample_of) if sample % groups == g] for g in range(groups)]


def adversarial_forward(layer: _BatchNorm, delta: Shift, grouped: Grouped, x: Tensor) -> Tensor:
    """The layer's forward in the adversarial pass: in groups of samples, and nothing is remembered."""
    y = torch.empty_like(x)
    for g, members in enumerate(grouped(x)):
        # (C,): one perturbation for all groups; (G, C): one for each
        of_group = Shift(*(part[g] if part.dim() == 2 else part for part in delta))
        y[members], _ = normalize(layer, x[members], of_group)
    return after_norm(layer, y)


def mixed_forward(
    layer: _BatchNorm,
    deltas: list[Shift],
    clean: int,
    calls: list[Stats],
    grouped: Grouped,
    x: Tensor,
) -> Tensor:
    """The layer's forward in one pass: each group has a δ, and the clean samples are remembered together."""
    y = torch.empty_like(x)
    members = grouped(x)
    for of_group, delta in zip(members, deltas, strict=True):
        y[of_group], _ = normalize(layer, x[of_group], delta)
    seen = torch.cat([x[of_group] for of_group in members[:clean]])
    _, stats = normalize(layer, seen, Shift(torch.zeros(()), torch.zeros(())))
    advance_running_statistics(layer, seen, stats)
    calls.append(stats)
    return after_norm(layer, y)


# The passes.


def oracle_proxy(model: nn.Module, loss_fn: LossFunction, x: Any, y: Any, delta: ShiftTree | None = None) -> Proxy:
    """Ordinary training, with δ (zero, unless given) as leaves whose gradients are the statistic gradients."""
    model = float64_copy(model)
    layers, params = training_layers(model), trained_parameters(model)
    delta = delta or zero_perturbation(model)
    delta = {name: Shift(*(part.clone().requires_grad_() for part in pair)) for name, pair in delta.items()}
    calls: dict[str, list[Stats]] = {name: [] for name in layers}
    for name, layer in layers.items():
        layer.forward = partial(proxy_forward, layer, delta[name], calls[name])

    output = call(model, as_float64(x))
    loss = loss_fn(output, as_float64(y))
    # Taken before the backward: there, checkpointed layers run once more and would count twice.
    stats = {name: stack_calls(pairs) for name, pairs in calls.items() if pairs}
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    buffers |= {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}

    leaves = [*params.values(), *(part for name in layers for part in delta[name])]
    gradients = iter(gradients_of(loss, leaves))
    grads = {name: next(gradients) for name in params}
    stat_grads = {name: Shift(next(gradients), next(gradients)) for name in layers}
    return Proxy(loss.detach(), map_tensors(Tensor.detach, output), grads, stats, stat_grads, buffers)


def oracle_adversarial(
    model: nn.Module,
    loss_fn: LossFunction,
    x: Any,
    y: Any,
    perturbation: ShiftTree,
    groups: int,
    rows: Rows = None,
) -> Adversarial:
    """Training with every layer's statistics pushed by a constant δ; `x` and `y` hold the N samples already."""
    model = float64_copy(model)
    params = trained_parameters(model)
    samples = sample_count(x)
    groups = {0: 1, -1: samples}.get(groups, groups)
    for name, layer in training_layers(model).items():
        delta = Shift(*(as_float64(part) for part in perturbation[name]))
        grouped = partial(groups_of_rows, name, groups=groups, samples=samples, rows=rows)
        layer.forward = partial(adversarial_forward, layer, delta, grouped)

    loss = loss_fn(call(model, as_float64(x)), as_float64(y))
    return Adversarial(loss.detach(), dict(zip(params, gradients_of(loss, list(params.values())), strict=True)))


# The rule of several steps.


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
    perturbation: ShiftTree | None = None,
    rows: Rows = None,
) -> Step:
    """One step of APART. A given `perturbation` takes the place of ε · sign(g).

    Give it when gradients are compared: where g is zero but for rounding, its sign is a coin toss, and two correct
    implementations may then differ in δ and in every gradient after it.
    """
    return both_passes(
        model,
        loss_fn,
        batch,
        epsilon=epsilon,
        groups=groups,
        ratio=ratio,
        rho=None,
        perturbation=perturbation,
        rows=rows,
    )


def oracle_sam_step(
    model: nn.Module,
    loss_fn: LossFunction,
    batch: tuple[Any, Any],
    *,
    epsilon: float,
    groups: int,
    ratio: float,
    rho: float,
    perturbation: ShiftTree | None = None,
    rows: Rows = None,
) -> Step:
    """One step of APART-SAM: the adversarial pass at θ + ρ r∇L_p/‖r∇L_p‖; both gradients still add up at θ."""
    return both_passes(
        model,
        loss_fn,
        batch,
        epsilon=epsilon,
        groups=groups,
        ratio=ratio,
        rho=rho,
        perturbation=perturbation,
        rows=rows,
    )


def both_passes(
    model: nn.Module,
    loss_fn: LossFunction,
    batch: tuple[Any, Any],
    *,
    epsilon: float,
    groups: int,
    ratio: float,
    perturbation: ShiftTree | None,
    rho: float | None,
    rows: Rows,
) -> Step:
    """The proxy pass, the perturbation, the adversarial pass (somewhere else if `rho` is given), and their sum."""
    x, y = batch
    samples = sample_count(x)
    adversarial_samples = int(ratio * samples)
    r = samples / (samples + adversarial_samples)

    proxy = oracle_proxy(model, loss_fn, x, y)
    if perturbation is None:
        perturbation = {name: Shift(*(epsilon * g.sign() for g in pair)) for name, pair in proxy.stat_grads.items()}
    else:
        perturbation = {name: Shift(*(as_float64(part) for part in pair)) for name, pair in perturbation.items()}
    model = float64_copy(model)
    with torch.no_grad():
        for name, buffer in model.named_buffers():  # a model's own buffers go on from where the proxy pass left them
            buffer.copy_(proxy.buffers[name])
    if rho is not None:
        climb_(model, proxy.grads, rho)  # r cancels in r∇L_p/‖r∇L_p‖
    x, y = cut(x, adversarial_samples), cut(y, adversarial_samples)
    adversarial = oracle_adversarial(model, loss_fn, x, y, perturbation, groups, rows)

    return Step(
        loss=proxy.loss,
        adversarial_loss=adversarial.loss,
        output=proxy.output,
        grads={name: r * grad + (1 - r) * adversarial.grads[name] for name, grad in proxy.grads.items()},
        buffers=proxy.buffers,
        stats=proxy.stats,
        stat_grads=proxy.stat_grads,
        perturbation=perturbation,
    )


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
) -> Step:
    """One step in one pass. `perturbation` is the δ of this step, and what comes back the δ of the next one."""
    model = float64_copy(model)
    layers, params = training_layers(model), trained_parameters(model)
    x, y = as_float64(batch[0]), as_float64(batch[1])
    samples = sample_count(x)
    groups = samples if groups == -1 else groups
    shifts: dict[str, list[Shift]] = {}
    calls: dict[str, list[Stats]] = {name: [] for name in layers}
    for name, layer in layers.items():
        at_zero = [Shift(*torch.zeros(2, layer.num_features).double()) for _ in range(clean)]
        shifts[name] = at_zero + [Shift(*map(as_float64, perturbation[name])) for _ in range(clean, groups)]
        for part in (part for delta in at_zero for part in delta):
            part.requires_grad_()
        grouped = partial(groups_of_rows, name, groups=groups, samples=samples, rows=rows)
        layer.forward = partial(mixed_forward, layer, shifts[name], clean, calls[name], grouped)

    output = call(model, x)
    chosen = [i for i in range(samples) if i % groups < clean]
    others = [i for i in range(samples) if i % groups >= clean]
    clean_loss, perturbed_loss = (loss_fn(pick(output, of_kind), pick(y, of_kind)) for of_kind in (chosen, others))
    r = clean / groups
    stats = {name: stack_calls(pairs) for name, pairs in calls.items() if pairs}
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    buffers |= {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}

    grads = gradients_of(r * clean_loss + (1 - r) * perturbed_loss, list(params.values()), retain_graph=True)
    stat_grads = {}
    for name in layers:
        by_group = [Shift(*gradients_of(clean_loss, list(delta), retain_graph=True)) for delta in shifts[name][:clean]]
        stat_grads[name] = Shift(*(torch.stack(parts).sum(0) for parts in zip(*by_group, strict=True)))
    return Step(
        loss=clean_loss.detach(),
        adversarial_loss=perturbed_loss.detach(),
        output=map_tensors(Tensor.detach, output),
        grads=dict(zip(params, grads, strict=True)),
        buffers=buffers,
        stats=stats,
        stat_grads=stat_grads,
        perturbation={name: Shift(*(epsilon * g.sign() for g in pair)) for name, pair in stat_grads.items()},
    )


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


def gradients_of(loss: Tensor, leaves: list[Tensor], retain_graph: bool = False) -> list[Tensor]:
    """d loss / d leaf, which is zero where the loss does not depend on the leaf."""
    grads = torch.autograd.grad(loss, leaves, allow_unused=True, retain_graph=retain_graph)
    return [torch.zeros_like(leaf) if grad is None else grad for leaf, grad in zip(leaves, grads, strict=True)]


def stack_calls(calls: list[Stats]) -> Stats:
    """`(C,)` for one call, `(K, C)` for K."""
    return calls[0] if len(calls) == 1 else Stats(*(torch.stack(parts) for parts in zip(*calls, strict=True)))


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
        return type(tree)(map_tensors(function, value) for value in tree)
    return tree


def as_float64(tree: Any) -> Any:
    """Fresh tensors, so that a model that works in place on its input cannot change the caller's."""
    return map_tensors(lambda t: t.detach().to(torch.float64 if t.is_floating_point() else t.dtype, copy=True), tree)


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
