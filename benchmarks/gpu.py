"""What is measured on a GPU, within a time that is given, by PyTorch alone.

    python benchmarks/gpu.py                                every script, for seven minutes together
    python benchmarks/gpu.py compile --minutes 60           one of them, with more time
    python benchmarks/gpu.py --device cpu --models tiny --samples 8 --rounds 1          a rehearsal

Each script runs in a process of its own and is stopped when its share of the time is over; what it had measured by then
is in results/, and says that it is not complete. Time that one leaves is the next one's. `make gpu` runs the CUDA tests
before it. No network is needed, and no package but PyTorch, einops and pytest.
"""

from __future__ import annotations

import argparse
import importlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from common import RESULTS, Rounds, run
from networks import NETWORKS

# Of the time, in the order in which the scripts run. Compiling takes as much as it gets.
SHARES = {"step_cost": 0.2, "layer_cost": 0.15, "memory": 0.25, "compile": 0.4}
EAGER = ("plain", "APART", "APART drop-in", "one pass", "one pass drop-in")
FUNCTIONAL = ("plain", "APART", "one pass")
COMPILED = ("plain compiled", "APART compiled", "one pass compiled")
GROUPS = 16
LAYERS = ("64x32x32", "32x32x32", "128x8x8", "512x4x4")  # of ResNet-18 and WRN-40-2, without the batch


def settings_of(script: str, options: argparse.Namespace) -> Rounds:
    """What a script measures here.

    Args:
        script: one of `SHARES`.
        options: the command line.

    Returns:
        Its settings.
    """
    models, samples = tuple(options.models), tuple(options.samples)
    of_steps: dict[str, Any] = {"models": models, "samples": samples, "ratios": (1.0,), "groups": (GROUPS,)}
    chosen: dict[str, dict[str, Any]] = {
        "step_cost": of_steps | {"methods": EAGER, "rounds": options.rounds, "seconds": 0.2},
        "layer_cost": {
            "shapes": tuple(f"{batch}x{layer}" for batch in samples for layer in LAYERS),
            "dtypes": ("float16", "bfloat16", "float32"),
            "groups": tuple(groups for groups in (1, 4, GROUPS, 64) if groups <= min(samples) // 2),
            "rounds": options.rounds,
            "seconds": 0.01,
        },
        # The allocator of CUDA counts bytes, and counts the same ones every time.
        "memory": of_steps | {"methods": FUNCTIONAL, "rounds": 1, "allocators": ("glibc",)},
        "compile": of_steps | {"methods": COMPILED, "rounds": 1, "warm": False, "step_rounds": options.rounds},
    }
    where = {"device": options.device, "out": options.out, "threads": 1}
    settings: Rounds = importlib.import_module(script).Settings(**chosen[script], **where)
    return settings


def run_for(seconds: float, script: str, options: list[str]) -> None:
    """Run a script in a process of its own, and stop it with all that it started when the time is over."""
    command = [sys.executable, __file__, script, *options, "--unlimited"]
    print(f"\n{script}, for {seconds:.0f} s at most", flush=True)
    process = subprocess.Popen(command, start_new_session=True)
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        print(f"{script} was stopped; what it has measured is kept", flush=True)
    else:
        if process.returncode:
            print(f"{script} failed with status {process.returncode}", flush=True)


def main() -> None:
    """Measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scripts", nargs="*", metavar="script", help=f"of {', '.join(SHARES)}; all by default")
    parser.add_argument("--minutes", type=float, default=7.0, help="for all scripts together")
    parser.add_argument("--unlimited", action="store_true", help="run one script in this process, to its end")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--models", nargs="+", default=["resnet18", "wrn_40_2"], choices=list(NETWORKS))
    parser.add_argument("--samples", nargs="+", type=int, default=[128, 512], help="batch sizes")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    scripts = options.scripts or list(SHARES)
    if unknown := set(scripts) - set(SHARES):
        parser.error(f"there is no script {', '.join(sorted(unknown))} here; choose from {', '.join(SHARES)}")
    if options.unlimited:
        (script,) = scripts
        module = importlib.import_module(script)
        run(script, settings_of(script, options), module.measure, module.sheets)
        return
    passed_on = [argument for argument in sys.argv[1:] if argument not in SHARES]
    end = time.monotonic() + 60 * options.minutes
    for number, script in enumerate(scripts):
        share = SHARES[script] / sum(SHARES[later] for later in scripts[number:])
        run_for(share * (end - time.monotonic()), script, passed_on)


if __name__ == "__main__":
    main()
