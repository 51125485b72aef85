"""Ctrl-C and SIGTERM, noted until a training step is complete: `with noted_signals() as noted: ...`."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

PATIENCE = 3.0


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
def noted_signals() -> Iterator[Callable[[], int | None]]:
    """Note a SIGINT or SIGTERM instead of obeying it, until there is a good moment to stop.

    One that comes again within `PATIENCE` seconds is the same request, which terminals and batch systems send to a
    process and to its group. After that it acts as it would have before. Outside the main thread, where Python has no
    signals, nothing is noted.
    """
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
