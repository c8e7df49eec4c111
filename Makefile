# Every target works alone on a machine with python3 (3.11 to 3.13) and make: it makes the virtual environment first.
#   make demo      fine-tune a real model through the service and call it
#   make up        start the service (Ctrl-C stops it)
#   make test      all tests          make check    lint, types, tests
#   make bench     speed, as ratios in one run
#   make chaos     training whose workers are killed 50 times   make soak      500 times
# TORCH_INDEX=URL takes torch from another package index (on Linux without a GPU: the index of its CPU builds, 200 MB instead of gigabytes).

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: install demo up test lint types check bench chaos soak clean
.DEFAULT_GOAL := check

install: $(READY)

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(0 if (3, 11) <= sys.version_info < (3, 14) else "error: python3 is %d.%d; Tuneyard needs 3.11 to 3.13.\n  fix: make PYTHON=/path/to/python3.12 ..." % sys.version_info[:2])'
	@echo "==> Making the virtual environment in $(VENV) (once; a few minutes, mostly downloads)"
	@$(PYTHON) -m venv $(VENV) || { echo "error: python3 cannot make virtual environments."; echo "  fix: install its venv module (Debian: apt-get install python3-venv)"; exit 1; }
	@echo "==> 1/2 torch"
	@$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch
	@echo "==> 2/2 Tuneyard and everything else it needs"
	@$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $(READY)

demo: $(READY)
	@$(BIN)/tuneyard demo

up: $(READY)
	@$(BIN)/tuneyard up

test: $(READY)
	@$(BIN)/python -m pytest

lint: $(READY)
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

types: $(READY)
	@$(BIN)/pyright

check: lint types test

bench: $(READY)
	@$(BIN)/python -m tests.benchmarks.train
	@$(BIN)/python -m tests.benchmarks.scaling
	@$(BIN)/python -m tests.benchmarks.data
	@$(BIN)/python -m tests.benchmarks.curate

chaos: $(READY)
	@TUNEYARD_KILLS=50 $(BIN)/python -m pytest tests/chaos --timeout 3600

soak: $(READY)
	@TUNEYARD_KILLS=500 $(BIN)/python -m pytest tests/chaos --timeout 36000

clean:
	rm -rf $(VENV) *.egg-info .pytest_cache .ruff_cache .hypothesis
