# `make demo` shows what the method does, `make test` checks the library; both need only Python 3.10 or later.
PYTHON ?= python3
RUN := .venv/bin/python
# One thread a process: the tests and the demo run small models, which two threads only slow down.
export OMP_NUM_THREADS ?= 1

.PHONY: demo test lint format bench clean

demo: .venv/ready
	$(RUN) examples/compare.py

test: .venv/ready
	$(RUN) -m pytest -n 2 --cov=apart_func --cov-report=term --cov-fail-under=95

lint: .venv/ready
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

format: .venv/ready
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .

.venv/ready: pyproject.toml
	test -x $(RUN) || $(PYTHON) -m venv .venv
	$(RUN) -m pip install --quiet --editable '.[dev]'
	touch $@

# Under ten minutes on two cores; without --quick the scripts measure all models, ratios and groups.
bench: .venv/ready
	for script in step_cost layer_cost memory compile scaling; do \
		OMP_PROC_BIND=true $(RUN) benchmarks/$$script.py --quick || exit 1; done
	$(RUN) benchmarks/render.py

clean:
	rm -rf .venv
