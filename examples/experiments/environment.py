"""Where a result was made: `environment()`, which is stored beside it."""

from __future__ import annotations

import os
import platform
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch


def environment() -> dict[str, Any]:
    """What a reader of times needs to know about where they were taken."""
    return {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "hardware": _processor(),
        "cores": os.cpu_count(),
    }


def _processor() -> str:
    """The processor's name, from Linux where `platform` does not know it."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
