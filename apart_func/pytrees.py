"""The trees that travel between the parts: statistics, perturbations, batches, and what a pass or step returns.

Every tree is a `dict` keyed by layer or tensor name, or a `NamedTuple`, so that `torch.func` and `torch.compile`
see through it.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from apart_func.errors import BatchError

Tensors: TypeAlias = dict[str, Tensor]


class BatchStats(NamedTuple):
    """Batch statistics of one BN layer, or the loss's gradient with respect to their relative shifts.

    Attributes:
        mean: batch mean μ, `(C,)`, or `(K, C)` for a layer called K > 1 times in one forward.
        var: biased batch variance σ², of the same shape.
    """

    mean: Tensor
    var: Tensor


class Perturbation(NamedTuple):
    """Relative shifts of one BN layer's statistics: μ' = μ(1 + mean) and s' = s / (1 + var).

    Attributes:
        mean: δμ, `(C,)`, or `(G, C)` for one shift in each ghost group.
        var: δσ, of the same shape.
    """

    mean: Tensor
    var: Tensor


StatTree: TypeAlias = dict[str, BatchStats]
PerturbationTree: TypeAlias = dict[str, Perturbation]


def constant(perturbation: PerturbationTree) -> PerturbationTree:
    """A perturbation that nothing is differentiated by."""
    return {layer: Perturbation(shift.mean.detach(), shift.var.detach()) for layer, shift in perturbation.items()}


def vectors(tree: StatTree) -> list[Tensor]:
    """The tensors of a tree of statistics or of their gradients."""
    return [vector for of_layer in tree.values() for vector in of_layer]


class ProxyOutput(NamedTuple):
    """What the proxy pass returns.

    Attributes:
        loss: L_p, 0-d.
        output: the model's output.
        grads: ∇L_p, keyed as `params`.
        buffers: the buffers after the pass.
        stats: batch statistics of every BN layer that was called.
        stat_grads: ∂L_p/∂δ of every BN layer in training mode, `(C,)` each.
    """

    loss: Tensor
    output: Any
    grads: Tensors
    buffers: Tensors
    stats: StatTree
    stat_grads: StatTree


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
    stat_grads: StatTree


class StepOutput(NamedTuple):
    """What a step returns.

    With `microbatches` k > 1, losses and gradients are means over the micro-batches, outputs are concatenated, and
    `stats`, `stat_grads` and `perturbation` gain a leading dimension of size k; a one-pass step has one perturbation.

    Attributes:
        grads: r ∇L_p + (1 − r) ∇L_a, keyed as `params`.
        buffers: the buffers after the step, or those that came in where `all_finite` is False.
        loss: L_p, the clean loss, 0-d.
        adversarial_loss: L_a, 0-d.
        output: the model's output in the proxy pass; in a one-pass step that of all samples, clean and perturbed.
        stats: batch statistics of the proxy pass, or of the clean samples.
        stat_grads: gradients of L_p with respect to the relative shifts.
        perturbation: δ of the adversarial pass; from a one-pass step, δ for the next one.
        all_finite: 0-d bool, whether both losses and all gradients are finite.
    """

    grads: Tensors
    buffers: Tensors
    loss: Tensor
    adversarial_loss: Tensor
    output: Any
    stats: StatTree
    stat_grads: StatTree
    perturbation: PerturbationTree
    all_finite: Tensor


def input_and_target(batch: Any) -> tuple[Any, Any]:
    """The two parts of a batch.

    Raises:
        BatchError: it is no pair.
    """
    if not (isinstance(batch, tuple | list) and len(batch) == 2):
        given = f"a {type(batch).__name__}" + (f" of {len(batch)}" if isinstance(batch, tuple | list) else "")
        raise BatchError(f"the batch is {given}; expected (input, target).")
    return batch[0], batch[1]


def batch_size(batch: Any) -> int:
    """The number of samples M: the length that every tensor with a dimension shares.

    Raises:
        BatchError: there is no such tensor, or their lengths differ.
    """
    lengths = [leaf.shape[0] for leaf in tree_leaves(batch) if _is_cut(leaf)]
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
    return tree_map(lambda leaf: leaf[start:stop] if _is_cut(leaf) else leaf, batch)


def cut_groups(tree: Any, groups: int, start: int, stop: int) -> Any:
    """Samples of ghost groups `start` to `stop`, where sample i is in group i mod `groups`; as `cut_batch` else."""

    def of_groups(leaf: Tensor) -> Tensor:
        grouped: Tensor = leaf.unflatten(0, (-1, groups))
        return grouped[:, start:stop].flatten(0, 1)

    return tree_map(lambda leaf: of_groups(leaf) if _is_cut(leaf) else leaf, tree)


def tree_leaves(tree: Any) -> list[Any]:
    """The leaves of a tree, in order."""
    return tree_flatten(tree)[0]


def detached(tree: Any) -> Any:
    """A tree of the same tensors, cut from every graph."""
    return tree_map(lambda leaf: leaf.detach() if isinstance(leaf, Tensor) else leaf, tree)


def stack_trees(trees: list[Any]) -> Any:
    """One tree of stacked leaves, with a new leading dimension, from trees of one structure."""
    return merge_trees(trees, torch.stack)


def concatenate_trees(trees: list[Any]) -> Any:
    """One tree of leaves joined on dim 0, from trees of one structure; leaves without a dimension are stacked."""
    return merge_trees(trees, lambda leaves: torch.cat(leaves) if leaves[0].dim() else torch.stack(leaves))


def merge_trees(trees: list[Any], merge: Callable[[list[Tensor]], Tensor]) -> Any:
    """One tree from trees of one structure, whose leaves are made of theirs."""
    leaves = [tree_leaves(tree) for tree in trees]
    return tree_unflatten([merge(list(same)) for same in zip(*leaves, strict=True)], tree_flatten(trees[0])[1])


def _is_cut(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.dim() > 0
