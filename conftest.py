"""What holds for all tests."""

import os
import signal

import torch
from hypothesis import settings

# One thread a process: the tests run small models, which more threads only slow down; also in what tests start.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"

# No test is about time: a machine that does other work as well must not fail one. And none depends on luck.
settings.register_profile("deterministic", deadline=None, derandomize=True, database=None)
settings.load_profile("deterministic")

# A shell that starts the tests in the background has them ignore Ctrl-C, and every process that they start as well.
# Some of them are about what Ctrl-C does.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
