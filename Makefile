PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
DEMO := $(VENV)/.installed-demo
DEV := $(VENV)/.installed-dev
LIVE_VENV ?= .venv-live
LIVE := $(LIVE_VENV)/.installed
# Where torch's CPU build is, unless pip has been told of further places already.
TORCH_INDEX ?= $(if $(PIP_FIND_LINKS)$(PIP_EXTRA_INDEX_URL),,--extra-index-url https://download.pytorch.org/whl/cpu)

.PHONY: demo test lint bench live-cpu live-demo test-live test-live-smoke clean
.DEFAULT_GOAL := demo

# Set-up happens once: the stamps are younger than what they depend on until a dependency changes.
$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(DEMO): pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) install --quiet --constraint constraints.txt --editable ".[plots]"
	touch $@

$(DEV): pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@ $(DEMO)

demo: $(DEMO)
	$(BIN)/biscale-gym compare --scenario paper-67 --controllers distserve,place-only,biscale,learned --seeds 3 --out results/demo

test: $(DEV)
	$(BIN)/python -m pytest -n 2

lint: $(DEV)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(DEMO)
	$(BIN)/python scripts/benchmark.py engine

# vLLM asks for versions of its own, hence an environment of its own: 3.6 GB, all of it hash-checked.
$(LIVE): requirements-live-cpu.txt pyproject.toml
	$(PYTHON) -c 'import sys; sys.version_info[:2] == (3, 11) or sys.exit("live-cpu needs Python 3.11: PYTHON=python3.11 make live-cpu")'
	$(PYTHON) -m venv $(LIVE_VENV)
	$(LIVE_VENV)/bin/python -m pip --disable-pip-version-check install --quiet --no-deps --require-hashes \
		$(TORCH_INDEX) --requirement requirements-live-cpu.txt
	$(LIVE_VENV)/bin/python -m pip --disable-pip-version-check install --quiet --no-deps --no-build-isolation --editable .
	touch $@

# The environment, and proof that it works.
live-cpu: test-live

live-demo: $(LIVE)
	$(LIVE_VENV)/bin/biscale-gym live --scenario live-smoke --controllers max-clock,biscale --out results/live

test-live: $(LIVE)
	$(LIVE_VENV)/bin/python -m pytest tests/live

# One prompt after another through a real prefill and a real decode worker; `.ci/run` always does.
test-live-smoke: $(LIVE)
	$(LIVE_VENV)/bin/python -m pytest tests/live -m live_smoke

clean:
	rm -rf results build dist .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis
	find . \( -path ./$(VENV) -o -path ./$(LIVE_VENV) \) -prune -o -type d -name __pycache__ -exec rm -rf {} +
