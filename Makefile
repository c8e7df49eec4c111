# Every target works alone on a machine with python3 (3.11 to 3.13) and make: it makes the virtual environment first.
#   make demo      fine-tune a real model through the service and call it
#   make up        start the service (Ctrl-C stops it)
#   make test      all tests          make check    lint, types, tests
#   make test-vllm the vLLM engine's tests, on the CPU (an environment of its own; Linux on x86-64)
#   make bench     speed, as ratios in one run          make bench-serve   the speed of answering
#   make chaos     training whose workers are killed 50 times   make soak      500 times          make soak-serve  half an hour of mixed load
# TORCH_INDEX=URL takes torch from another package index (on Linux without a GPU: the index of its CPU builds, 200 MB instead of gigabytes).

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
VLLM := .venv-vllm

.PHONY: install demo up test test-vllm lint types check bench bench-serve chaos soak soak-serve clean
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

test-vllm: $(VLLM)/.ready
	@VLLM_CPU_KVCACHE_SPACE=1 $(VLLM)/bin/python -m pytest tests/vllm -W default --timeout 600 --durations 5

# What vLLM needs in other versions lies over .venv, which it sees besides: 1.3 GB instead of 4.
$(VLLM)/.ready: $(READY) constraints-vllm.txt
	@echo "==> Making vLLM's environment in $(VLLM) (once; a minute, mostly downloads)"
	@$(BIN)/python -m venv --clear $(VLLM)
	@$(BIN)/python -c 'import pathlib, site; \
		own = site.getsitepackages()[0]; \
		over = pathlib.Path(own.replace("$(VENV)", "$(VLLM)", 1), "over.pth"); \
		over.write_text(f"import site; site.addsitedir({own!r})\n")'
	@$(VLLM)/bin/pip install --quiet --disable-pip-version-check --no-deps --requirement constraints-vllm.txt
	@touch $@

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

bench-serve: $(READY)
	@$(BIN)/python -m tests.benchmarks.serve --output tests/benchmarks/results/serve-cpu.json

soak-serve: $(READY)
	@$(BIN)/python -m tests.benchmarks.mixed --output tests/benchmarks/results/mixed-cpu.json

chaos: $(READY)
	@TUNEYARD_KILLS=50 $(BIN)/python -m pytest tests/chaos --timeout 3600

soak: $(READY)
	@TUNEYARD_KILLS=500 $(BIN)/python -m pytest tests/chaos --timeout 36000

clean:
	rm -rf $(VENV) $(VLLM) *.egg-info .pytest_cache .ruff_cache .hypothesis
