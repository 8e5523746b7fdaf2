# Everything is set up by the targets themselves, in .venv, from nothing but Python (3.10 to 3.13, with venv) and make.
#
#   make demo     train a cart-pole controller with two gradient flows side by side, about two minutes on two cores
#   make test     lint, types and tests
#   make lint     lint and types
#   make kills    200 trainings ended by SIGKILL and resumed (KILLS=N: so many); eight minutes on busy cores
#   make memory   memory over 20 000 updates of two flows (UPDATES=N: so many); two to four minutes
#   make mutants  plant an error in every term of every built-in adjoint, and see it caught; writes docs/mutants.md
#   make test-emulator   the kernels of GPUs executed on this machine: all cases, all sanitized (needs g++; long)
#   make clean    remove what these made (runs/ stays)
#
# PYTHON names another interpreter, PIP_ARGS goes to pip. On Linux, PyPI's torch brings CUDA along (some GB); without a GPU
#   make demo PIP_ARGS="--extra-index-url https://download.pytorch.org/whl/cpu"
# is quicker. PYTEST_ARGS goes to pytest: make test PYTEST_ARGS="-m 'not slow'"; -n 0 there keeps to one process.

PYTHON ?= python3
PIP_ARGS ?=
PYTEST_ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
# torch by its exact version and first: pip then looks no further for one (a build for the CPU, where it finds one).
TORCH := $(shell grep '^torch==' constraints.txt)
PIP_INSTALL := $(BIN)/python -m pip install --disable-pip-version-check --quiet $(PIP_ARGS) -c constraints.txt $(TORCH)
SETTINGS := pyproject.toml constraints.txt

KILLS ?= 200
UPDATES ?= 20000

.PHONY: demo test test-emulator lint mutants kills memory clean

demo: $(VENV)/.ready-cli
	$(BIN)/warp-sims demo

test: lint
	$(BIN)/python -m pytest -n auto --dist loadfile $(PYTEST_ARGS)

test-emulator: $(VENV)/.ready-dev
	EMULATOR=whole $(BIN)/python -m pytest tests/emulator tests/test_gpu.py $(PYTEST_ARGS)

lint: $(VENV)/.ready-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	.ci/types $(BIN)/pyright $(BIN)/python

kills: $(VENV)/.ready-dev
	OMP_NUM_THREADS=1 PYTHONPATH=tests $(BIN)/python tests/kills.py $(KILLS)

memory: $(VENV)/.ready-dev
	OMP_NUM_THREADS=1 PYTHONPATH=tests $(BIN)/python tests/long_run.py $(UPDATES)

mutants: $(VENV)/.ready-dev
	OMP_WAIT_POLICY=PASSIVE OMP_NUM_THREADS=1 $(BIN)/python tests/mutation_run.py

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis .types
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' || \
		{ echo "$$($(PYTHON) --version) found, Python 3.10 to 3.13 wanted: make PYTHON=python3.12 ..." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

# A stamp per set of packages: a second call finds it and goes straight to work.
$(VENV)/.ready-cli: $(SETTINGS) | $(BIN)/python
	@echo "installing torch, warp and what draws into $(VENV) (a few minutes, once)"
	$(PIP_INSTALL) -e ".[cli]"
	@touch $@

$(VENV)/.ready-dev: $(SETTINGS) | $(BIN)/python
	@echo "installing torch, warp, jax and the tools of the tests into $(VENV) (a few minutes, once)"
	$(PIP_INSTALL) -e ".[cli,tensorboard,bench,robots,gymnasium,dev]"
	@touch $@ $(VENV)/.ready-cli
