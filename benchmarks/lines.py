"""How long the project is, and how long it may be: `make lines`. Fails if a bound is broken.

python benchmarks/lines.py
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CORE = ["batch_norm", "layers", "running", "passes", "rules", "step", "one_pass"]
BOUNDS = {
    "apart_func": (["apart_func/*.py"], 4900),
    "its core": ([f"apart_func/{name}.py" for name in CORE], 1400),
    "benchmarks": (["benchmarks/*.py"], 3000),
    "experiments": (["examples/experiments/*.py"], 4500),
    "README.md": (["README.md"], 110),
    "examples/RESULTS.md": (["examples/RESULTS.md"], 90),
    "benchmarks/README.md": (["benchmarks/README.md"], 200),
}
FILE = 420  # of the package


def lines_of(patterns: list[str]) -> dict[str, int]:
    """The lines of files that git knows, or would add; * stands for folders too."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", *patterns]
    names = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.split()
    paths = {name: ROOT / name for name in names}
    return {name: len(path.read_text(encoding="utf-8").splitlines()) for name, path in paths.items() if path.exists()}


def main() -> None:
    """Print every count with its bound."""
    counts = {name: (sum(lines_of(patterns).values()), bound) for name, (patterns, bound) in BOUNDS.items()}
    longest, lines = max(lines_of(["apart_func/*.py"]).items(), key=lambda item: item[1])
    counts[f"the longest file, {longest}"] = lines, FILE
    for name, (count, bound) in counts.items():
        print(f"{count:6d} of {bound:5d}  {name}{'' if count <= bound else '   TOO LONG'}")
    sys.exit(any(count > bound for count, bound in counts.values()))


if __name__ == "__main__":
    main()
