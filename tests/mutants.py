"""Whether the tests would notice: mutants of the library, a line or two each, and the tests that are to kill them.

    python tests/mutants.py                                all of mutants.diff; half an hour on one core
    python tests/mutants.py properties/test_radius.py      those that these tests are to kill
    python tests/mutants.py --check                        only whether every text to replace is still there, once

A mutant is applied in a copy of the repository, where its tests run until the first of them fails. One that survives
says that a promise of the library is held by no test.
"""

import argparse
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import pytest
import torch  # noqa: F401  # so that the children need not

ROOT = Path(__file__).parent.parent
COPIED = ("apart_func", "tests", "conftest.py", "pyproject.toml", "examples", "benchmarks")


class Mutant(NamedTuple):
    """What is wrong in a file of `apart_func`: `new` in place of `old`, which stands there once."""

    tests: str
    file: str
    why: str
    old: str
    new: str


def read() -> list[Mutant]:
    """The mutants of `mutants.diff`: a heading names tests, and below it every block a file, what is wrong, and how."""
    found, tests = [], ""
    for block in (ROOT / "tests/mutants.diff").read_text(encoding="utf-8").split("\n\n"):
        title, *lines = block.strip("\n").split("\n")
        if title.startswith("# "):
            tests = title[2:]
        elif lines:
            file, _, why = title.partition(": ")
            old, new = ("\n".join(line[1:] for line in lines if line[0] == sign) for sign in "-+")
            found.append(Mutant(tests, file, why, old, new))
    return found


def main() -> None:
    """Run the chosen mutants, and exit with an error if one survives."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tests", nargs="*", help="headings of mutants.diff; all, if none is given")
    parser.add_argument("--check", action="store_true", help="only look for the texts")
    arguments = parser.parse_args()
    chosen = [mutant for mutant in read() if not arguments.tests or mutant.tests in arguments.tests]
    lost = [mutant for mutant in chosen if text_of(mutant, ROOT).count(mutant.old) != 1]
    for mutant in lost:
        print(f"{mutant.file}: {text_of(mutant, ROOT).count(mutant.old)} times, not once:\n{mutant.old}")
    if arguments.check or lost:
        sys.exit(len(lost))
    sys.dont_write_bytecode = True  # two mutants of a file may have one size and one time
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        for name in COPIED:
            (shutil.copytree if (ROOT / name).is_dir() else shutil.copy)(ROOT / name, copy / name)
        for tests in dict.fromkeys(mutant.tests for mutant in chosen):
            if failure := run(tests, copy):
                raise SystemExit(f"{tests} fails without a mutant: {failure}")
        survivors = sum([survives(mutant, copy) for mutant in chosen])
    print(f"{survivors} of {len(chosen)} survive")
    sys.exit(survivors > 0)


def text_of(mutant: Mutant, root: Path) -> str:
    """The file that a mutant changes."""
    return (root / "apart_func" / mutant.file).read_text(encoding="utf-8")


def survives(mutant: Mutant, copy: Path) -> bool:
    """Apply a mutant, run its tests, and take it back."""
    path, text = copy / "apart_func" / mutant.file, text_of(mutant, copy)
    path.write_text(text.replace(mutant.old, mutant.new), encoding="utf-8")
    failure = run(mutant.tests, copy)
    path.write_text(text, encoding="utf-8")
    verdict = f"killed by {failure.partition(' - ')[0]}" if failure else "SURVIVES"
    print(f"{mutant.file}: {mutant.why}: {verdict}", flush=True)
    return not failure


def run(tests: str, copy: Path) -> str:
    """The first test that fails, as pytest says it; nothing if all pass. A child runs them, which has torch already."""
    with tempfile.TemporaryFile("w+") as output:
        child = os.fork()
        if not child:
            os.dup2(output.fileno(), 1)
            os.dup2(output.fileno(), 2)
            os.chdir(copy)
            sys.path[0] = os.environ["PYTHONPATH"] = str(copy)
            names = [f"tests/{name}" for name in tests.split()]
            os._exit(pytest.main(["-x", "-q", "-m", "not slow", "-p", "no:cacheprovider", "-p", "no:xdist", *names]))
        _, status = os.waitpid(child, 0)
        output.seek(0)
        lines = output.read().splitlines()
    failures = [line.split(" ", 1)[1] for line in lines if line.startswith(("FAILED ", "ERROR "))]
    return "" if status == 0 else (failures or ["\n".join(lines[-20:])])[0]


if __name__ == "__main__":
    main()
