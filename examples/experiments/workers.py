"""Where this was: see machine.py."""

from experiments.machine import run_in_workers, tell

__all__ = ["run_in_workers", "tell"]
