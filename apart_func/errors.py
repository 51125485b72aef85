"""What can go wrong, as classes: every error of the library is an `ApartError`.

A message says what was given, what was expected, which layer or argument, and how to mend it.
"""


class ApartError(ValueError):
    """Base of every error that the library raises about its input."""


class SettingError(ApartError):
    """A setting such as `epsilon`, `groups` or `ratio` is outside its range."""


class ModelError(ApartError):
    """The model cannot be run as a function, or its batch norm cannot be perturbed."""


class StateError(ApartError):
    """`params`, `buffers` or gradients do not have the keys or shapes of the model."""


class BatchError(ApartError):
    """The batch, or what a layer sees of it, does not fit the pass."""


class UsageError(ApartError):
    """The call itself is out of order: a loss that is no scalar, or a mode in which no gradient exists."""


class RanksError(ApartError):
    """The ranks of a process group are not at the same step of the same program, or one of them is gone."""
