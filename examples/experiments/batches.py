"""Batches of a data set, shuffled and varied for training, or a split as it is.

A training batch is a function of the seed, the epoch and its number alone, whichever worker process makes it, so that a
run can go on in the middle of an epoch.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from experiments.datasets import DataSet
from experiments.splits import DataError, Split


def steps_per_epoch(data: DataSet, batch_size: int) -> int:
    """The number of full batches in the training samples, at least one.

    Raises:
        DataError: there are too few samples for a single batch.
    """
    if not 1 <= batch_size <= len(data.train):
        raise DataError(f"no batch of {batch_size} can be made from {len(data.train)} training samples ({data.name})")
    return len(data.train) // batch_size


def training_batches(
    data: DataSet,
    *,
    batch_size: int,
    seed: int,
    epoch: int,
    first: int = 0,
    workers: int = 0,
    pin_memory: bool = False,
    augment: bool = True,
) -> Iterator[tuple[Tensor, Tensor]]:
    """One epoch of training batches, all of them full, each a function of seed, epoch and its number alone.

    Args:
        data: the data set.
        batch_size: samples in a batch.
        seed: of the run, not negative.
        epoch: decides order and variation, together with the seed.
        first: number of the first batch that is wanted; the ones before it are not made.
        workers: processes that make batches; 0 makes them in this one.
        pin_memory: whether they come in pinned memory, from which copies to a device need not be waited for.
        augment: whether samples are varied at random, in the way of the data set.

    Returns:
        An iterator over normalised float32 samples and int64 labels. No global random generator is changed.

    Raises:
        DataError: there are too few samples for a single batch; while iterating, that a file cannot be decoded.
    """
    steps = steps_per_epoch(data, batch_size)
    order = torch.randperm(len(data.train), generator=torch.Generator().manual_seed(_mix(seed, epoch, 0)))
    chosen = [indices.tolist() for indices in order.split(batch_size)[:steps]]
    seeds = [_mix(seed, epoch, 1 + number) for number in range(steps)] if augment else None
    return _iterate(_Batches(data.train, data.mean, data.std, chosen, seeds), first, workers, pin_memory)


def evaluation_batches(
    data: DataSet, split: Split, *, batch_size: int, workers: int = 0, pin_memory: bool = False
) -> Iterator[tuple[Tensor, Tensor]]:
    """A split as it is: in order, not varied, every sample once; the last batch may be smaller.

    Raises:
        DataError: while iterating, that a file cannot be decoded.
    """
    chosen = [range(len(split))[start : start + batch_size] for start in range(0, len(split), batch_size)]
    return _iterate(_Batches(split, data.mean, data.std, chosen, None), 0, workers, pin_memory)


@dataclass(frozen=True)
class _Batches(Dataset[tuple[Tensor, Tensor] | DataError]):
    """Batches by their number.

    Attributes:
        split: where the samples are.
        mean: see `DataSet`.
        std: see `DataSet`.
        chosen: the samples of every batch.
        seeds: of the variation of every batch; None varies nothing.
    """

    split: Split
    mean: Tensor
    std: Tensor
    chosen: Sequence[Sequence[int]]
    seeds: Sequence[int] | None

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitem__(self, number: int) -> tuple[Tensor, Tensor] | DataError:
        """A batch, or what is wrong with it: an error raised in a worker would come wrapped in its traceback."""
        try:
            if self.seeds is None:
                samples, labels = self.split.batch(self.chosen[number])
            else:
                with _default_generator_at(self.seeds[number]):
                    samples, labels = self.split.batch(self.chosen[number], augment=True)
        except DataError as error:
            return error
        return _normalise(samples, self.mean, self.std), labels


def _iterate(batches: _Batches, first: int, workers: int, pin_memory: bool) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches from number `first` on."""
    loader = DataLoader(
        batches,
        batch_size=None,  # what the loader takes for a sample is a batch
        sampler=range(first, len(batches)),
        num_workers=workers,
        pin_memory=pin_memory,
        worker_init_fn=_obey_the_parent_alone,
        generator=torch.Generator(),  # the loader draws a seed for its workers, which they do not need
    )
    for batch in loader:
        if isinstance(batch, DataError):
            raise batch
        yield batch


def _normalise(samples: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Bring samples to mean 0 and deviation 1 in every channel, by the statistics of the data set."""
    scale = 255 if samples.dtype == torch.uint8 else 1
    shape = (-1, *[1] * (samples.dim() - 2))
    return samples.to(torch.float32).sub(scale * mean.view(shape)).div_(scale * std.view(shape))


def _mix(*parts: int) -> int:
    """A seed that depends on all parts."""
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0])


@contextmanager
def _default_generator_at(seed: int) -> Iterator[None]:
    """Seed torch's default CPU generator, and put it back where it was; `torch.manual_seed` would seed devices too."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


def _obey_the_parent_alone(worker: int) -> None:
    """Ctrl-C and a batch system's SIGTERM reach all processes of a run; the parent decides when its workers stop."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_await_the_parents_signal, daemon=True).start()


def _await_the_parents_signal() -> None:
    """End this process when the parent says so, as it does when it ends itself."""
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)
