"""Networks by name, for the data they are to see: `make_network("small_resnet", data)`."""

from __future__ import annotations

from models import small_resnet
from torch import nn

from training.datasets import DataSet


class NetworkError(ValueError):
    """There is no such network, or it does not fit the data."""


def make_network(name: str, data: DataSet, width: int | None = None) -> nn.Module:
    """Make a network, freshly initialised from torch's default generator.

    Args:
        name: of the network.
        data: what it is to see.
        width: channels of its first stage; None takes what is usual.

    Returns:
        The network, in training mode.

    Raises:
        NetworkError: there is no such network, or it does not fit the data.
    """
    if name != "small_resnet":
        raise NetworkError(f"there is no network {name!r}")
    return small_resnet(data.sample_shape[0], data.classes, width or 8)
