"""The device of a run, and the random generators that a step on it draws from."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

import torch
from torch import Tensor

from experiments.ranks import device_name
from experiments.settings import MachineSettings, SettingsError


def random_state(device: torch.device) -> dict[str, Tensor]:
    """The state of the generators that a step on a device draws from."""
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_random_state(state: dict[str, Tensor], device: torch.device) -> None:
    """Go on from what `random_state` returned."""
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], device)


def has_bfloat16(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether this processor computes in bfloat16, as far as it tells."""
    return not cpuinfo.exists() or "bf16" in cpuinfo.read_text(encoding="utf-8", errors="replace")


def prepared_device(machine: MachineSettings, amp: str | None = None) -> torch.device:
    """Find the device, and set what torch has of global switches."""
    name = machine.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    name = device_name(name)
    try:
        device = torch.zeros(1, device=name).device
        torch.zeros(1, device=name).item()  # refused by a device that holds no data
    except (RuntimeError, AssertionError) as error:
        raise SettingsError(f"device {name!r} cannot be used: {str(error).splitlines()[0]}") from error
    if amp and device.type == "cpu" and not has_bfloat16():
        warnings.warn(
            "this processor has no arithmetic in bfloat16, and emulates it at a tenth of the speed: leave --amp out",
            stacklevel=2,
        )
    torch.backends.cudnn.benchmark = not machine.deterministic
    if machine.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS is deterministic with a fixed workspace
        torch.use_deterministic_algorithms(True)
    return device
