"""APART on any model, by plain arithmetic: the definition that the zoo compares the library with.

    two_passes    L_p and its gradients at δ = 0, then L_a at a given δ in ghost groups      → 0.5 ∇L_p + 0.5 ∇L_a
    one_pass      the first groups at δ = 0 and the others at δ, in one batch                → r ∇L_p + (1 − r) ∇L_a

It shares no code with the library and uses no hook: `F.batch_norm` is replaced by arithmetic while the forward of a
batch-norm layer runs, δ is a leaf, and every group is normalised by itself. What it adds to
`tests/oracle.py`, which is a definition for models whose layers it knows, is that a layer's own forward runs, whatever
else that does; and that it says how far a statistic gradient is above the rounding of the terms which it is the sum of.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

Loss = Callable[[Any, Any], Tensor]


class Shift(NamedTuple):
    """δμ and δσ of a layer, or the gradients by them."""

    mean: Tensor
    scale: Tensor


Shifts = Mapping[str, Shift]


class Step(NamedTuple):
    """What a step yields.

    Attributes:
        loss: L_p.
        adversarial_loss: L_a; of a pass whose loss is that of all samples together, the same as `loss`.
        grads: by parameter, both passes weighted and added.
        stat_grads: ∂L_p/∂δ by layer, `(C,)`.
        terms: the sum of the magnitudes of what each statistic gradient is the sum of.
        buffers: after the step.
        proxy_grads: ∇L_p, of two passes.
    """

    loss: Tensor
    adversarial_loss: Tensor
    grads: dict[str, Tensor]
    stat_grads: dict[str, Shift]
    terms: dict[str, Shift]
    buffers: dict[str, Tensor]
    proxy_grads: dict[str, Tensor]


class Call(NamedTuple):
    """A call of `F.batch_norm` by a layer in training mode."""

    x: Tensor
    running_mean: Tensor | None
    running_var: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    momentum: float
    eps: float


BatchNorm = Callable[[str, Call], Tensor]


class RowsError(Exception):
    """A layer sees other than one row a sample, and nothing says how rows belong to samples."""


class Groups(NamedTuple):
    """Ghost groups: sample i is in group i mod G.

    Attributes:
        number: G.
        samples: in the batch.
        consecutive: whether the rows of a sample follow one another, where there are several.
    """

    number: int
    samples: int
    consecutive: bool = False

    def of_rows(self, name: str, x: Tensor) -> Tensor:
        """The group of every row of a layer's input."""
        each = len(x) // self.samples
        if self.number > 1 and (len(x) % self.samples or (each > 1 and not self.consecutive)):
            raise RowsError(f"layer {name!r} sees {len(x)} rows of {self.samples} samples")
        return torch.tensor([row // max(each, 1) % self.number for row in range(len(x))])


def normalised(call: Call, x: Tensor, shift: Shift) -> Tensor:
    """One group of samples by its perturbed statistics; shifts are of any shape that fits x."""
    mean, s = moments(x, call.eps)
    y = (1 + shift.scale) * ((x.double() - mean) / s - shift.mean * (mean / s).detach())
    if call.weight is not None:
        y = y * per_channel(call.weight, x)
    if call.bias is not None:
        y = y + per_channel(call.bias, x)
    return y.to(x.dtype)


def moments(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """μ and s = sqrt(σ² + eps) by channel, σ² biased."""
    others = [dim for dim in range(x.dim()) if dim != 1]
    mean = x.double().mean(others, keepdim=True)
    return mean, ((x.double() - mean).square().mean(others, keepdim=True) + eps).sqrt()


@torch.no_grad()
def move_running_statistics(call: Call, x: Tensor) -> None:
    """Running statistics go towards those of a batch, with the unbiased variance."""
    if call.running_mean is None or call.running_var is None:
        return
    mean, s = moments(x, call.eps)
    count = x.numel() / x.shape[1]
    unbiased = (s.square() - call.eps) * count / (count - 1)
    for running, new in ((call.running_mean, mean), (call.running_var, unbiased)):
        running.copy_((1 - call.momentum) * running.double() + call.momentum * new.flatten())


class Clean:
    """Batch norm at δ = 0 on the whole batch. Every value has a δ of its own, so that all terms of a sum are seen."""

    def __init__(self, layers: Mapping[str, _BatchNorm]) -> None:
        self.shifts: dict[str, list[Shift]] = {name: [] for name in layers}

    def __call__(self, name: str, call: Call) -> Tensor:
        """What a layer computes."""
        x = call.x
        self.shifts[name].append(
            Shift(*(torch.zeros_like(x, dtype=torch.float64).requires_grad_() for _ in Shift._fields))
        )
        move_running_statistics(call, x)
        return normalised(call, x, self.shifts[name][-1])

    def values(self) -> list[Tensor]:
        """All of them."""
        return [part for calls in self.shifts.values() for shift in calls for part in shift]


class Perturbed:
    """Batch norm at a constant δ, in ghost groups of samples. Nothing is remembered."""

    def __init__(self, delta: Shifts, groups: Groups) -> None:
        self.delta, self.groups = delta, groups

    def __call__(self, name: str, call: Call) -> Tensor:
        """What a layer computes."""
        shift = Shift(*(per_channel(part.detach().double(), call.x) for part in self.delta[name]))
        return in_groups(call, [shift] * self.groups.number, self.groups.of_rows(name, call.x))


class Mixed:
    """Batch norm of which some groups are at δ = 0, with leaves, and the others at δ; clean samples are remembered."""

    def __init__(self, layers: Mapping[str, _BatchNorm], delta: Shifts, groups: Groups, clean: int) -> None:
        self.zero = {name: [zero_shift(layer) for _ in range(clean)] for name, layer in layers.items()}
        self.delta, self.groups, self.clean = delta, groups, clean

    def __call__(self, name: str, call: Call) -> Tensor:
        """What a layer computes."""
        of_groups = self.zero[name] + [Shift(*map(Tensor.detach, self.delta[name]))] * (self.groups.number - self.clean)
        shifts = [Shift(*(per_channel(part.double(), call.x) for part in shift)) for shift in of_groups]
        of_rows = self.groups.of_rows(name, call.x)
        move_running_statistics(call, call.x[of_rows < self.clean])
        return in_groups(call, shifts, of_rows)

    def values(self) -> list[Tensor]:
        """δ = 0 of every layer in every clean group."""
        return [part for of_groups in self.zero.values() for shift in of_groups for part in shift]


def in_groups(call: Call, shifts: list[Shift], of_rows: Tensor) -> Tensor:
    """Normalise every group of rows by itself."""
    y = torch.empty_like(call.x)
    for group, shift in enumerate(shifts):
        y[of_rows == group] = normalised(call, call.x[of_rows == group], shift)
    return y


@contextmanager
def computing(model: nn.Module, batch_norm: BatchNorm) -> Iterator[None]:
    """Let the batch-norm layers of a model that are in training mode compute something else while open."""
    layers = training_layers(model)
    for name, layer in layers.items():
        vars(layer)["forward"] = partial(_forward, name, layer.forward, batch_norm)
    try:
        yield
    finally:
        for layer in layers.values():
            del vars(layer)["forward"]


def _forward(name: str, own: Callable[..., Any], batch_norm: BatchNorm, *args: Any, **kwargs: Any) -> Any:
    """A layer's own forward, in which `F.batch_norm` is another function."""
    native = F.batch_norm

    def replacement(
        x: Tensor,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        training: bool = False,
        momentum: float = 0.1,
        eps: float = 1e-5,
    ) -> Tensor:
        if not training:
            return native(x, running_mean, running_var, weight, bias, training, momentum, eps)
        return batch_norm(name, Call(x, running_mean, running_var, weight, bias, momentum, eps))

    with patch.object(F, "batch_norm", replacement):
        return own(*args, **kwargs)


def two_passes(model: nn.Module, loss_fn: Loss, batch: tuple[Any, Any], delta: Shifts, groups: Groups) -> Step:
    """A step of two passes, both over the whole batch, the second one at a given δ.

    Args:
        model: any; a copy of it is run.
        loss_fn: `(output, target) -> scalar`.
        batch: `(input, target)`.
        delta: of every layer.
        groups: of the second pass.

    Raises:
        RowsError: a layer sees other than one row a sample, in more than one group.
    """
    model = copy.deepcopy(model)
    params, layers = trained(model), training_layers(model)
    clean = Clean(layers)
    with computing(model, clean):
        loss = loss_of(model, loss_fn, batch)
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    found = iter(gradients_of(loss, [*params.values(), *clean.values()]))
    proxy_grads = {name: next(found) for name in params}
    by_value = {name: [Shift(next(found), next(found)) for _ in calls] for name, calls in clean.shifts.items()}
    stat_grads = {name: summed(calls, layers[name]) for name, calls in by_value.items()}
    terms = {
        name: summed([Shift(*map(Tensor.abs, g)) for g in calls], layers[name]) for name, calls in by_value.items()
    }
    with computing(model, Perturbed(delta, groups)):
        adversarial_loss = loss_of(model, loss_fn, batch)
    adversarial = gradients_of(adversarial_loss, list(params.values()))
    grads = {name: 0.5 * proxy_grads[name] + 0.5 * grad for name, grad in zip(params, adversarial, strict=True)}
    return Step(loss.detach(), adversarial_loss.detach(), grads, stat_grads, terms, buffers, proxy_grads)


def one_pass(
    model: nn.Module,
    loss_fn: Loss,
    batch: tuple[Any, Any],
    delta: Shifts,
    groups: Groups,
    clean: int,
    apart: bool,
) -> Step:
    """A step of one pass, at a given δ.

    Args:
        model: any; a copy of it is run.
        loss_fn: `(output, target) -> scalar`.
        batch: `(input, target)`.
        delta: of every layer, for the groups that are not clean.
        groups: in the batch.
        clean: groups that are clean, the first ones.
        apart: whether the losses of clean and perturbed samples are computed apart (as in the functional step), or one
            loss of all samples (as in a loop with `backward()`).

    Raises:
        RowsError: a layer sees other than one row a sample.
    """
    model = copy.deepcopy(model)
    params, layers, share = trained(model), training_layers(model), clean / groups.number
    mixed = Mixed(layers, delta, groups, clean)
    with computing(model, mixed):
        if apart:
            output, target = run(model, batch[0]), fresh(batch[1])
            of_kinds = [
                [i for i in range(groups.samples) if (i % groups.number < clean) is kind] for kind in (True, False)
            ]
            loss, second = (loss_fn(pick(output, rows), pick(target, rows)) for rows in of_kinds)
            total = share * loss + (1 - share) * second
        else:
            loss = second = total = loss_of(model, loss_fn, batch)
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    found = iter(gradients_of(total, [*params.values(), *mixed.values()]))
    grads = {name: next(found) for name in params}
    by_group = {name: [Shift(next(found), next(found)) for _ in range(clean)] for name in layers}
    stat_grads = {
        name: Shift(*(torch.stack(parts).sum(0) / share for parts in zip(*of_groups, strict=True)))
        for name, of_groups in by_group.items()
    }
    return Step(loss.detach(), second.detach(), grads, stat_grads, {}, buffers, {})


def summed(calls: list[Shift], layer: _BatchNorm) -> Shift:
    """What all calls of a layer have for each value, summed by channel."""
    zero = torch.zeros(layer.num_features).double()
    parts = zip(*calls, strict=True) if calls else ((), ())
    return Shift(*(sum((part.transpose(0, 1).flatten(1).sum(1) for part in of_calls), zero) for of_calls in parts))


def per_channel(vector: Tensor, x: Tensor) -> Tensor:
    """A vector by channel, as a tensor that fits x."""
    return vector.reshape(1, -1, *[1] * (x.dim() - 2))


def zero_shift(layer: _BatchNorm) -> Shift:
    """δ = 0 of a layer, to be differentiated by."""
    return Shift(*(torch.zeros(layer.num_features).double().requires_grad_() for _ in Shift._fields))


def training_layers(model: nn.Module) -> dict[str, _BatchNorm]:
    """The layers that the method perturbs, under their first name."""
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, _BatchNorm) and layer.training}


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """What is differentiated, under its first name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def gradients_of(loss: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    """The gradient by each leaf; zero where the loss does not depend on it."""
    found = torch.autograd.grad(loss, leaves, allow_unused=True)
    return [torch.zeros_like(leaf) if grad is None else grad for leaf, grad in zip(leaves, found, strict=True)]


def loss_of(model: nn.Module, loss_fn: Loss, batch: tuple[Any, Any]) -> Tensor:
    """A forward, and the loss."""
    return loss_fn(run(model, batch[0]), fresh(batch[1]))


def run(model: nn.Module, inputs: Any) -> Any:
    """A forward on inputs of its own, since it may work in place: a dict holds keywords."""
    inputs = fresh(inputs)
    return model(**inputs) if isinstance(inputs, dict) else model(inputs)


def fresh(tree: Any) -> Any:
    """Copies of the tensors in nested dicts, tuples and lists."""
    return mapped(Tensor.clone, tree)


def pick(tree: Any, rows: list[int]) -> Any:
    """Some samples of every tensor that has a dimension."""
    return mapped(lambda leaf: leaf[rows] if leaf.dim() else leaf, tree)


def mapped(function: Callable[[Tensor], Any], tree: Any) -> Any:
    """A function of every tensor in nested dicts, tuples and lists."""
    if isinstance(tree, Tensor):
        return function(tree)
    if isinstance(tree, Mapping):
        return {key: mapped(function, value) for key, value in tree.items()}
    if isinstance(tree, tuple | list):
        return [mapped(function, value) for value in tree]
    return tree
