"""Run the tutorial and keep its outputs: `python docs/run_tutorial.py`, or `make tutorial`."""

from __future__ import annotations

from pathlib import Path

import nbformat
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).parent / "tutorial.ipynb"


def main() -> None:
    """Write it in place, without a trace of when that was; an error in a cell is raised."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    NotebookClient(notebook, timeout=600, record_timing=False).execute()
    nbformat.write(notebook, NOTEBOOK)


if __name__ == "__main__":
    main()
