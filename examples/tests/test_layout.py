"""The experiments use the library as anyone can, and their page names every file."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import experiments
import pytest

import apart_func
from apart_func import robustness

PAGE = Path(__file__).parents[2] / "docs/experiments.md"
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


def test_the_page_of_the_experiments_names_every_file() -> None:
    named = re.findall(r"^\| `(\w+\.py)` \|", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(named) == [path.name for path in FILES if not path.stem.startswith("__")]


def test_every_file_imports_those_above_it_on_the_page_alone() -> None:
    order = re.findall(r"^\| `(\w+)\.py` \|", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    for number, name in enumerate(order):
        text = (FILES[0].parent / f"{name}.py").read_text(encoding="utf-8")
        imported = re.findall(r"^from experiments\.(\w+) import", text, re.MULTILINE)
        for names in re.findall(r"^from experiments import (.+)", text, re.MULTILINE):
            imported += names.split(", ")
        assert {*imported} <= {*order[:number]}, name
