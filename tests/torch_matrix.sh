#!/usr/bin/env bash
# What works with which torch, as a table: tests/torch_matrix.sh PYTHON:TORCH ...  Environments are kept in .venv-torch/.
set -euo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH=$PWD OMP_NUM_THREADS=1
header=header
for pair in "$@"; do
    python=${pair%%:*} torch=${pair##*:} environment=.venv-torch/${pair//:/-}
    if [ ! -e "$environment/ready" ]; then
        "$python" -m venv "$environment"
        numpy=numpy
        [ "$torch" = 2.0.1 ] && numpy='numpy<2'  # it was built against the first
        "$environment/bin/pip" install --quiet "torch==$torch" einops hypothesis pytest "$numpy"
        touch "$environment/ready"
    fi
    "$environment/bin/python" tests/torch_versions.py $header 2> "$environment/failures.txt"
    header=
done
