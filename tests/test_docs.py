"""Every block of Python in a text runs: those of a page one after another, in one namespace, as a reader would do."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from mktestdocs import grab_code_blocks

from apart_func import split_state

ROOT = Path(__file__).parent.parent
PAGES = {path.relative_to(ROOT).as_posix(): path for path in (ROOT / "README.md", *(ROOT / "docs").rglob("*.md"))}
BLOCKS = {name: grab_code_blocks(path.read_text(encoding="utf-8"), lang="python") for name, path in PAGES.items()}
CODE = [
    pytest.param(name, marks=[pytest.mark.slow] if any("torch.compile(" in block for block in blocks) else [])
    for name, blocks in BLOCKS.items()
    if blocks
]

# What the README leaves to the reader: a loader, and the sizes of its batches.
LOADER = [(torch.randn(32, 3, 32, 32), torch.arange(32))]
GIVEN: dict[str, dict[str, Any]] = {"README.md": {"loader": LOADER, "M": 32, "N": 32}}


@pytest.mark.parametrize("page", CODE)
def test_the_code_of_a_page_runs_and_prints_what_is_said(page, monkeypatch, capsys):
    """As under torchrun with one process, which only the page about processes notices."""
    for key, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "0"}.items():
        monkeypatch.setenv(key, value)
    namespace = {"__name__": "page", **GIVEN.get(page, {})}
    for number, block in enumerate(BLOCKS[page], start=1):
        exec(compile(block, f"{page}, block {number}", "exec"), namespace)
    printed = without_fractions(capsys.readouterr().out)
    for block in grab_code_blocks(PAGES[page].read_text(encoding="utf-8"), lang="text"):
        assert without_fractions(block).strip() in printed


def without_fractions(text: str) -> str:
    """Losses round otherwise on another machine."""
    return re.sub(r"\d+\.\d+", "…", text)


def test_every_block_says_what_language_it_is_in() -> None:
    """One without a language, or in an unusual one, would be skipped in silence."""
    for name, path in PAGES.items():
        fences = [
            line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip().startswith("```")
        ]
        assert set(fences[::2]) <= {"```python", "```sh", "```text"}, name
        assert set(fences[1::2]) <= {"```"}, name


@pytest.mark.parametrize("page", PAGES)
def test_the_files_that_a_page_names_exist(page: str) -> None:
    """Paths from the root of the repository; those of one's own runs and data do not count."""
    named = re.findall(
        r"`((?:apart_func|benchmarks|docs|examples|tests)/[\w/.-]+)`", PAGES[page].read_text(encoding="utf-8")
    )
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_the_tutorial_runs_and_its_kept_output_is_that_of_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its cells one after another, with a quarter of the epochs; `make tutorial` runs all of it."""
    pyplot = pytest.importorskip("matplotlib.pyplot")
    monkeypatch.setattr(pyplot, "show", pyplot.close)
    cells = json.loads((ROOT / "docs" / "tutorial.ipynb").read_text(encoding="utf-8"))["cells"]
    namespace: dict[str, Any] = {"__name__": "tutorial"}
    threads = torch.get_num_threads()
    for cell in cells:
        if cell["cell_type"] == "code":
            exec("".join(cell["source"]).replace("epochs=40", "epochs=10"), namespace)
    torch.set_num_threads(threads)
    outputs = [output for cell in cells for output in cell.get("outputs", ())]
    (kept,) = (
        text for text in ("".join(o.get("data", {}).get("text/plain", "")) for o in outputs) if "StepOutput" in text
    )

    def shapes(text: str) -> list[str]:
        return [line for line in text.splitlines() if "loss" not in line]  # these round otherwise elsewhere

    batch = tuple(part[:64] for part in namespace["train"])
    first = namespace["step"](*split_state(namespace["initial"]), batch, namespace["delta"])
    assert shapes(kept) == shapes(repr(first))
