"""The processes that torchrun has started, which are the ranks of one run: `with joined(device): ...`.

A batch is divided among the ranks, which take every step together. The first of them alone reads and writes the folder
of the run, so several machines need not share a disk. Without torchrun there is one process, and nothing to do here.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import gcd
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import PrefixStore  # type: ignore[attr-defined]
from torch.distributed.rendezvous import rendezvous
from torch.nn.modules.batchnorm import _BatchNorm

from apart_func import RanksError
from experiments.settings import Settings, SettingsError

Found = TypeVar("Found")


def launched() -> int:
    """How many processes torchrun has started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", 1)) if "TORCHELASTIC_RUN_ID" in os.environ else 1


def is_restarted() -> bool:
    """Whether torchrun has started these processes after others that failed."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0


def is_first() -> bool:
    """Whether this process is the one that writes."""
    return launched() == 1 or os.environ["RANK"] == "0"


def on_this_machine() -> int:
    """How many of the processes run here."""
    return int(os.environ["LOCAL_WORLD_SIZE"]) if launched() > 1 else 1


def device_name(name: str) -> str:
    """The device of this process, of the one that the settings name."""
    if launched() == 1:
        return name
    if name not in ("cuda", "cpu"):
        raise SettingsError(f"torchrun started {launched()} processes, each with a device of its own: not all {name}.")
    return f"cuda:{os.environ['LOCAL_RANK']}" if name == "cuda" else name


@contextmanager
def joined(device: torch.device) -> Iterator[None]:
    """Meet the other processes."""
    if launched() == 1:
        yield
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    with _explained():
        store, number, processes = next(rendezvous("env://"))
        # torchrun keeps its store when it starts processes again: without a prefix they would call those that are gone.
        own = PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=own, rank=number, world_size=processes)
    try:
        yield
    finally:
        dist.destroy_process_group()


def group() -> dist.ProcessGroup | None:
    """The ranks; None where there is one process."""
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        return dist.group.WORLD
    return None


def count() -> int:
    """How many there are."""
    return 1 if group() is None else dist.get_world_size()


def rank() -> int:
    """Which of them this process is."""
    return 0 if group() is None else dist.get_rank()


def from_first(look: Callable[[], Found]) -> Found:
    """What the first rank finds or does, or the error that it raises, on all of them."""
    if group() is None:
        return look()
    found: list[Any] = [None, None]
    if rank() == 0:
        try:
            found[0] = look()
        except Exception as error:
            found[1] = error
    with _explained():
        dist.broadcast_object_list(found, src=0)
    if found[1] is not None:
        raise found[1]
    result: Found = found[0]
    return result


def gathered(own: Found) -> list[Found]:
    """What every rank has."""
    everyone: list[Any] = [own] * count()
    if group() is not None:
        with _explained():
            dist.all_gather_object(everyone, own)
    return everyone


def most(*numbers: int) -> list[int]:
    """Of each number, the largest that a rank has."""
    if group() is None:
        return list(numbers)
    together = torch.tensor(numbers)
    with _explained():
        dist.all_reduce(together, dist.ReduceOp.MAX)
    return together.tolist()


def total(numbers: Tensor) -> Tensor:
    """The sum over ranks, in place."""
    if group() is not None:
        with _explained():
            dist.all_reduce(numbers)
    return numbers


def mean(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The mean of every tensor over ranks, bit-equal on all, in one call."""
    flat = total(torch.cat([tensor.reshape(-1) for tensor in tensors]) / count())
    parts = flat.split([tensor.numel() for tensor in tensors])
    return [part.view(tensor.shape).to(tensor.dtype) for part, tensor in zip(parts, tensors, strict=True)]


def agree(own: Mapping[str, Iterable[Tensor]], advice: str) -> None:
    """Make sure that all ranks have the same tensors; the error of every rank says where they differ."""
    digests = {}
    for name, tensors in own.items():
        parts = (tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8) for tensor in tensors)
        digests[name] = hashlib.sha256(b"".join(part.numpy().tobytes() for part in parts)).hexdigest()
    first, *others = gathered(digests)
    for number, other in enumerate(others, start=1):
        for name in first:
            if other[name] != first[name]:
                raise RanksError(f"{name} of rank {number} differ from those of rank 0. {advice}")


@contextmanager
def _explained() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        problem, *_ = str(error).splitlines() or ["no reason given"]
        raise RanksError(
            f"rank {os.environ['RANK']} waited for the other ranks in vain ({problem}): look at their own errors."
        ) from error


class Share(NamedTuple):
    """Every nth block of a batch. With a sample for each ghost group in it, ranks' groups g are the batch's group g."""

    rank: int = 0  # whose share it is
    ranks: int = 1  # how many there are
    block: int = 1  # samples in a block

    def of(self, samples: Sequence[int]) -> Sequence[int]:
        """Those of the samples that are the rank's."""
        if self.ranks == 1:
            return samples
        return [sample for place, sample in enumerate(samples) if place // self.block % self.ranks == self.rank]


def training_share(settings: Settings) -> Share:
    """This rank's share of every training batch, if it can be divided."""
    size, ranks = settings.training.batch_size, count()
    if size % ranks:
        raise SettingsError(f"a batch of {size} samples cannot be divided among {ranks} processes: choose a multiple.")
    return Share(rank(), ranks, gcd(max(settings.method.groups, 1), size // ranks))


def synchronised(model: nn.Module, settings: Settings, device: torch.device) -> nn.Module:
    """The network with batch norm over all ranks, if the settings ask for it; some cannot be, and are refused."""
    choice = settings.training.sync_batch_norm
    if count() == 1 or choice == "off" or (choice == "auto" and device.type != "cuda"):
        return model
    for name, layer in model.named_modules():
        if isinstance(layer, _BatchNorm) and type(layer) not in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d):
            kind = type(layer).__name__
            raise SettingsError(f"layer {name!r}, {kind}, cannot be synchronised: --sync-batch-norm off.")
    if settings.training.compile:
        raise SettingsError("a step with synchronised batch norm cannot be compiled: --sync-batch-norm off.")
    converted: nn.Module = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    return converted
