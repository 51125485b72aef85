"""Reduction over the ranks of a process group, so that each of them finds the same perturbation."""

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_flatten, tree_unflatten

from apart_func.trees import StatGradTree


def mean_over_ranks(stat_grads: StatGradTree, group: "dist.ProcessGroup | None" = None) -> StatGradTree:
    """Average statistic gradients, in one collective call for all layers.

    Args:
        stat_grads: this rank's gradients; every rank has the same layers.
        group: the ranks; None is all of them.

    Returns:
        The same tree on every rank.
    """
    leaves, structure = tree_flatten(stat_grads)
    flat = torch.cat([leaf.flatten() for leaf in leaves])
    dist.all_reduce(flat, group=group)
    parts = torch.split(flat / dist.get_world_size(group), [leaf.numel() for leaf in leaves])
    means: StatGradTree = tree_unflatten(
        [part.view_as(leaf) for part, leaf in zip(parts, leaves, strict=True)], structure
    )
    return means


def data_parallel_group(model: nn.Module) -> "dist.ProcessGroup | None":
    """The process group of the `DistributedDataParallel` that a model is, or holds; None without one."""
    wrappers = (module for module in model.modules() if isinstance(module, DistributedDataParallel))
    return next((wrapper.process_group for wrapper in wrappers), None)
