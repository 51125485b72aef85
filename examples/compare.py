"""Plain training against APART on real images: `python examples/compare.py`.

Every seed trains the same small ResNet five times, from the same weights and on the same batches: plainly, plainly
for twice the epochs (an APART step costs two passes), with APART, and both with a weight decay that validation images
chose for plain training: the honest comparison is with that. The paired differences in test error, a table of them,
and the learning curves are written to `--out`. The intervals speak of new weights and batches on this split of the
data, not of other splits. A comparison that was stopped goes on with the same command.
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import tyro
from experiments import report, sweep
from experiments.runs import RunError, find_finished, read_run


@dataclass(frozen=True)
class Settings:
    """What is compared, and on what; all else is as `python -m experiments train --data digits` has it.

    Attributes:
        data: bundled data set; nothing is downloaded.
        measure_on: images that measure the error. Choose settings on validation images.
        seeds: number of paired runs, at least two.
        epochs: passes over the training images; the second plain run takes twice as many.
        weight_decay: that of the tuned rows.
        epsilon: APART's perturbation radius.
        groups: APART's ghost groups in the adversarial pass.
        processes: that train at the same time, with one thread each.
        out: folder for compare.md, compare.json and compare.png, and for the runs.
    """

    data: Literal["digits", "mnist5k"] = "digits"
    measure_on: Literal["test", "validation"] = "test"
    seeds: int = 12
    epochs: int = 60
    weight_decay: float = 0.016
    epsilon: float = 0.1
    groups: int = 4
    processes: int = 2
    out: Path = Path("runs/compare")

    def __post_init__(self) -> None:
        """Refuse what has no interval."""
        if self.seeds < 2:
            raise ValueError(f"an interval over seeds needs at least two of them: seeds is {self.seeds}")


def main(settings: Settings) -> None:
    """Train all pairs, print the table, and write it and the figure.

    Args:
        settings: from the command line.
    """
    start = time.perf_counter()
    every = max(1, settings.epochs // 20)
    runs = settings.out / "runs"
    grid = sweep.Grid(epsilons=(settings.epsilon,), seeds=settings.seeds, processes=settings.processes, out=runs)
    tuned = replace(grid, factors=(1,), vary=(f"weight-decay={settings.weight_decay}",))
    options = ["--data", settings.data, "--epochs", str(settings.epochs), "--groups", str(settings.groups)]
    for part in (grid, tuned):
        sweep.run(part, [*options, "--evaluate-every", str(every)])
    found = [read_run(folder, settings.measure_on) for folder in find_finished([runs])]
    report.report(settings.data, found, settings.measure_on, settings.out / "compare")
    print(f"Took {time.perf_counter() - start:.0f} s, {settings.seeds} paired seeds.")


if __name__ == "__main__":
    try:
        main(tyro.cli(Settings, description=__doc__))
    except (ValueError, RunError) as error:
        sys.exit(f"error: {error}")
