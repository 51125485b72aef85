"""What the ranks of a process group do together, so that each of them takes the same step.

    Ranks                 one process: every reduction is the identity
    GroupRanks            a process group: one all-reduce a δ, one a step, and a check, once, that ranks agree
    synchronisation       SyncBatchNorm: the moments of a layer over all ranks, differentiably

Ranks weigh alike, as in DistributedDataParallel. A collective call that fails is a `RanksError` on every rank that is left:
at once if a rank is gone, after the timeout of the process group if one hangs. (With NCCL, PyTorch's watchdog may end the
process before, and says why.)
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_flatten, tree_unflatten

from apart_func._torch import is_compiling, is_traced
from apart_func.batch_norm import statistics_dtype
from apart_func.errors import ModelError, RanksError, SettingError
from apart_func.trees import (
    BatchStats,
    Perturbation,
    PerturbationTree,
    StatGrads,
    StatGradTree,
    StatTree,
    StepOutput,
    Tensors,
    leaves,
    replace,
    tensors_of,
)

# Settings of `process_group` besides a ProcessGroup and None.
WORLD, LOCAL = "world", "local"


# Which ranks.


def check_process_group(setting: Any) -> None:
    """Make sure that `process_group` is a valid setting.

    Raises:
        SettingError: it is not.
    """
    if setting is None or setting in (WORLD, LOCAL):
        return
    if not (dist.is_available() and isinstance(setting, dist.ProcessGroup)):
        raise SettingError(
            f"process_group={setting!r}; expected a ProcessGroup of this rank, 'world', 'local' or None."
        )


def group_of(setting: Any) -> dist.ProcessGroup | None:
    """Return the ranks to reduce over for a setting of `process_group`; None if there is no other rank.

    Raises:
        SettingError: it is "world", and no process group was initialised.
    """
    if setting is None or setting == LOCAL:
        return None
    if setting == WORLD and not has_world():
        raise SettingError(
            "process_group='world', and no process group is initialised. Call torch.distributed.init_process_group "
            "first, or leave process_group=None in a program of one process."
        )
    group = dist.group.WORLD if setting == WORLD else setting
    return group if dist.get_world_size(group) > 1 else None


def has_world() -> bool:
    """Return whether a process group was initialised."""
    return dist.is_available() and dist.is_initialized()


def group_of_module(setting: Any, model: nn.Module) -> tuple[dist.ProcessGroup | None, bool]:
    """Return the ranks to average over in a loop of the user's, and whether that is a guess.

    Args:
        setting: of `process_group`; None takes those of the DistributedDataParallel that the model is or holds, and the
            world's if there is none.
        model: as the user passed it.
    """
    if setting is not None or not has_world():
        return group_of(setting), False
    wrapped = data_parallel_group(model)
    group = group_of(WORLD if wrapped is None else wrapped)
    return group, wrapped is None and group is not None


def data_parallel_group(model: nn.Module) -> dist.ProcessGroup | None:
    """Return the process group of the `DistributedDataParallel` that a model is, or holds; None without one."""
    wrappers = (module for module in model.modules() if isinstance(module, DistributedDataParallel))
    return next((wrapper.process_group for wrapper in wrappers), None)


# Collective calls.


@contextmanager
def _collective() -> Iterator[None]:
    """Say what it means that a collective call fails."""
    try:
        yield
    except RuntimeError as error:
        problem, *_ = str(error).splitlines() or ["no reason given"]
        raise RanksError(
            f"rank {dist.get_rank()} waited for the other ranks in vain ({problem}). One of them is gone, hangs, or "
            "runs another program, such as a step that others do not take: look at its own error."
        ) from error


class _Sum(torch.autograd.Function):
    """The sum over ranks, as an operation that is differentiated: its gradient is the sum of the ranks' gradients.

    PyTorch's own differentiable all-reduce is deprecated in one place, and knows no torch.func in the other.
    """

    @staticmethod
    def forward(tensor: Tensor, group: Any) -> Tensor:
        total = tensor.clone(memory_format=torch.contiguous_format)
        with _collective():
            dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, ctx.group = inputs

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        return _Sum.apply(grad, ctx.group), None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], tensor: Tensor, group: Any) -> tuple[Tensor, int | None]:
        return _Sum.apply(tensor, group), in_dims[0]


def all_reduce_sum(fresh: Tensor, group: Any) -> Tensor:
    """Return the sum over ranks of a tensor that nobody else holds and nothing is differentiated by."""
    if is_compiling():
        dist.all_reduce(fresh, group=group)
        return fresh
    if is_traced():
        return _Sum.apply(fresh, group)  # type: ignore[no-any-return]  # torch types no apply
    with _collective():
        dist.all_reduce(fresh, group=group)
    return fresh


def all_reduce_mean(tensors: Sequence[Tensor], group: Any) -> list[Tensor]:
    """Return the mean of every tensor over ranks, bit-equal on all: one all-reduce for all tensors of a dtype."""
    ranks, found = dist.get_world_size(group), [tensor.to_dense() if tensor.is_sparse else tensor for tensor in tensors]
    for dtype in dict.fromkeys(tensor.dtype for tensor in found):
        places = [place for place, tensor in enumerate(found) if tensor.dtype == dtype]
        # Divided first, as DistributedDataParallel does: a sum of half-precision gradients may overflow.
        flat = all_reduce_sum(torch.cat([found[place].reshape(-1) for place in places]) / ranks, group)
        parts = flat.split([found[place].numel() for place in places])
        for place, part in zip(places, parts, strict=True):
            found[place] = part.view(found[place].shape)
    return found


def mean_over_ranks(stat_grads: StatGradTree, group: dist.ProcessGroup | None = None) -> StatGradTree:
    """Average statistic gradients, in one collective call for all layers.

    Args:
        stat_grads: this rank's gradients; every rank has the same layers.
        group: the ranks; None is all of them.

    Returns:
        The same tree on every rank.
    """
    parts, structure = tree_flatten(stat_grads)
    means: StatGradTree = tree_unflatten(all_reduce_mean(parts, group), structure)
    return means


# A step on several ranks.


class CalledLayers(NamedTuple):
    """What ranks know together of the layers of a pass.

    Attributes:
        stats: batch statistics of the layers that a rank called, `(C,)`: the mean over the calls of all ranks.
        stat_grads: their gradients, the mean over all ranks.
        calls: on how many ranks each was called, `(C,)` of equal numbers; empty in one process.
    """

    stats: StatTree
    stat_grads: StatGradTree
    calls: Mapping[str, Tensor]

    def update(self, before: PerturbationTree, found: PerturbationTree) -> PerturbationTree:
        """Return the perturbation that was found of layers that a rank called, and that before of the others."""
        if not self.calls:
            return {**before, **found}
        return {
            layer: Perturbation(*(torch.where(calls > 0, new, old) for new, old in zip(*pairs, strict=True)))
            for layer, calls in self.calls.items()
            for pairs in [(found[layer], before[layer])]
        }


class Ranks:
    """The ranks that take a step together: one process, in which every reduction is the identity."""

    def called_layers(self, stats: StatTree, stat_grads: StatGradTree) -> tuple[CalledLayers, StatGradTree]:
        """Average statistics and their gradients over ranks.

        Args:
            stats: this rank's, of the layers that were called here: ranks may call different ones.
            stat_grads: this rank's, of all layers, with any leading dimensions.

        Returns:
            Those of the layers that were called, and the averaged gradients of all layers.
        """
        return CalledLayers(stats, {layer: g for layer, g in stat_grads.items() if layer in stats}, {}), stat_grads

    def mean_stat_grads(self, stat_grads: StatGradTree) -> StatGradTree:
        """Average statistic gradients over ranks."""
        return stat_grads

    def mean_gradients(self, grads: Tensors) -> Tensors:
        """Average gradients of parameters over ranks."""
        return grads

    def of_first(self, perturbation: PerturbationTree) -> PerturbationTree:
        """Return the perturbation that the first rank has drawn, on all of them."""
        return perturbation

    def mean_output(self, out: StepOutput, before: Tensors, moving: Iterable[str]) -> StepOutput:
        """Average what a step returns over ranks.

        Args:
            out: this rank's.
            before: the buffers that the step began with, equal on all ranks.
            moving: names of the buffers that are averaged, those of them that are there.

        Returns:
            The same with gradients, losses and buffers averaged, and `all_finite` only if it is on every rank. Buffers
            of integers, the output and the batch statistics stay this rank's.
        """
        return out

    def check(self, check: ConsistencyCheck, described: Described) -> None:
        """Compare, once, what ranks have to have in common."""


class GroupRanks(Ranks):
    """The ranks of a process group of more than one."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group = group

    def called_layers(self, stats: StatTree, stat_grads: StatGradTree) -> tuple[CalledLayers, StatGradTree]:
        """See `Ranks`: one all-reduce."""
        zero = {layer: torch.zeros_like(g.mean).reshape(-1, g.mean.shape[-1])[0] for layer, g in stat_grads.items()}
        here = {
            layer: BatchStats(*(part.to(none.dtype).reshape(-1, none.shape[0]).mean(0) for part in stats[layer]))
            if layer in stats
            else BatchStats(none, none)
            for layer, none in zero.items()
        }
        called = [none + 1 if layer in stats else none for layer, none in zero.items()]
        parts = [*leaves(stat_grads), *leaves(here), *called]
        sums = self._sums(parts)
        count, ranks = len(zero), dist.get_world_size(self._group)
        of_grads, of_stats, calls = sums[: 2 * count], sums[2 * count : 4 * count], sums[4 * count :]
        grads = {
            layer: StatGrads(*(part / ranks for part in pair))
            for layer, pair in zip(zero, _pairs(of_grads), strict=True)
        }
        means = {
            layer: BatchStats(*(part / times.clamp(min=1) for part in pair))
            for layer, pair, times in zip(zero, _pairs(of_stats), calls, strict=True)
        }
        return CalledLayers(means, grads, dict(zip(zero, calls, strict=True))), grads

    def mean_stat_grads(self, stat_grads: StatGradTree) -> StatGradTree:
        """See `Ranks`."""
        return mean_over_ranks(stat_grads, self._group)

    def mean_gradients(self, grads: Tensors) -> Tensors:
        """See `Ranks`: one all-reduce."""
        return dict(zip(grads, all_reduce_mean(list(grads.values()), self._group), strict=True))

    def of_first(self, perturbation: PerturbationTree) -> PerturbationTree:
        """See `Ranks`: a sum in which other ranks have zeros."""
        own = [part.detach() for part in leaves(perturbation)]
        is_first = dist.get_rank(self._group) == 0
        parts = self._sums(own if is_first else [torch.zeros_like(part) for part in own])
        return dict(zip(perturbation, map(Perturbation._make, _pairs(parts)), strict=True))

    def mean_output(self, out: StepOutput, before: Tensors, moving: Iterable[str]) -> StepOutput:
        """See `Ranks`: one all-reduce, or one for each dtype if there are several."""
        dtype = statistics_dtype(out.loss.dtype)
        names = [name for name in moving if name in out.buffers]
        # Averaged is how far a buffer moved: one that does not move stays as it is to the last bit, infinities included.
        moves = [
            torch.where(out.buffers[name] == before[name], 0, out.buffers[name] - before[name]).to(before[name].dtype)
            for name in names
        ]
        losses = [tensor.to(dtype) for tensor in (out.loss, out.adversarial_loss, out.all_finite)]
        means = all_reduce_mean([*out.grads.values(), *moves, *losses], self._group)
        *means, loss, adversarial_loss, finite = means
        moved = {name: before[name] + move for name, move in zip(names, means[len(out.grads) :], strict=True)}
        return replace(
            out,
            grads=dict(zip(out.grads, means, strict=False)),
            buffers=out.buffers | moved,
            loss=loss.to(out.loss.dtype),
            adversarial_loss=adversarial_loss.to(out.adversarial_loss.dtype),
            all_finite=finite > 1 - 0.5 / dist.get_world_size(self._group),
        )

    def check(self, check: ConsistencyCheck, described: Described) -> None:
        """See `Ranks`."""
        check.run(self._group, described)

    def _sums(self, parts: Sequence[Tensor]) -> list[Tensor]:
        """Return the sums of tensors of one dtype over ranks, in one all-reduce."""
        flat = all_reduce_sum(torch.cat([part.reshape(-1) for part in parts]), self._group)
        return [
            part.view(like.shape)
            for part, like in zip(flat.split([part.numel() for part in parts]), parts, strict=True)
        ]


def _pairs(tensors: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
    return list(zip(tensors[::2], tensors[1::2], strict=True))


def ranks_of(group: dist.ProcessGroup | None) -> Ranks:
    """Return the ranks of a process group, or this process if there is none."""
    return Ranks() if group is None else GroupRanks(group)


# SyncBatchNorm.


class Synchronisation:
    """The moments of one call of a layer over all values of all ranks. Called with those of this rank.

    Sums are of float64 in one all-reduce, and so exact enough for activations of float32. In a float64 model the
    variance loses (μ/σ)² roundings of float64.

    Args:
        group: the ranks of the layer.
        size: values a channel in each ghost group on this rank; ranks may have other numbers of them.

    Attributes:
        sizes: values a channel in each ghost group on all ranks together, 0-d, once it was called.
    """

    def __init__(self, group: dist.ProcessGroup, size: int) -> None:
        self._group, self._size = group, size

    def __call__(self, mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor]:
        """See `batch_norm.Reduce`."""
        if is_compiling():
            raise ModelError(
                "SyncBatchNorm does not compile where it has other ranks to synchronise with: torch.func does not "
                "differentiate a collective call in a compiler. Take the step eagerly, or use BatchNorm layers."
            )
        wide = mean.to(torch.float64)
        moments = torch.cat([wide.reshape(-1), (var + wide.square()).reshape(-1), wide.new_ones(1)])
        total = _Sum.apply(moments * self._size, self._group)
        self.sizes = total[-1].detach()
        center, square = (total[:-1] / self.sizes).chunk(2)
        var = (square - center.square()).clamp(min=0)
        return center.to(mean.dtype).view_as(mean), var.to(mean.dtype).view_as(mean)


def is_synchronised(layer: nn.Module) -> bool:
    """Return whether a layer shares its statistics with other ranks."""
    return isinstance(layer, nn.SyncBatchNorm) and has_world() and dist.get_world_size(layer.process_group) > 1


def synchronisation(layer: nn.Module, x: Tensor, groups: int) -> Synchronisation | None:
    """Return how to reduce the moments of a layer's input over ranks; None if they stay this rank's.

    Args:
        layer: the layer.
        x: its input `(N, C, ...)`.
        groups: number of ghost groups. Ghost group g is the union of the ranks' groups g.
    """
    if not is_synchronised(layer):
        return None
    group: Any = layer.process_group or dist.group.WORLD
    return Synchronisation(group, x.numel() // (x.shape[1] * groups))


def check_groups(groups: int, layers: Iterable[nn.Module]) -> None:
    """Make sure that all ranks have as many ghost groups, if their groups are united.

    Raises:
        SettingError: a group of every sample is a number that ranks need not share.
    """
    if isinstance(groups, int) and groups == -1 and any(map(is_synchronised, layers)):
        raise SettingError(
            "groups=-1 makes a ghost group of every sample, and SyncBatchNorm unites the groups of all ranks, which "
            "may have different numbers of samples. Say how many groups there are, or use BatchNorm layers."
        )


# Consistency.


def agree(parts: Mapping[str, str], group: dist.ProcessGroup) -> None:
    """Compare what ranks have to have in common.

    Args:
        parts: what is compared, by what it is of. Long texts are compared by their hash.
        group: the ranks, all of which call this.

    Raises:
        RanksError: on every rank, naming what differs and where.
    """
    own = {name: text if len(text) <= 200 else _digest(text) for name, text in parts.items()}
    everyone: list[Any] = [None] * dist.get_world_size(group)
    with _collective():
        dist.all_gather_object(everyone, own, group=group)
    first = everyone[0]
    for name in dict.fromkeys(key for one in everyone for key in one):
        others = [rank for rank, one in enumerate(everyone) if one.get(name) != first.get(name)]
        if others:
            raise RanksError(
                f"{name} of rank {others[0]} differ from those of rank 0 (ranks of the group {others}): "
                f"{everyone[others[0]].get(name)!r} and {first.get(name)!r}. {ADVICE.get(name, ADVICE[''])}"
            )


ADVICE = {
    "the values of params and buffers": "Start every rank from the same ones: seed them alike, or send those of one "
    "rank to all by torch.distributed.broadcast.",
    "": "Give every rank the same model and settings, and batches of one structure.",
}


def described_state(tensors: Mapping[str, Any]) -> str:
    """Describe names, shapes and dtypes of tensors."""
    return "; ".join(f"{name} {tuple(tensor.shape)} {tensor.dtype}" for name, tensor in tensors.items())


def described_values(tensors: Iterable[Tensor]) -> str:
    """Hash the values of tensors: the sum of the bytes of each, in whatever order a device adds them."""
    sums = [tensor.detach().reshape(-1).view(torch.uint8).sum(dtype=torch.int64) for tensor in tensors]
    return _digest(repr([int(total) for total in sums]))


def described_batch(batch: Any) -> str:
    """Describe dtypes and dimensions of a batch. How many samples there are, and how large, is a rank's own."""
    return ", ".join(f"{leaf.dtype} of {leaf.dim()} dimensions" for leaf in tensors_of(batch))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


Described = Callable[[], Mapping[str, str]]


class ConsistencyCheck:
    """Compares what ranks have in common, the first time. A copy does it again."""

    def __init__(self) -> None:
        self.is_done = False

    def __reduce__(self) -> tuple[Any, ...]:
        return (ConsistencyCheck, ())

    def run(self, group: dist.ProcessGroup, described: Described) -> None:
        """Do so, unless it was done, or a transform or compiler hides the values.

        Raises:
            RanksError: see `agree`.
        """
        if not self.is_done and not is_traced():
            agree(described(), group)
            self.is_done = True
