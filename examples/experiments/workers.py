"""Tasks in worker processes that tell the parent how they get on: a parallel `[task(item) for item in items]`.

While a task runs it may call `tell(news)`; the parent hands the news to its `show` function a few times a second.
"""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor, wait
from multiprocessing.queues import Queue
from typing import Any, TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")

_to_parent: Queue[Any] | None = None  # set in every worker when it starts


def run_in_workers(
    task: Callable[[Item], Result], items: Iterable[Item], processes: int, show: Callable[[list[Any]], None]
) -> list[Result]:
    """Call a function on every item, in worker processes of one thread each.

    Args:
        task: the function; it travels to the workers, so it is one of a module or a `partial` of one.
        items: its arguments.
        processes: how many at a time.
        show: is given what the tasks have told since it was last called.

    Raises:
        Exception: whatever the first task that failed raised; tasks that have not started are dropped.
        KeyboardInterrupt: Ctrl-C; the workers have been stopped.
    """
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
