"""Where this was: see learner.py."""

from experiments.learner import NonFiniteError

__all__ = ["NonFiniteError"]
