"""The layout: a module of the library imports only modules above it."""

import ast
from pathlib import Path

import pytest

import apart_func

PACKAGE = Path(apart_func.__file__).parent
# From the top down. A module may import what stands on the lines above its own.
LAYERS = [
    {"errors"},
    {"autodiff", "pytrees"},
    {"kernels", "perturbation", "distributed"},
    {"batch_norm"},
    {"intercept"},
    {"functional"},
    {"passes", "robustness"},
    {"step"},
    {"sam", "one_pass"},
    {"module"},
    {"__init__"},
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
RUN_TIME = {"torch"}


def imported(module: str) -> set[str]:
    """Every dotted name that a module imports, wherever in the file."""
    names: set[str] = set()
    for node in ast.walk(ast.parse((PACKAGE / f"{module}.py").read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module or "")
    return names


@pytest.mark.parametrize("module", sorted(path.stem for path in PACKAGE.glob("*.py")))
def test_a_module_imports_only_from_above(module: str) -> None:
    ours = {name.split(".")[1] for name in imported(module) if name.startswith("apart_func.")}
    wrong = {name for name in ours if LEVEL[name] >= LEVEL[module]}
    assert not wrong, f"{module} imports {sorted(wrong)}, which stand beside or below it"


@pytest.mark.parametrize("module", sorted(path.stem for path in PACKAGE.glob("*.py")))
def test_the_library_depends_on_torch_alone(module: str) -> None:
    from sys import stdlib_module_names

    foreign = {name.split(".")[0] for name in imported(module)} - stdlib_module_names - {"apart_func"}
    assert foreign <= RUN_TIME
