"""The machine: signals, the processor, and workers. Ranks are in test_torchrun.py."""

from __future__ import annotations

import math
import signal
import time

import pytest
from experiments import machine
from experiments.machine import noted_signals, run_in_workers
from experiments.settings import (
    MachineSettings,
)


def test_a_signal_is_noted_and_its_double_too():
    before = signal.getsignal(signal.SIGINT)
    with noted_signals() as noted:
        assert noted() is None
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGINT)
        assert noted() == signal.SIGTERM
    assert signal.getsignal(signal.SIGINT) is before


def test_a_signal_that_is_repeated_later_is_obeyed(monkeypatch):
    monkeypatch.setattr(machine, "PATIENCE", 0.0)
    with noted_signals():
        signal.raise_signal(signal.SIGINT)
        time.sleep(0.01)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_a_processor_without_bfloat16_is_named_where_amp_asks_for_it(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "CPUINFO", tmp_path / "cpuinfo")
    machine.prepared_device(MachineSettings(device="cpu"), "bf16")  # a system that does not tell; warnings are errors
    machine.CPUINFO.write_text("flags : avx512f avx512_bf16")
    machine.prepared_device(MachineSettings(device="cpu"), "bf16")
    machine.CPUINFO.write_text("flags : sse avx2 avx512f")
    machine.prepared_device(MachineSettings(device="cpu"))
    with pytest.warns(UserWarning, match="emulates it at a tenth of the speed: leave --amp out"):
        machine.prepared_device(MachineSettings(device="cpu"), "bf16")


def test_workers_return_results_in_order_and_raise_what_a_task_raised():
    assert run_in_workers(math.sqrt, [4.0, 1.0, 9.0], processes=2, show=lambda news: None) == [2.0, 1.0, 3.0]
    with pytest.raises(ValueError, match=r"math domain|nonnegative"):
        run_in_workers(math.sqrt, [4.0, -1.0], processes=1, show=lambda news: None)
