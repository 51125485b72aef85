"""Where this was: see machine.py."""

from experiments.machine import Interrupted

__all__ = ["Interrupted"]
