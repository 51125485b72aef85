#!/usr/bin/env bash
# Builds both distributions into dist/, and takes two steps with the wheel in an empty environment. Dependencies are
# found in the environment of PYTHON, by a .pth file, since torch alone would take minutes; the library is the wheel's.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=$(realpath -s "${PYTHON:-.venv/bin/python}")
rm -rf dist
"$PYTHON" -m build --quiet --outdir dist .
du -b dist/*

empty=$(mktemp -d)
trap 'rm -rf "$empty"' EXIT
"$PYTHON" -m venv "$empty"
"$empty/bin/python" -m pip install --quiet --no-deps --no-index dist/*.whl
packages=$("$empty/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
"$PYTHON" -c 'import sysconfig; print(sysconfig.get_path("purelib"))' > "$packages/dependencies.pth"
cd "$empty"
env --unset=PYTHONPATH bin/python - "$packages" <<'PYTHON'
import sys
import torch
import apart_func
from apart_func import APART, make_apart_step, split_state

assert apart_func.__file__.startswith(sys.argv[1]), f"{apart_func.__file__} is not the wheel's"
model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.BatchNorm1d(8), torch.nn.Linear(8, 3))
params, buffers = split_state(model)
batch = torch.randn(16, 4), torch.randint(3, (16,))
step = make_apart_step(model, torch.nn.functional.cross_entropy, groups=4)
for _ in range(2):
    out = step(params, buffers, batch)
    buffers = out.buffers
assert buffers["1.num_batches_tracked"] == 2 and out.all_finite
print(f"apart_func {apart_func.__version__}: two steps taken, {APART(model)}")
PYTHON
