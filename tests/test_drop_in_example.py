"""The example of the drop-in: that it runs, and that its two loops differ by the method alone."""

from __future__ import annotations

import drop_in
import pytest
import torch
from drop_in import Settings

TINY = Settings(epochs=3)


def test_it_trains_both_networks_and_prints_a_line_for_each(capsys: pytest.CaptureFixture[str]) -> None:
    runs = drop_in.main(TINY)
    printed = capsys.readouterr().out
    for name, run in runs.items():
        assert 0.1 < run.accuracy <= 1  # chance is 0.1
        assert f"{run.accuracy:.2%}" in printed
        assert name in printed


def distance(settings: Settings) -> float:
    """How far apart the two trained networks are, relative to the plain one."""
    runs = drop_in.main(settings)
    plain, apart = (torch.cat([p.flatten() for p in runs[name].model.parameters()]) for name in ("plain", "APART"))
    return ((apart - plain).norm() / plain.norm()).item()


def test_the_two_loops_differ_by_the_method_alone() -> None:
    # Half of a gradient twice is the gradient, but for float32 rounding, which four steps enlarge.
    assert distance(Settings(epochs=1, epsilon=0.0, groups=0)) < 1e-4
    assert distance(Settings(epochs=1)) > 1e-3
