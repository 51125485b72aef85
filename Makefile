# `make demo` shows what the method does, `make test` checks the library; both need only Python 3.10 or later.
PYTHON ?= python3
RUN := .venv/bin/python
# One thread a process: the tests and the demo run small models, which two threads only slow down.
export OMP_NUM_THREADS ?= 1

# Short forms of the experiments, as in `make train ARGS="--data digits --out runs/x"`; run in examples/.
EXPERIMENTS := train sweep report evaluate evidence robustness
.PHONY: demo test lint format bench clean $(EXPERIMENTS)

demo: .venv/ready
	$(RUN) examples/compare.py

$(EXPERIMENTS): .venv/ready
	cd examples && ../$(RUN) -m experiments $@ $(ARGS)

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

# About ten minutes on two cores; without --quick the scripts measure all models, ratios and groups. What is timed keeps
# the memory that it frees: mapping it anew takes a virtual machine as long as the arithmetic, now and then. How long a
# step takes to compile is left out, since it takes as long again: python benchmarks/compile.py --quick
KEEP_MEMORY := MALLOC_MMAP_THRESHOLD_=4294967296 MALLOC_TRIM_THRESHOLD_=17179869184
bench: export OMP_PROC_BIND := true
bench: .venv/ready
	for script in step_cost layer_cost scaling breakdown; do $(KEEP_MEMORY) $(RUN) benchmarks/$$script.py --quick || exit 1; done
	$(RUN) benchmarks/memory.py --quick
	$(RUN) benchmarks/render.py

clean:
	rm -rf .venv
