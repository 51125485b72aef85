"""Where this was: see runs.py."""

from experiments.runs import write_whole

__all__ = ["write_whole"]
