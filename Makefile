# make venv | demo | test | test-fast | lint; PYTHON=... uses an environment of your own.
VENV ?= .venv
PYTHON ?= $(VENV)/bin/python
# Named first because a CPU build of this release satisfies the parity extra.
TORCH ?= torch==2.13.0
PYTEST_ARGS ?=
# The test extra brings libtpu, which would look for a TPU.
export JAX_PLATFORMS ?= cpu
STAMP := $(VENV)/.m1-jax-installed
READY := $(if $(filter $(VENV)/bin/python,$(PYTHON)),$(STAMP))

.PHONY: venv demo test test-fast lint
venv: $(STAMP)

$(STAMP): pyproject.toml
	python3 -m venv $(VENV)
	[ "$$(uname)" != Linux ] || $(VENV)/bin/python -m pip install --quiet $(TORCH)
	$(VENV)/bin/python -m pip install --quiet -e '.[test,parity,dev]'
	touch $@

demo: $(READY)
	PYTHONPATH=. $(PYTHON) demo/run.py

test: $(READY)
	$(PYTHON) -m pytest -n 2 $(PYTEST_ARGS)

test-fast: $(READY)
	$(PYTHON) -m pytest -n 2 -m "not slow" $(PYTEST_ARGS)

lint: $(READY)
	$(PYTHON) -m ruff check .
	$(PYTHON) -m pyright --pythonpath "$$($(PYTHON) -c 'import sys; print(sys.executable)')"
