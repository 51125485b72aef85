"""What the ranks of a process group do together, so that each of them takes the same step.

Ranks weigh alike, as in DistributedDataParallel. A collective call that fails is a `RanksError` on every rank that is
left: at once if a rank is gone, after the timeout of the process group if one hangs (with NCCL, PyTorch's watchdog may
end the process before, and says why).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from hashlib import sha256
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from apart_func._torch import is_compiling, is_traced
from apart_func.batch_norm import statistics_dtype
from apart_func.errors import ModelError, RanksError, SettingError
from apart_func.trees import (
    BatchStats,
    PerturbationTree,
    StatGrads,
    StatGradTree,
    StatTree,
    StepOutput,
    Tensors,
    Tree,
    map_tensors,
    replace,
    tensors_of,
    where_tree,
    with_tensors,
)


def check_process_group(setting: Any) -> None:
    """Raise a SettingError if `process_group` is not a valid setting."""
    is_group = dist.is_available() and isinstance(setting, dist.ProcessGroup)
    if not (setting is None or is_group or setting in ("world", "local")):
        raise SettingError(f"process_group={setting!r}; expected a ProcessGroup of this rank, 'world', 'local', None.")


def group_of(setting: Any) -> dist.ProcessGroup | None:
    """Return the ranks to reduce over for a setting of `process_group`; None if there is no other rank."""
    if setting is None or setting == "local":
        return None
    if setting == "world" and not has_world():
        advice = "Call torch.distributed.init_process_group first, or leave process_group=None in a single process"
        raise SettingError(f"process_group='world', and no process group is initialised. {advice}.")
    group = dist.group.WORLD if setting == "world" else setting
    return group if dist.get_world_size(group) > 1 else None


def has_world() -> bool:
    """Return whether a process group was initialised."""
    return dist.is_available() and dist.is_initialized()


def data_parallel_group(model: nn.Module) -> dist.ProcessGroup | None:
    """Return the process group of the `DistributedDataParallel` that a model is, or holds; None without one."""
    wrappers = (module for module in model.modules() if isinstance(module, DistributedDataParallel))
    return next((wrapper.process_group for wrapper in wrappers), None)


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
    """The sum over ranks, whose gradient is the sum of the ranks' gradients; PyTorch's own knows no torch.func."""

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


def _all_reduce(tree: Tree, group: Any, divisor: int = 1) -> Tree:
    """Return a tree of sums over ranks, divided by a number and dense, bit-equal on all; one all-reduce for a dtype."""
    found = [tensor.to_dense() if tensor.is_sparse else tensor for tensor in tensors_of(tree)]
    for dtype in dict.fromkeys(tensor.dtype for tensor in found):
        places = [place for place, tensor in enumerate(found) if tensor.dtype == dtype]
        flat = torch.cat([found[place].reshape(-1) for place in places])
        # Divided first, as DistributedDataParallel does: a sum of half-precision gradients may overflow.
        flat = flat / divisor if divisor > 1 else flat
        if is_compiling():
            dist.all_reduce(flat, group=group)
        else:
            flat = _Sum.apply(flat, group)
        for place, part in zip(places, flat.split([found[place].numel() for place in places]), strict=True):
            found[place] = part.view(found[place].shape)
    reduced: Tree = with_tensors(tree, found)
    return reduced


def mean_over_ranks(stat_grads: StatGradTree, group: dist.ProcessGroup | None = None) -> StatGradTree:
    """Average statistic gradients over ranks (None: all of them), in one collective call; all have the same layers."""
    return _all_reduce(stat_grads, group, dist.get_world_size(group))


class CalledLayers(NamedTuple):
    """What ranks know together of the layers that one of them called: means over all calls and over all ranks."""

    stats: StatTree
    stat_grads: StatGradTree
    calls: Mapping[str, Tensor]  # on how many ranks each layer was called, `(C,)`; empty in one process

    def update(self, before: PerturbationTree, found: PerturbationTree) -> PerturbationTree:
        """Return the perturbation that was found of layers that a rank called, and that before of the others."""
        of_ranks = {name: where_tree(n[0] > 0, found[name], before[name]) for name, n in self.calls.items()}
        return {**before, **found, **of_ranks}


class Ranks:
    """The ranks of a group that take a step together; without one, this process: every reduction is the identity."""

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self._group: Any = group
        self._size = 1 if group is None else dist.get_world_size(group)

    def called_layers(self, stats: StatTree, stat_grads: StatGradTree) -> tuple[CalledLayers, StatGradTree]:
        """Average over ranks statistics of called layers, and gradients of all layers, which come back as well."""
        if self._group is None:
            return CalledLayers(stats, {layer: g for layer, g in stat_grads.items() if layer in stats}, {}), stat_grads
        parts, grads, means, calls = {}, {}, {}, {}
        for layer, g in stat_grads.items():
            none = g.mean.new_zeros(g.mean.shape[-1])
            here = [part.to(none.dtype).reshape(-1, len(none)).mean(0) for part in stats.get(layer, ())]
            parts[layer] = [*g, *here, none + 1] if here else [*g, none, none, none]
        for layer, (of_mean, of_scale, mean, var, count) in _all_reduce(parts, self._group).items():
            grads[layer] = StatGrads(of_mean / self._size, of_scale / self._size)
            means[layer] = BatchStats(*(part / count.clamp(min=1) for part in (mean, var)))
            calls[layer] = count
        return CalledLayers(means, grads, calls), grads

    def mean_gradients(self, grads: Tensors) -> Tensors:
        """Average gradients of parameters over ranks."""
        return grads if self._group is None else _all_reduce(grads, self._group, self._size)

    def of_first(self, perturbation: PerturbationTree) -> PerturbationTree:
        """Return the perturbation that the first rank has drawn, on all of them."""
        if self._group is None:
            return perturbation
        is_first = dist.get_rank(self._group) == 0
        return _all_reduce(perturbation if is_first else map_tensors(torch.zeros_like, perturbation), self._group)

    def mean_output(self, out: StepOutput, before: Tensors, moving: Iterable[str]) -> StepOutput:
        """Average gradients, losses, and how far the buffers named in `moving` have moved; the rest is this rank's."""
        if self._group is None:
            return out
        # Averaged is how far a buffer moved: one that does not move stays as it is to the last bit, even if infinite.
        pairs = {name: (out.buffers[name], before[name]) for name in moving if name in out.buffers}
        moves = {name: torch.where(new == old, 0, new - old).to(old.dtype) for name, (new, old) in pairs.items()}
        losses = [t.to(statistics_dtype(out.loss.dtype)) for t in (out.loss, out.adversarial_loss, out.all_finite)]
        grads, moves, losses = _all_reduce((out.grads, moves, losses), self._group, self._size)
        moved = {name: before[name] + move for name, move in moves.items()}
        return replace(
            out,
            grads=grads,
            buffers=out.buffers | moved,
            loss=losses[0].to(out.loss.dtype),
            adversarial_loss=losses[1].to(out.adversarial_loss.dtype),
            all_finite=losses[2] > 1 - 0.5 / self._size,
        )

    def check(self, check: ConsistencyCheck, described: Callable[[], Mapping[str, str]]) -> None:
        """Compare, once, what ranks have to have in common; raise a RanksError on all of them, naming what differs."""
        if self._group is None or check.is_done or is_traced():
            return
        parts = described().items()
        own = {name: text if len(text) <= 200 else sha256(text.encode()).hexdigest()[:16] for name, text in parts}
        everyone: list[Any] = [None] * self._size
        with _collective():
            dist.all_gather_object(everyone, own, group=self._group)
        for name in dict.fromkeys(key for one in everyone for key in one):
            texts = [one.get(name) for one in everyone]
            others = [rank for rank, text in enumerate(texts) if text != texts[0]]
            if others:
                raise RanksError(
                    f"{name} of rank {others[0]} differ from those of rank 0 (ranks of the group {others}): "
                    f"{texts[others[0]]!r} and {texts[0]!r}. Give every rank the same model, settings and seed, and "
                    "batches of one structure; torch.distributed.broadcast sends the values of one rank to all."
                )
        check.is_done = True


class Synchronisation:
    """The moments of one call of a layer over all values of all ranks; see `batch_norm.Reduce`."""

    sizes: Tensor  # values a channel in a ghost group over all ranks, 0-d; there once called

    def __init__(self, group: dist.ProcessGroup, size: int) -> None:
        self._group, self._size = group, size  # of this rank

    def __call__(self, mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor]:
        """Return the moments over all ranks, from those of this one."""
        if is_compiling():
            problem = "SyncBatchNorm does not compile with other ranks: torch.func cannot differentiate collectives"
            raise ModelError(f"{problem}. Take the step eagerly, or use BatchNorm layers.")
        wide = mean.to(torch.float64)  # exact enough for float32; a float64 variance loses (μ/σ)² roundings
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
    """Return how to reduce the moments of a layer over ranks, each ghost group by itself; None if they stay here."""
    if not is_synchronised(layer):
        return None
    group: Any = layer.process_group or dist.group.WORLD
    return Synchronisation(group, x.numel() // (x.shape[1] * groups))


def check_groups(groups: int, layers: Iterable[nn.Module]) -> None:
    """Raise a SettingError if every sample is a group, and layers unite the groups of ranks."""
    if isinstance(groups, int) and groups == -1 and any(map(is_synchronised, layers)):
        problem = "groups=-1 makes a group of every sample; SyncBatchNorm unites ranks' groups, maybe not as many"
        raise SettingError(f"{problem}. Say how many groups there are, or use BatchNorm layers.")


class ConsistencyCheck:
    """Whether ranks have compared what they have in common. A copy does it again."""

    is_done = False

    def __reduce__(self) -> tuple[Any, ...]:
        return ConsistencyCheck, ()


def described_state(tensors: Mapping[str, Any]) -> str:
    """Describe names, shapes and dtypes of tensors."""
    return "; ".join(f"{name} {tuple(tensor.shape)} {tensor.dtype}" for name, tensor in tensors.items())


def described_values(tensors: Iterable[Tensor]) -> str:
    """Describe the values of tensors: the sum of the bytes of each, in whatever order a device adds them."""
    return repr([int(t.detach().reshape(-1).view(torch.uint8).sum(dtype=torch.int64)) for t in tensors])


def described_batch(batch: Any) -> str:
    """Describe dtypes and dimensions of a batch. How many samples there are, and how large, is a rank's own."""
    return ", ".join(f"{leaf.dtype} of {leaf.dim()} dimensions" for leaf in tensors_of(batch))
