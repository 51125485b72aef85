"""What holds for all tests."""

import os
import signal
import sys
from collections.abc import Iterator
from importlib.util import find_spec

import pytest
import torch
import torch.distributed as dist

# One thread a process: the tests run small models, which more threads only slow down; also in what tests start.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"

# No test is about time: a machine that does other work as well must not fail one. And none depends on luck.
if find_spec("hypothesis"):  # which the tests of CUDA do without
    from hypothesis import settings

    settings.register_profile(
        "deterministic",
        deadline=None,
        derandomize=True,
        database=None,
        max_examples=int(os.environ.get("EXAMPLES", 100)),
    )
    settings.load_profile("deterministic")

# A shell that starts the tests in the background has them ignore Ctrl-C, and every process that they start as well.
# Some of them are about what Ctrl-C does.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def _nothing_is_left() -> Iterator[None]:
    """Take away the process group and the settings that a framework has made: the next test would find them."""
    yield
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
    if "accelerate.state" in sys.modules:
        sys.modules["accelerate.state"].AcceleratorState._reset_state(reset_partial_state=True)
