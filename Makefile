# `make demo` shows what the method does, `make test` checks the library; both need only Python 3.10 or later.
PYTHON ?= python3
RUN := .venv/bin/python
# One thread a process: the tests and the demo run small models, which two threads only slow down.
export OMP_NUM_THREADS ?= 1

# Short forms of the experiments, as in `make train ARGS="--data digits --out runs/x"`. Folders count from here, as those
# of `make demo` do: this writes runs/x.
EXPERIMENTS := train sweep report evaluate evidence budget appendix
.PHONY: demo test test-slow lint format docs tutorial wheel matrix bench zoo gpu lines clean $(EXPERIMENTS)

demo: .venv/ready
	$(RUN) examples/compare.py

$(EXPERIMENTS): .venv/ready
	PYTHONPATH=examples $(RUN) -m experiments $@ $(ARGS)

# Coverage is that of the tests of the parts: to measure it takes half as long as a test again, most of all where a
# compiler traces. Ranks come first, since their processes would be started twice if two workers shared them.
PARTS := tests/ranks tests/core tests/models tests/dropin tests/integrations
test: PYTEST := -m pytest -n 2 --dist worksteal -m 'not slow'
test: .venv/ready
	$(RUN) $(PYTEST) --cov=apart_func --cov-report=term --cov-fail-under=95 $(PARTS)
	$(RUN) $(PYTEST) $(PARTS:%=--ignore=%)

# What needs minutes: Inductor, training on several processes, the zoo, more of the random networks.
test-slow: .venv/ready
	$(RUN) -m pytest -n 2 --dist worksteal -m slow

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

# The site, in site/. It needs no network once its packages are there.
docs: .venv/docs
	$(RUN) -m mkdocs build --strict

# Runs the tutorial anew and keeps its outputs; a minute.
tutorial: .venv/docs
	$(RUN) docs/run_tutorial.py

.venv/docs: .venv/ready
	$(RUN) -m pip install --quiet --editable '.[dev,docs]'
	touch $@

# Builds both distributions, and takes two steps with the wheel where nothing but its dependencies is installed.
wheel: .venv/ready
	PYTHON=$(RUN) tests/wheel.sh

# The table of docs/torch-versions.md; some 15 GB of packages and half an hour. MATRIX is pairs of Python and torch.
MATRIX ?= python3.10:2.0.1 python3.11:2.4.1 python3.12:2.8.0 python3.11:2.13.0 python3.11:2.14.1
matrix:
	tests/torch_matrix.sh $(MATRIX)

# The tables of benchmarks/README.md: half an hour on one core. benchmarks/README.md says how to compare two checkouts.
bench: .venv/ready
	$(RUN) benchmarks/step.py
	$(RUN) benchmarks/step.py --networks resnet --methods plain --compiled --name compiled
	$(RUN) benchmarks/step.py --scaling --compiled --name scaling
	for script in layer memory compile ranks; do $(RUN) benchmarks/$$script.py || exit 1; done
	$(RUN) benchmarks/render.py

# All forms of a step against the definition, on the networks of timm, torchvision and transformers, and the tables of
# docs/zoo.md: an hour on one core.
zoo: export PYTHONPATH := tests:benchmarks
zoo: .venv/ready
	$(RUN) -m pip install --quiet --editable '.[zoo]'
	for package in timm torchvision transformers; do \
		nice $(RUN) tests/zoo/zoo.py --packages $$package --name $$package || exit 1; done
	$(RUN) tests/zoo/zoo.py --page

# On a machine with a GPU: two minutes for the tests of CUDA, seven for the measurements. It needs no network, and of
# packages only PyTorch from 2.8 on, einops and pytest: without .venv, those of $(PYTHON) are taken.
gpu: export PYTHONPATH := $(CURDIR)
gpu: GPU_RUN := $(if $(wildcard .venv/ready),$(RUN),$(PYTHON))
gpu:
	timeout 120 $(GPU_RUN) -m pytest -q tests/core/test_cuda.py; tests=$$?; \
		$(GPU_RUN) benchmarks/gpu.py --minutes 7 && exit $$tests

# How long files and folders are; fails if one is longer than it may be.
lines:
	@$(PYTHON) benchmarks/lines.py

clean:
	rm -rf .venv
