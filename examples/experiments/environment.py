"""Where this was: see machine.py."""

from experiments.machine import environment

__all__ = ["environment"]
