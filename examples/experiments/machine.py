"""What a run runs on: device, random generators, signals, worker processes, and the ranks that torchrun started.

torchrun starts several processes, the ranks of one run, which take every step together: `with joined(device): ...`. The
first of them alone reads and writes the folder of the run, so several machines need not share a disk. Without torchrun
there is one rank, and what the functions on ranks return is its own.
"""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import platform
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, wait
from contextlib import contextmanager, suppress
from multiprocessing.queues import Queue
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import PrefixStore  # type: ignore[attr-defined]
from torch.distributed.rendezvous import rendezvous

from apart_func import RanksError
from experiments.settings import MachineSettings, SettingsError

CPUINFO = Path("/proc/cpuinfo")
PATIENCE = 3.0  # seconds in which a signal is the same request: it is sent to a process and to its group

Noted = Callable[[], int | None]  # the number of the signal that has come, if one has
Item = TypeVar("Item")
Result = TypeVar("Result")

_to_parent: Queue[Any] | None = None  # set in every worker when it starts


def prepared_device(machine: MachineSettings, amp: str | None = None) -> torch.device:
    """Find the device, and set what torch has of global switches."""
    name = machine.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    name = local_device_name(name)
    try:
        device = torch.zeros(1, device=name).device
        torch.zeros(1, device=name).item()  # refused by a device that holds no data
    except (RuntimeError, AssertionError) as error:
        raise SettingsError(f"device {name!r} cannot be used: {str(error).splitlines()[0]}") from error
    flags = CPUINFO.read_text(encoding="utf-8", errors="replace") if CPUINFO.exists() else "bf16"  # if it does not tell
    if amp and device.type == "cpu" and "bf16" not in flags:
        warnings.warn(
            "this processor has no arithmetic in bfloat16, and emulates it at a tenth of the speed: leave --amp out",
            stacklevel=2,
        )
    torch.backends.cudnn.benchmark = not machine.deterministic
    if machine.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS is deterministic with a fixed workspace
        torch.use_deterministic_algorithms(True)
    return device


def local_device_name(name: str) -> str:
    """The device of this process, of the one that the settings name."""
    if launched() == 1:
        return name
    if name not in ("cuda", "cpu"):
        raise SettingsError(f"torchrun started {launched()} processes, each with a device of its own: not all {name}.")
    return f"cuda:{os.environ['LOCAL_RANK']}" if name == "cuda" else name


def random_state(device: torch.device) -> dict[str, Tensor]:
    """The state of the generators that a step on a device draws from."""
    state = {"cpu": torch.get_rng_state()}
    return state | {"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else state


def set_random_state(state: dict[str, Tensor], device: torch.device) -> None:
    """Go on from what `random_state` returned."""
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], device)


def environment() -> dict[str, Any]:
    """What a reader of times needs to know about where they were taken."""
    hardware = platform.processor() or platform.machine()
    with suppress(OSError):  # Linux knows more
        lines = CPUINFO.read_text(encoding="utf-8").splitlines()
        names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
        hardware = (names or [hardware])[0]
    versions = {"torch": torch.__version__, "python": platform.python_version()}
    return {**versions, "hardware": hardware, "cores": os.cpu_count()}


# Signals.


class Interrupted(Exception):  # noqa: N818, as KeyboardInterrupt, it is no error
    """A run was asked to stop, and did after it had written a checkpoint."""

    advice = "a checkpoint is written, and --resume goes on."

    def __init__(self, signal_number: int) -> None:
        super().__init__(signal_number)
        self.signal_number = signal_number

    def __str__(self) -> str:
        """What stopped it, for a person."""
        return f"stopped by {signal.Signals(self.signal_number).name}"


@contextmanager
def noted_signals() -> Iterator[Noted]:
    """Note a SIGINT or SIGTERM instead of obeying it; one that comes again after `PATIENCE` acts as it would have."""
    noted: list[tuple[int, float]] = []
    before: dict[signal.Signals, Any] = {}

    def note(number: int, frame: FrameType | None) -> None:
        if noted and time.monotonic() - noted[0][1] > PATIENCE:
            restore()
            signal.raise_signal(number)
        noted.append((number, time.monotonic()))

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    if threading.current_thread() is threading.main_thread():
        before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: noted[0][0] if noted else None
    finally:
        restore()


# Workers.


def run_in_workers(
    task: Callable[[Item], Result], items: Iterable[Item], processes: int, show: Callable[[list[Any]], None]
) -> list[Result]:
    """Call a function of a module on every item, in workers of one thread; raise the first error, end with Ctrl-C."""
    for setting in ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_"):  # glibc would give memory back in every step
        os.environ.setdefault(setting, str(2**32))
    context = multiprocessing.get_context("spawn")  # forking a process in which torch has started threads may hang
    news: Queue[Any] = context.Queue()
    pool = ProcessPoolExecutor(processes, context, initializer=_start_worker, initargs=(news,))
    try:
        tasks = [pool.submit(task, item) for item in items]
        running = set(tasks)
        while running:
            done, running = wait(running, timeout=0.2)
            for finished in done:
                finished.result()
            told = []
            while not news.empty():
                told.append(news.get())
            show(told)
        return [finished.result() for finished in tasks]
    except KeyboardInterrupt:
        for worker in multiprocessing.active_children():
            worker.terminate()
        raise
    finally:
        pool.shutdown(cancel_futures=True)
        news.close()


def tell(news: Any) -> None:
    """Send something to the parent; outside a worker there is none, and nothing happens."""
    if _to_parent is not None:
        _to_parent.put(news)


def _start_worker(news: Queue[Any]) -> None:
    """Prepare a worker: one thread, so that workers do not fight over the cores."""
    global _to_parent
    _to_parent = news
    news.cancel_join_thread()  # unread news must not keep a worker alive
    os.setsid()  # Ctrl-C reaches the parent alone, which decides
    threading.Thread(target=_leave_with_the_parent, daemon=True).start()
    torch.set_num_threads(1)


def _leave_with_the_parent() -> None:
    """End with a parent that was killed: the worker would otherwise work on, beside those of the next attempt."""
    parent = multiprocessing.parent_process()
    assert parent is not None, "only workers are started here"
    parent.join()
    os._exit(1)


# The ranks that torchrun has started.


def launched() -> int:
    """How many processes torchrun has started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", 1)) if "TORCHELASTIC_RUN_ID" in os.environ else 1


def is_restarted() -> bool:
    """Whether torchrun has started these processes after others that failed."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0


def is_first() -> bool:
    """Whether this process is the one that writes."""
    return launched() == 1 or os.environ["RANK"] == "0"


def local_world_size() -> int:
    """How many of the processes run here."""
    return int(os.environ["LOCAL_WORLD_SIZE"]) if launched() > 1 else 1


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


def process_group() -> dist.ProcessGroup | None:
    """The group of all ranks; None where there is only one."""
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        return dist.group.WORLD
    return None


def world_size() -> int:
    """How many ranks there are."""
    return 1 if process_group() is None else dist.get_world_size()


def rank() -> int:
    """Which of them this process is."""
    return 0 if process_group() is None else dist.get_rank()


def from_first(look: Callable[[], Result]) -> Result:
    """What the first rank finds or does, or the error that it raises, on all of them."""
    if process_group() is None:
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
    result: Result = found[0]
    return result


def gathered(own: Result) -> list[Result]:
    """What every rank has."""
    everyone: list[Any] = [own] * world_size()
    if process_group() is not None:
        with _explained():
            dist.all_gather_object(everyone, own)
    return everyone


def largest(*numbers: int) -> list[int]:
    """Of each number, the largest that a rank has."""
    if process_group() is None:
        return list(numbers)
    together = torch.tensor(numbers)
    with _explained():
        dist.all_reduce(together, dist.ReduceOp.MAX)
    return together.tolist()


def sum_over_ranks(numbers: Tensor) -> Tensor:
    """The sum over ranks, in place."""
    if process_group() is not None:
        with _explained():
            dist.all_reduce(numbers)
    return numbers


def mean_over_ranks(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The mean of every tensor over ranks, bit-equal on all, in one call."""
    flat = sum_over_ranks(torch.cat([tensor.reshape(-1) for tensor in tensors]) / world_size())
    parts = flat.split([tensor.numel() for tensor in tensors])
    return [part.view(tensor.shape).to(tensor.dtype) for part, tensor in zip(parts, tensors, strict=True)]


def check_ranks_agree(own: Mapping[str, Iterable[Tensor]], advice: str) -> None:
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
