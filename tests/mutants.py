"""Whether the tests would notice: mutants of the library, one line each, and the tests that are to kill them.

    python tests/mutants.py                  every mutant; half an hour on one core
    python tests/mutants.py radius signs     those of these kinds
    python tests/mutants.py --check          only whether every text to replace is still found once

A mutant is applied in a copy of the repository, and its tests run there until the first of them fails. A mutant that
survives says that a promise is held by no test.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
COPIED = ("apart_func", "tests", "examples", "benchmarks", "conftest.py", "pyproject.toml")


class Mutant(NamedTuple):
    """A line that is wrong.

    Attributes:
        kind: what it is about.
        file: in `apart_func`.
        old: text that stands there once.
        new: what to write in its place.
        why: what is then wrong.
        tests: what is to find out, in `tests`.
    """

    kind: str
    file: str
    old: str
    new: str
    why: str
    tests: str


MUTANTS: list[Mutant] = []


def main() -> None:
    """Run the chosen mutants, and exit with the number of survivors."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kinds", nargs="*", help="kinds of mutants; all, if none is given")
    parser.add_argument("--check", action="store_true", help="only look for the texts")
    arguments = parser.parse_args()
    chosen = [mutant for mutant in MUTANTS if not arguments.kinds or mutant.kind in arguments.kinds]
    lost = [mutant for mutant in chosen if occurrences(mutant) != 1]
    for mutant in lost:
        print(f"{mutant.file}: found {occurrences(mutant)} times, not once: {mutant.old!r}")
    if arguments.check or lost:
        sys.exit(len(lost))
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        for name in COPIED:
            source = ROOT / name
            shutil.copytree(source, copy / name) if source.is_dir() else shutil.copy(source, copy / name)
        survivors = [mutant for mutant in chosen if survives(mutant, copy)]
    print(f"{len(chosen) - len(survivors)} of {len(chosen)} killed")
    sys.exit(len(survivors))


def occurrences(mutant: Mutant) -> int:
    """How often the text to replace stands in its file."""
    return (ROOT / "apart_func" / mutant.file).read_text(encoding="utf-8").count(mutant.old)


def survives(mutant: Mutant, copy: Path) -> bool:
    """Apply a mutant, run its tests, and take it back."""
    path = copy / "apart_func" / mutant.file
    text = path.read_text(encoding="utf-8")
    path.write_text(text.replace(mutant.old, mutant.new), encoding="utf-8")
    tests = [f"tests/{name}" for name in mutant.tests.split()]
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests]
    done = subprocess.run(
        command, cwd=copy, env={**os.environ, "PYTHONPATH": str(copy)}, capture_output=True, text=True
    )
    path.write_text(text, encoding="utf-8")
    if done.returncode not in (0, 1):  # neither all passed nor some failed
        raise SystemExit(
            f"{mutant.why}: pytest ended with {done.returncode}\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
        )
    verdict = "killed" if done.returncode else "SURVIVED"
    failed = next((line.split(" - ")[0] for line in done.stdout.splitlines() if line.startswith("FAILED")), "")
    print(f"{verdict:9}{mutant.kind:10}{mutant.file:16}{mutant.why}  {failed.removeprefix('FAILED ')}", flush=True)
    return not done.returncode


if __name__ == "__main__":
    main()
