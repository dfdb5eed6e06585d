# Everything a person types. `make help` lists it.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
JOBS ?= 2

# On Linux without an NVIDIA GPU, PyTorch's CPU wheels: 200 MB instead of gigabytes of CUDA. Where that index cannot be
# reached pip goes on with what it has; TORCH_INDEX= (empty) does not ask it.
ifeq ($(shell uname -s)$(shell command -v nvidia-smi),Linux)
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
endif
# torch alone, and first: with an index that cannot be reached pip tries several times for every package it asks for.
TORCH := $(shell grep '^torch==' requirements/train.txt)
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet

.DEFAULT_GOAL := help
.PHONY: help setup quickstart test test-fast lint docs lock bench clean

help: ## list the targets
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 14

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.train: requirements/train.txt pyproject.toml | $(BIN)/python
	@echo "installing the training stack into $(VENV) (about 2 GB of disk, once)"
	$(if $(TORCH_INDEX),$(PIP) install --retries 1 --no-deps --extra-index-url $(TORCH_INDEX) $(TORCH))
	$(PIP) install -r requirements/train.txt
	$(PIP) install --no-deps --no-build-isolation --editable .
	@touch $@

$(VENV)/.dev: requirements/dev.txt $(VENV)/.train
	$(PIP) install -r requirements/dev.txt
	@touch $@

setup: $(VENV)/.dev ## install everything into .venv

quickstart: $(VENV)/.train ## fine-tune, merge, quantise and compare a tiny model on this machine
	$(BIN)/mergetune run experiments/examples/quickstart.yaml

test: $(VENV)/.dev ## every test
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile

test-fast: $(VENV)/.dev ## the tests that need no torch
	$(BIN)/python -m pytest -m "not slow" -n $(JOBS) --dist worksteal

lint: $(VENV)/.dev ## ruff, types, generated files
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python scripts/dev/generate_docs.py --check

docs: $(VENV)/.dev ## write the generated pages and the JSON schema
	$(BIN)/python scripts/dev/generate_docs.py

lock: $(VENV)/.dev ## pin requirements/*.txt anew from pyproject.toml
	$(BIN)/python scripts/dev/lock_requirements.py

bench: $(VENV)/.dev ## every benchmark, one table each
	$(BIN)/python benchmarks/check_cold.py
	$(BIN)/python benchmarks/merge.py
	$(BIN)/python benchmarks/train_overhead.py

clean: ## remove runs, caches and the virtual environment
	rm -rf $(VENV) runs build .pytest_cache .mypy_cache .ruff_cache
