# make venv | demo | demo-clean | test | test-fast | test-long | test-all | lint | docs
# PYTHON=... uses an environment of your own; TENTH=0 to 9 takes a tenth of the long tests.
VENV ?= .venv
PYTHON ?= $(VENV)/bin/python
# Named first because a CPU build of this release satisfies the parity extra.
TORCH ?= torch==2.13.0
# The compiler that tests/data/lightning_schedule.json was counted with.
LIBTPU ?= libtpu==0.0.51
PYTEST_ARGS ?=
# The test extra brings libtpu, which would look for a TPU.
export JAX_PLATFORMS ?= cpu
DEMO_READY := $(VENV)/.m1-jax-runs
TEST_READY := $(VENV)/.m1-jax-tests
ifneq ($(PYTHON),$(VENV)/bin/python)
DEMO_READY :=
TEST_READY :=
endif

.PHONY: venv demo demo-clean test test-fast test-long test-all lint docs
venv: $(TEST_READY)

$(VENV)/.m1-jax-runs: pyproject.toml
	python3 -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet -e '.[demo]'
	touch $@

$(VENV)/.m1-jax-tests: $(VENV)/.m1-jax-runs
	[ "$$(uname -sm)" != "Linux x86_64" ] || $(VENV)/bin/python -m pip install --quiet $(TORCH) $(LIBTPU)
	$(VENV)/bin/python -m pip install --quiet -e '.[test,rl,parity,dev,docs]'
	touch $@

demo: $(DEMO_READY)
	PYTHONPATH=. $(PYTHON) demo/run.py

demo-clean:
	rm -rf demo/out

test: $(TEST_READY)
	$(PYTHON) -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not long" $(PYTEST_ARGS)

test-fast: $(TEST_READY)
	$(PYTHON) -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not slow and not long" $(PYTEST_ARGS)

test-long: $(TEST_READY)
	$(PYTHON) -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m long $(if $(TENTH),--tenth=$(TENTH)) $(PYTEST_ARGS)

test-all: $(TEST_READY)
	$(PYTHON) -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(if $(TENTH),--tenth=$(TENTH)) $(PYTEST_ARGS)

lint: $(TEST_READY)
	$(PYTHON) -m ruff check .
	$(PYTHON) -m pyright --pythonpath "$$($(PYTHON) -c 'import sys; print(sys.executable)')"

docs: $(TEST_READY)
	$(PYTHON) -m sphinx -W --keep-going -n -q -b html docs docs/_build/html
	@echo "open docs/_build/html/index.html"
