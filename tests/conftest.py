"""What tests of several folders share."""

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture
def dynamo() -> Iterator[None]:
    """Dynamo without graphs of other tests, which count against its limit."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
