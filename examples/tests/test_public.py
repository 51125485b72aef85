"""The experiments use the library as anyone can."""

from __future__ import annotations

import ast
from pathlib import Path

import experiments
import pytest

import apart_func
from apart_func import robustness

FILES = sorted(Path(experiments.__path__[0]).glob("*.py"))
ROBUSTNESS = {name for name in vars(robustness) if not name.startswith("_")}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_names_of_the_library_are_public(path: Path) -> None:
    public = {"apart_func": {*apart_func.__all__}, "apart_func.robustness": ROBUSTNESS}
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("apart_func"):
            assert {alias.name for alias in node.names} <= public[node.module]
        if isinstance(node, ast.Import):
            assert {alias.name for alias in node.names if alias.name.startswith("apart_func")} <= {"apart_func"}
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "apart":
            assert node.attr in apart_func.__all__
