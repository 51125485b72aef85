"""The trees that travel between the parts: statistics, perturbations, batches, and what a pass or step returns.

Trees of the library are a `dict` keyed by layer or tensor name, or a `NamedTuple`, so that `torch.func` and
`torch.compile` see through them. Those of the user (batches and outputs) are whatever holds tensors: mappings,
sequences, named tuples and dataclasses, with leaves that need not be tensors.
"""

import copy
import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias, TypeVar

import torch
from torch import Tensor, nn

from apart_func._torch import is_traced
from apart_func.errors import BatchError, StateError
from apart_func.summary import summarised

Tensors: TypeAlias = dict[str, Tensor]


@summarised
class BatchStats(NamedTuple):
    """Batch statistics of one BN layer.

    Attributes:
        mean: batch mean μ, `(C,)`, or `(K, C)` for a layer called K > 1 times in one forward.
        var: biased batch variance σ², of the same shape.
    """

    mean: Tensor
    var: Tensor


@summarised
class Perturbation(NamedTuple):
    """Relative shifts of one BN layer's statistics: μ' = μ(1 + mean) and s' = s / (1 + scale).

    Attributes:
        mean: δμ, `(C,)`, or `(G, C)` for one shift in each ghost group.
        scale: δσ, of the same shape: a shift of the scale 1/s.
    """

    mean: Tensor
    scale: Tensor

    @property
    def var(self) -> Tensor:
        """The scale's shift, by the name of the statistic it acts on."""
        return self.scale


@summarised
class StatGrads(NamedTuple):
    """The gradient of a loss with respect to the relative shifts of one BN layer's statistics, at no shift.

    Attributes:
        mean: ∂L/∂δμ, `(C,)`, or `(G, C)` for one in each ghost group.
        scale: ∂L/∂δσ, of the same shape.
    """

    mean: Tensor
    scale: Tensor

    @property
    def var(self) -> Tensor:
        """The scale's gradient, by the name of the statistic it acts on."""
        return self.scale


StatTree: TypeAlias = dict[str, BatchStats]
StatGradTree: TypeAlias = dict[str, StatGrads]
PerturbationTree: TypeAlias = dict[str, Perturbation]


def constant(perturbation: Mapping[str, Perturbation]) -> PerturbationTree:
    """A perturbation that nothing is differentiated by."""
    return {layer: Perturbation(mean.detach(), scale.detach()) for layer, (mean, scale) in perturbation.items()}


def vectors(tree: Mapping[str, tuple[Tensor, Tensor]]) -> list[Tensor]:
    """The tensors of a tree of statistics, of their gradients, or of perturbations."""
    return [vector for of_layer in tree.values() for vector in of_layer]


def check_by_name(what: str, tree: Any) -> None:
    """Make sure that an argument is a dict by layer or tensor name.

    Raises:
        StateError: it is none, or holds something else than tensors, or pairs of them.
    """
    if not isinstance(tree, Mapping):
        raise StateError(f"{what} is a {type(tree).__name__}; expected a dict by name, as the library returns.")
    for name, value in tree.items():
        parts = value if isinstance(value, tuple) else (value,)
        if not all(isinstance(part, Tensor) for part in parts):
            raise StateError(f"{what}[{name!r}] is a {type(value).__name__}; expected a tensor, or a pair of them.")


@summarised
class ProxyOutput(NamedTuple):
    """What the proxy pass returns.

    Attributes:
        loss: L_p, 0-d.
        output: the model's output.
        grads: ∇L_p, keyed as `params`.
        buffers: the buffers after the pass.
        stats: batch statistics of every BN layer that was called.
        stat_grads: ∂L_p/∂δ of every BN layer in training mode, `(C,)` each; zero where the layer was not called.
    """

    loss: Tensor
    output: Any
    grads: Tensors
    buffers: Tensors
    stats: StatTree
    stat_grads: StatGradTree


@summarised
class AdversarialOutput(NamedTuple):
    """What the adversarial pass returns.

    Attributes:
        loss: L_a, 0-d.
        output: the model's output for the samples of the pass.
        grads: ∇L_a, keyed as `params`.
    """

    loss: Tensor
    output: Any
    grads: Tensors


@summarised
class MixedOutput(NamedTuple):
    """What the mixed pass returns.

    Attributes:
        loss: L_p, that of the clean samples, 0-d.
        adversarial_loss: L_a, that of the perturbed ones.
        output: the model's output, of all samples.
        grads: r ∇L_p + (1 − r) ∇L_a, with r the share of clean groups; keyed as `params`.
        buffers: the buffers after the pass.
        stats: batch statistics of the clean samples, of every BN layer that was called.
        stat_grads: gradients of r L_p + (1 − r) L_a by the relative shifts of each ghost group, `(G, C)` each, for
            every BN layer in training mode.
    """

    loss: Tensor
    adversarial_loss: Tensor
    output: Any
    grads: Tensors
    buffers: Tensors
    stats: StatTree
    stat_grads: StatGradTree

    @property
    def loss_gap(self) -> Tensor:
        """L_a − L_p, 0-d: by how much the perturbation raises the loss, as far as both sets of samples are alike."""
        return self.adversarial_loss - self.loss


@summarised
class StepOutput(NamedTuple):
    """What a training step returns.

    Attributes:
        grads: r ∇L_p + (1 − r) ∇L_a, keyed as `params`.
        buffers: the buffers after the step, or those that came in where `all_finite` is False.
        loss: L_p, the clean loss, 0-d.
        adversarial_loss: L_a, 0-d.
        output: the model's output in the proxy pass; in a one-pass step that of all samples, clean and perturbed.
        stats: batch statistics of the proxy pass, or of the clean samples.
        stat_grads: gradients of L_p with respect to the relative shifts.
        perturbation: δ of the adversarial pass; from a one-pass step, δ for the next one, or that of the step if it was
            drawn there.
        all_finite: 0-d bool, whether both losses, all gradients and δ are finite.
    """

    grads: Tensors
    buffers: Tensors
    loss: Tensor
    adversarial_loss: Tensor
    output: Any
    stats: StatTree
    stat_grads: StatGradTree
    perturbation: PerturbationTree
    all_finite: Tensor

    @property
    def loss_gap(self) -> Tensor:
        """L_a − L_p, 0-d: by how much perturbed ghost groups have a higher loss; in one pass, of other samples."""
        return self.adversarial_loss - self.loss


Named = TypeVar("Named", bound=NamedTuple)


def replaced(parts: Named, **changes: Any) -> Named:
    """A named tuple with other values in some places: `_replace`, in words that Dynamo of torch 2.8 traces."""
    kind = type(parts)
    return kind(*[changes.get(name, value) for name, value in zip(kind._fields, parts, strict=True)])


def input_and_target(batch: Any) -> tuple[Any, Any]:
    """The two parts of a batch.

    Raises:
        BatchError: it is no pair.
    """
    if not (isinstance(batch, (tuple, list)) and len(batch) == 2):
        given = f"a {type(batch).__name__}" + (f" of {len(batch)}" if isinstance(batch, (tuple, list)) else "")
        raise BatchError(f"the batch is {given}; expected (input, target).")
    return batch[0], batch[1]


def batch_size(batch: Any) -> int:
    """The number of samples M: the length that every tensor with a dimension shares.

    Raises:
        BatchError: there is no such tensor, or their lengths differ.
    """
    lengths = [leaf.shape[0] for leaf in tensors_of(batch) if leaf.dim()]
    if not lengths:
        raise BatchError(
            "the batch holds no tensor with a dimension, so it has no samples. Pass batch=(input, target)."
        )
    if any(length != lengths[0] for length in lengths):
        raise BatchError(
            f"the tensors of the batch have lengths {lengths} on dim 0, and must agree: one entry a sample. "
            "Pass what belongs to no sample as a 0-d tensor or in the loss function's closure."
        )
    return int(lengths[0])


def cut_batch(batch: Any, start: int, stop: int) -> Any:
    """Samples `start` to `stop` of a batch; leaves without a dimension are passed whole."""
    return map_tensors(lambda leaf: leaf[start:stop] if leaf.dim() else leaf, batch)


def map_tensors(function: Callable[..., Any], tree: Any, *others: Any) -> Any:
    """Apply a function to every tensor of a tree, together with those at the same place in trees of the same structure.

    Leaves that are not tensors are those of the first tree.
    """
    if isinstance(tree, Tensor):
        return function(tree, *others)
    if isinstance(tree, Mapping):
        values = {key: map_tensors(function, tree[key], *(other[key] for other in others)) for key in tree}
        return values if type(tree) is dict else _mapping_like(tree, values)
    if isinstance(tree, (tuple, list)):
        items = [map_tensors(function, *of_item) for of_item in zip(tree, *others, strict=True)]
        return type(tree)(*items) if hasattr(tree, "_fields") else type(tree)(items)
    if _is_dataclass(tree):
        made = copy.copy(tree)
        for field in dataclasses.fields(tree):
            of_field = [getattr(one, field.name) for one in (tree, *others)]
            object.__setattr__(made, field.name, map_tensors(function, *of_field))
        return made
    return tree


def _is_dataclass(tree: Any) -> bool:
    if tree is None or isinstance(tree, (int, float, str, type)):  # Dynamo of torch 2.8 cannot ask these
        return False
    return dataclasses.is_dataclass(tree)


def _mapping_like(tree: Any, values: dict[Any, Any]) -> Any:
    try:
        made = copy.copy(tree)
        for key, value in values.items():
            made[key] = value
    except TypeError:  # it cannot be copied, or not be written to
        return values
    return made


def tensors_of(tree: Any) -> list[Tensor]:
    """The tensors of a tree, in order."""
    if isinstance(tree, Tensor):
        return [tree]
    if isinstance(tree, Mapping):
        children = [tree[key] for key in tree]
    elif isinstance(tree, (tuple, list)):
        children = list(tree)
    elif _is_dataclass(tree):
        children = [getattr(tree, field.name) for field in dataclasses.fields(tree)]
    else:
        return []
    return [leaf for child in children for leaf in tensors_of(child)]


def with_tensors(tree: Any, tensors: list[Tensor]) -> Any:
    """The same tree with other tensors, in the order of `tensors_of`."""
    left = iter(tensors)
    return map_tensors(lambda _: next(left), tree)


def detached(tree: Any) -> Any:
    """A tree of the same tensors, cut from every graph."""
    return map_tensors(torch.Tensor.detach, tree)


def stack_by_layer(trees: list[dict[str, Any]]) -> dict[str, Any]:
    """Trees by layer as one, with a new leading dimension: a layer's is as long as the trees that have it."""
    found: dict[str, list[Any]] = {}
    for tree in trees:
        for layer, of_layer in tree.items():
            found.setdefault(layer, []).append(of_layer)
    return {layer: stacked(parts) for layer, parts in found.items()}


def stacked(trees: list[Any]) -> Any:
    """One tree of stacked tensors, with a new leading dimension, from trees of one structure."""
    return map_tensors(lambda *leaves: torch.stack(leaves), *trees)


def concatenated(trees: list[Any]) -> Any:
    """One tree of tensors joined on dim 0, from trees of one structure; tensors without a dimension are stacked."""
    return map_tensors(lambda *leaves: torch.cat(leaves) if leaves[0].dim() else torch.stack(leaves), *trees)


# Up to here, tensors are looked at together: it costs less to copy them than to start an operator for each.
FEW = 2**14


@torch.no_grad()
def all_finite(tensors: Iterable[Tensor]) -> Tensor:
    """Whether no tensor holds an infinity or NaN, as a 0-d bool; no host waits for a device."""
    kept = [torch.view_as_real(tensor) if tensor.is_complex() else tensor for tensor in tensors if tensor.numel()]
    if not kept:
        return torch.tensor(True)
    if is_traced():
        return torch.stack([tensor.isfinite().all() for tensor in kept]).all()
    small = [tensor.flatten() for tensor in kept if tensor.numel() <= FEW]
    parts = ([torch.cat(small)] if small else []) + [tensor for tensor in kept if tensor.numel() > FEW]
    # A sum takes half the time of both bounds. It shows every infinity and NaN, and may overflow by itself.
    if all(type(part) in (Tensor, nn.Parameter) and part.device.type == "cpu" for part in parts):
        sums = _all_finite([part.sum() for part in parts])
        if sums:
            return sums
    # A NaN is the least and the greatest of the values that it is among.
    return _all_finite([bound for part in parts for bound in torch.aminmax(part)])


def _all_finite(scalars: Sequence[Tensor]) -> Tensor:
    return torch.stack([scalar.to(torch.float64) for scalar in scalars]).isfinite().all()
