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
from torch import Tensor

from apart_func._torch import is_concrete
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


def detach_perturbation(perturbation: Mapping[str, Perturbation]) -> PerturbationTree:
    """Return a perturbation that nothing is differentiated by."""
    return {layer: Perturbation(mean.detach(), scale.detach()) for layer, (mean, scale) in perturbation.items()}


def leaves(tree: Mapping[str, tuple[Tensor, Tensor]]) -> list[Tensor]:
    """Return the tensors of a tree of statistics, of their gradients, or of perturbations."""
    return [vector for of_layer in tree.values() for vector in of_layer]


def statistics_kind(params: Mapping[str, Tensor]) -> tuple[torch.dtype, torch.device]:
    """Return dtype and device of a model's statistics: float64 if a parameter is, else float32."""
    wide = any(tensor.dtype in (torch.float64, torch.complex128) for tensor in params.values())
    return torch.float64 if wide else torch.float32, next(iter(params.values())).device


def zero_perturbation(layers: Mapping[str, int], dtype: torch.dtype, device: torch.device) -> PerturbationTree:
    """Return no perturbation, `(C,)`, of layers with C channels."""
    return {
        name: Perturbation(*(torch.zeros(channels, dtype=dtype, device=device) for _ in range(2)))
        for name, channels in layers.items()
    }


def check_named_tensors(what: str, tree: Any) -> None:
    """Raise a StateError if an argument is no dict of tensors, or of pairs of them, by name."""
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
        stat_grads: ∂L_p/∂δ of every BN layer in training mode, `(C,)` each; zero if the layer was not called.
        aux: what the loss function returned besides the loss; () if nothing.
    """

    loss: Tensor
    output: Any
    grads: Tensors
    buffers: Tensors
    stats: StatTree
    stat_grads: StatGradTree
    aux: Any = ()


@summarised
class AdversarialOutput(NamedTuple):
    """What the adversarial pass returns.

    Attributes:
        loss: L_a, 0-d.
        output: the model's output for the samples of the pass.
        grads: ∇L_a, keyed as `params`.
        stats: batch statistics of every ghost group of every layer that was called, `(G, C)`: `perturbed_stats(stats,
            δ)` is what the pass normalised by.
        stat_grads: ∂L_a/∂δ at δ, of its shape; empty if they were not wanted.
        aux: what the loss function returned besides the loss; () if nothing.
    """

    loss: Tensor
    output: Any
    grads: Tensors
    stats: StatTree
    stat_grads: StatGradTree
    aux: Any = ()


@summarised
class MixedOutput(NamedTuple):
    """What the mixed pass returns.

    Attributes:
        loss: L_p, that of the clean samples, 0-d; that of all if the loss couples samples, or has no entry a sample.
        adversarial_loss: L_a, that of the perturbed ones, likewise.
        output: the model's output, of all samples.
        grads: gradient of the loss of the whole batch, keyed as `params`: r ∇L_p + (1 − r) ∇L_a, with r the share of
            clean groups, if the loss is a mean over samples.
        buffers: the buffers after the pass.
        stats: batch statistics of the clean samples, of every BN layer that was called.
        stat_grads: gradients of r L_p + (1 − r) L_a by the relative shifts of each ghost group, `(G, C)` each, for
            every BN layer in training mode; empty if they were not wanted.
        adversarial_stats: batch statistics of every perturbed ghost group, `(G', C)`.
        batch_loss: the loss of the whole batch, 0-d, which is differentiated.
        aux: what the loss function returned besides it.
    """

    loss: Tensor
    adversarial_loss: Tensor
    output: Any
    grads: Tensors
    buffers: Tensors
    stats: StatTree
    stat_grads: StatGradTree
    adversarial_stats: StatTree
    batch_loss: Tensor
    aux: Any = ()

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
        stat_grads: gradients of L_p with respect to the relative shifts; empty in a one-pass step of random signs.
        perturbation: δ of the adversarial pass. From a one-pass step whose rule needs gradients, δ for the next one.
        adversarial_stats: batch statistics of every ghost group of the adversarial pass, `(G, C)`:
            `perturbed_stats(adversarial_stats, δ)` is what it normalised by.
        all_finite: 0-d bool, whether the losses, all gradients and δ are finite.
        aux: what the loss function returned besides the loss of the proxy pass, or of the whole batch in one pass.
    """

    grads: Tensors
    buffers: Tensors
    loss: Tensor
    adversarial_loss: Tensor
    output: Any
    stats: StatTree
    stat_grads: StatGradTree
    perturbation: PerturbationTree
    adversarial_stats: StatTree
    all_finite: Tensor
    aux: Any = ()

    @property
    def loss_gap(self) -> Tensor:
        """L_a − L_p, 0-d: by how much perturbed ghost groups have a higher loss; in one pass, of other samples."""
        return self.adversarial_loss - self.loss


Named = TypeVar("Named", bound=NamedTuple)


def replace(parts: Named, **changes: Any) -> Named:
    """Return a named tuple with other values in some places: `_replace`, in words that Dynamo of torch 2.8 traces."""
    kind = type(parts)
    return kind(*[changes.get(name, value) for name, value in zip(kind._fields, parts, strict=True)])


def input_and_target(batch: Any) -> tuple[Any, Any]:
    """Return the two parts of a batch; raise a BatchError if it is no pair."""
    if not (isinstance(batch, (tuple, list)) and len(batch) == 2):
        given = f"a {type(batch).__name__}" + (f" of {len(batch)}" if isinstance(batch, (tuple, list)) else "")
        raise BatchError(f"the batch is {given}; expected (input, target).")
    return batch[0], batch[1]


def children(tree: Any) -> list[Any] | None:
    """Return the parts of a container of a kind that trees are made of; None for a leaf."""
    if isinstance(tree, Mapping):
        return [tree[key] for key in tree]
    if isinstance(tree, (tuple, list)):
        return list(tree)
    if _is_dataclass(tree):
        return [getattr(tree, field.name) for field in dataclasses.fields(tree)]
    return None


def with_children(tree: Any, parts: list[Any]) -> Any:
    """Return a container like another one, of other parts; a mapping that cannot be copied or written to is a dict."""
    if isinstance(tree, (tuple, list)):
        return type(tree)(*parts) if hasattr(tree, "_fields") else type(tree)(parts)
    if type(tree) is dict:
        return dict(zip(tree, parts, strict=True))
    if not isinstance(tree, Mapping):
        like = copy.copy(tree)
        for field, part in zip(dataclasses.fields(tree), parts, strict=True):
            object.__setattr__(like, field.name, part)
        return like
    try:
        made: Any = copy.copy(tree)
        for key, part in zip(tree, parts, strict=True):
            made[key] = part
    except TypeError:
        return dict(zip(tree, parts, strict=True))
    return made


def _is_dataclass(tree: Any) -> bool:
    if tree is None or isinstance(tree, (int, float, str, type)):  # Dynamo of torch 2.8 cannot ask these
        return False
    return dataclasses.is_dataclass(tree)


def map_tensors(function: Callable[..., Any], tree: Any, *others: Any) -> Any:
    """Apply a function to every tensor of a tree, together with those at the same place in trees of the same structure.

    Leaves that are not tensors are those of the first tree.
    """
    if isinstance(tree, Tensor):
        return function(tree, *others)
    parts = children(tree)
    if parts is None:
        return tree
    if isinstance(tree, Mapping):
        of_others = [[other[key] for key in tree] for other in others]
    else:
        of_others = [children(other) or [] for other in others]
    return with_children(tree, [map_tensors(function, *same) for same in zip(parts, *of_others, strict=True)])


def tensors_of(tree: Any) -> list[Tensor]:
    """Return the tensors of a tree, in order."""
    if isinstance(tree, Tensor):
        return [tree]
    return [leaf for child in children(tree) or () for leaf in tensors_of(child)]


def with_tensors(tree: Any, tensors: list[Any]) -> Any:
    """Return the same tree with other tensors, in the order of `tensors_of`."""
    left = iter(tensors)
    return map_tensors(lambda _: next(left), tree)


def detached(tree: Any) -> Any:
    """Return a tree of the same tensors, cut from every graph."""
    return map_tensors(lambda tensor: tensor.detach() if tensor.requires_grad else tensor, tree)


def copied(tree: Any) -> Any:
    """Return a tree of copies of the tensors, but for sparse and nested ones."""
    return map_tensors(lambda t: t.clone() if t.layout == torch.strided and not t.is_nested else t, tree)


def stack_calls(calls: Mapping[str, Sequence[BatchStats]]) -> StatTree:
    """Return statistics of the calls of every layer as one tree; a layer called K > 1 times gets a leading K."""
    return {layer: stats[0] if len(stats) == 1 else stack_trees(stats) for layer, stats in calls.items()}


def stack_by_layer(trees: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return trees by layer as one, with a new leading dimension: a layer's is as long as the trees that have it."""
    found: dict[str, list[Any]] = {}
    for tree in trees:
        for layer, of_layer in tree.items():
            found.setdefault(layer, []).append(of_layer)
    return {layer: stack_trees(parts) for layer, parts in found.items()}


def stack_trees(trees: Sequence[Any]) -> Any:
    """Return one tree of stacked tensors, from trees of one structure.

    Tensors of unlike shapes, as of a layer that one part calls more often, are joined instead, `(K, C)` after `(C,)`.
    """
    return map_tensors(_stacked, *trees)


def _stacked(*tensors: Tensor) -> Tensor:
    if all(tensor.shape == tensors[0].shape for tensor in tensors):
        return torch.stack(tensors)
    dims = max(tensor.dim() for tensor in tensors)
    return torch.cat([tensor if tensor.dim() == dims else tensor.unsqueeze(0) for tensor in tensors])


def concatenate(trees: Sequence[Any], lists_numbers: bool = False) -> Any:
    """Return one tree of tensors joined on dim 0, from trees of one structure; 0-d tensors are stacked.

    Lists without tensors are joined, and numbers become lists if wanted. Other leaves are those of the first tree.
    """
    first, parts = trees[0], children(trees[0])
    if isinstance(first, Tensor):
        return torch.cat(list(trees)) if first.dim() else torch.stack(list(trees))
    if parts is None:
        return list(trees) if lists_numbers and type(first) in (int, float) else first
    if isinstance(first, list) and not tensors_of(first):
        return [entry for tree in trees for entry in tree]
    of_trees = [[tree[key] for key in first] if isinstance(first, Mapping) else children(tree) or [] for tree in trees]
    return with_children(first, [concatenate(same, lists_numbers) for same in zip(*of_trees, strict=True)])


def dense_values(tensor: Tensor) -> Tensor:
    """Return the values of a tensor that may be sparse or complex, as a dense real one."""
    if tensor.is_sparse:
        tensor = tensor.coalesce().values()
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


# Up to here, tensors are looked at together: it costs less to copy them than to start an operator for each.
SMALL_NUMEL = 2**14


@torch.no_grad()
def all_finite(tensors: Iterable[Tensor]) -> Tensor:
    """Return whether no tensor holds an infinity or NaN, as a 0-d bool; no host waits for a device."""
    kept = [dense_values(tensor) for tensor in tensors if tensor.numel()]
    if not kept:
        return torch.tensor(True)
    small = [tensor.flatten() for tensor in kept if tensor.numel() <= SMALL_NUMEL]
    parts = ([torch.cat(small)] if small else []) + [tensor for tensor in kept if tensor.numel() > SMALL_NUMEL]
    # On a CPU a sum takes half the time of a maximum. It shows every infinity and NaN, and may overflow by itself.
    if is_concrete(parts[0]) and parts[0].device.type == "cpu":
        sums = _all_finite([part.sum() for part in parts])
        if sums:
            return sums
    return _all_finite([part.abs().amax() for part in parts])


def _all_finite(scalars: Sequence[Tensor]) -> Tensor:
    kinds = {scalar.dtype for scalar in scalars}
    return torch.stack(list(scalars) if len(kinds) == 1 else [s.to(torch.float64) for s in scalars]).isfinite().all()


Tree = TypeVar("Tree")


def where_tree(condition: Tensor, new: Tree, old: Tree) -> Tree:
    """Return `new` if the condition holds, else `old`, leaf by leaf; the host waits for no device."""
    if is_concrete(condition) and condition.device.type == "cpu":
        return new if condition else old

    def of_leaf(one: Tensor, other: Tensor) -> Tensor:
        return one if one is other else torch.where(condition, one, other)

    chosen: Tree = map_tensors(of_leaf, new, old)
    return chosen
