"""What is measured on a GPU, within a time that is given, by PyTorch alone.

    python benchmarks/gpu.py                                every script, seven minutes together
    python benchmarks/gpu.py step compile --minutes 30      some of them, with more time
    python benchmarks/gpu.py --device cpu --network tiny --samples 8 --rounds 1          a rehearsal

Each script runs in a process of its own and is stopped when its share of the time is over; what it had measured by then
is in its result, which says that it is not complete. Time that one leaves is the next one's. No network is needed, and
no package but PyTorch, einops and, for the tests of CUDA that `make gpu` runs before it, pytest.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from networks import NETWORKS
from timing import RESULTS

SHARES = {"step": 0.25, "layer": 0.15, "memory": 0.15, "compile": 0.45}  # of the time, in the order of the runs
METHODS = ("plain", "two passes", "one pass", "two passes, drop-in", "one pass, drop-in")  # SAM's is another package


def command(script: str, options: argparse.Namespace) -> list[str]:
    """The command line of a script here."""
    network, samples = options.network, str(options.samples)
    batch = ["--networks", network, "--samples", samples, "--methods", *METHODS]
    shapes = [f"{samples}x64x32x32", f"{samples}x128x16x16", f"{samples}x512x4x4"]  # of ResNet-18
    own = {
        "step": [*batch, "--seconds", "0.2", "--memory", "glibc"],
        "layer": ["--shapes", *shapes, "--dtypes", "float16", "bfloat16", "float32", "--seconds", "0.01"],
        "memory": [*batch, "--memory", "glibc"],
        "compile": ["--network", network, "--samples", samples],
    }
    # Allocations on CUDA are counted in bytes, the same at every run, and a compiler's time is its own.
    rounds = 1 if script in ("memory", "compile") else options.rounds
    common = ["--rounds", str(rounds), "--device", options.device, "--out", str(options.out)]
    return [sys.executable, str(Path(__file__).with_name(f"{script}.py")), *own[script], *common]


def run_for(seconds: float, script: str, options: argparse.Namespace) -> None:
    """Run a script, and stop it with all that it started when its time is over."""
    print(f"\n{script}, for {seconds:.0f} s at most", flush=True)
    process = subprocess.Popen(command(script, options), start_new_session=True)
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        print(f"{script} was stopped; what it has measured is kept", flush=True)
    if process.returncode > 0:
        print(f"{script} failed with status {process.returncode}", flush=True)


def main() -> None:
    """Measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scripts", nargs="*", default=[], metavar="script", help=f"of {', '.join(SHARES)}")
    parser.add_argument("--minutes", type=float, default=7.0, help="for all scripts together")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--network", default="resnet18", choices=list(NETWORKS))
    parser.add_argument("--samples", type=int, default=256, help="batch size")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    scripts = options.scripts or list(SHARES)
    if unknown := set(scripts) - set(SHARES):
        parser.error(f"there is no script {', '.join(sorted(unknown))} here; choose from {', '.join(SHARES)}")
    end = time.monotonic() + 60 * options.minutes
    for number, script in enumerate(scripts):
        share = SHARES[script] / sum(SHARES[later] for later in scripts[number:])
        run_for(share * (end - time.monotonic()), script, options)


if __name__ == "__main__":
    main()
