"""Run the tutorial anew, and keep its outputs: `python docs/run_tutorial.py`, or `make tutorial`."""

from __future__ import annotations

from pathlib import Path

import nbformat
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).parent / "tutorial.ipynb"


def executed(path: Path) -> nbformat.NotebookNode:
    """The notebook with the outputs of a run, and no trace of when that was.

    Raises:
        CellExecutionError: a cell raised an error.
    """
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=600, record_timing=False).execute()
    return notebook


def main() -> None:
    """Write it in place."""
    nbformat.write(executed(NOTEBOOK), NOTEBOOK)


if __name__ == "__main__":
    main()
