"""The layout: a module of the library imports only modules above it."""

import ast
import re
from pathlib import Path
from sys import stdlib_module_names

import pytest

import apart_func

PACKAGE = Path(apart_func.__file__).parent
# From the top down. A module may import what stands on the lines above its own.
LAYERS = [
    {"errors", "_torch"},
    {"summary", "batch_norm", "checks", "snapshot", "intercept"},
    {"trees", "kernels"},
    {"groups", "running", "autodiff", "rules", "perturbed", "ranks", "samples"},
    {"state", "layers", "settings", "losses"},
    {"stateless"},
    {"functional"},
    {"passes", "robustness", "contexts"},
    {"calls"},
    {"step"},
    {"one_pass"},
    {"dropin"},
    {""},
]
# What makes the method safe and useful. The method itself knows of these two alone, and of errors.
EDGE = {"checks", "ranks", "contexts", "dropin", "robustness"}
KNOWN_EDGE = {"checks", "ranks"}
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
RUN_TIME = {"torch", "einops"}
# Below all of them: a module for each package, which it is named after, and which it may import.
INTEGRATIONS = {
    "integrations.lightning": {"lightning", "pytorch_lightning", "torchmetrics"},
    "integrations.transformers": {"transformers"},
}


def name_of(path: Path) -> str:
    """The dotted name of a module inside the package; that of a folder is its `__init__`."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


ALL = {name_of(path): path for path in PACKAGE.rglob("*.py")}
FILES = {name: path for name, path in ALL.items() if not name.startswith("integrations")}
every_module = pytest.mark.parametrize("module", sorted(FILES))


def imports(module: str) -> list[tuple[str, str]]:
    """Every dotted name that a module imports, wherever in the file, and what it takes from there; "" for all."""
    found: list[tuple[str, str]] = []
    for node in ast.walk(ast.parse(ALL[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [(alias.name, "") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{module} imports relatively; name the module in full"
            found += [(node.module or "", alias.name) for alias in node.names]
    return found


def imported(module: str) -> set[str]:
    return {name for name, _ in imports(module)}


def ours(module: str) -> set[str]:
    return {name.partition(".")[2] for name in imported(module) if name.partition(".")[0] == "apart_func"}


def test_every_module_has_its_place() -> None:
    assert FILES.keys() == LEVEL.keys()


@every_module
def test_a_module_imports_public_names_from_above_and_packages_of_run_time(module: str) -> None:
    wrong = {name for name in ours(module) if LEVEL[name] >= LEVEL[module]}
    assert not wrong, f"{module} imports {sorted(wrong)}, which stand beside or below it"
    assert not [name for source, name in imports(module) if source.startswith("apart_func") and name.startswith("_")]
    assert {name.split(".")[0] for name in imported(module)} - stdlib_module_names - {"apart_func"} <= RUN_TIME
    if module not in EDGE | {""}:
        assert ours(module) & EDGE <= KNOWN_EDGE, f"{module}, which is of the method, imports from its edge"


def test_integrations_import_the_library_and_their_package_alone() -> None:
    assert ALL.keys() - FILES.keys() == {"integrations", *INTEGRATIONS}
    assert imported("integrations") == set()
    for module, packages in INTEGRATIONS.items():
        names = imported(module)
        assert {name.split(".")[0] for name in names} - stdlib_module_names <= {"apart_func", "torch"} | packages
        assert {name.partition(".")[2] for name in names if name.startswith("apart_func")} <= LEVEL.keys()


def test_private_names_of_torch_are_in_one_file() -> None:
    """`_torch.py` has them, each with a canary."""
    for module, path in FILES.items():
        if module == "_torch":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            chain = dotted(node) if isinstance(node, ast.Attribute) else ""
            private = [part for part in chain.split(".")[1:] if part.startswith("_") and not part.startswith("__")]
            assert not (chain.startswith("torch.") and private), f"{module} calls {chain}, which belongs in _torch.py"


def dotted(node: ast.AST) -> str:
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def test_isinstance_is_asked_of_tuples_of_types_which_the_compiler_of_torch_2_8_traces() -> None:
    """It knows no unions, and ruff is content with either."""
    for path in PACKAGE.rglob("*.py"):
        for call in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(call, ast.Call) and getattr(call.func, "id", "") == "isinstance":
                assert not isinstance(call.args[1], ast.BinOp), f"{path.name}, line {call.lineno}"


def test_the_page_on_the_layout_names_every_file_once() -> None:
    page = (PACKAGE.parent / "docs" / "layout.md").read_text(encoding="utf-8")
    named = re.findall(r"`(\w+)\.py`", "\n".join(line for line in page.splitlines() if line.startswith("|")))
    assert sorted(named) == sorted(name for name in FILES if name)
