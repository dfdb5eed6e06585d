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
.PHONY: help setup quickstart demo browser test test-fast test-contract lint docs lock bench clean

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

demo: $(VENV)/.dev ## watch a pull request become a model: every comment, real jobs, no account, no network
	$(BIN)/python scripts/dev/demo.py

browser: $(VENV)/.dev ## bring Chromium and its driver, for the tests of the run board (Debian)
	$(BIN)/python scripts/dev/browser.py

test: $(VENV)/.dev ## every test
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile

test-fast: $(VENV)/.dev ## the tests that need no torch
	$(BIN)/python -m pytest -m "not slow" -n $(JOBS) --dist worksteal

test-contract: $(VENV)/.dev ## requests and answers against GitHub's published API description
	$(BIN)/python -m pytest tests/test_contract_*.py

lint: $(VENV)/.dev ## ruff, types, generated files, workflows
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python scripts/dev/generate_docs.py --check
	$(BIN)/zizmor --offline --persona=pedantic --no-progress .github
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/actionlint
	$(BIN)/check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml
	$(BIN)/check-jsonschema --builtin-schema vendor.github-actions .github/actions/*/action.yml
	$(BIN)/act --validate --strict -P ubuntu-24.04=-self-hosted

docs: $(VENV)/.dev ## write the generated pages and the JSON schema
	$(BIN)/python scripts/dev/generate_docs.py

lock: $(VENV)/.dev ## pin requirements/*.txt anew from pyproject.toml
	$(BIN)/python scripts/dev/lock_requirements.py

bench: $(VENV)/.dev ## every benchmark, one table each
	$(BIN)/python benchmarks/check_cold.py
	$(BIN)/python benchmarks/check_many.py
	$(BIN)/python benchmarks/merge.py
	$(BIN)/python benchmarks/train_overhead.py
	$(BIN)/python benchmarks/train_throughput.py --models llama
	$(BIN)/python benchmarks/rehearse.py
	$(BIN)/python benchmarks/trace.py
	$(BIN)/python benchmarks/exactly_once.py --plans 2000
	$(BIN)/python benchmarks/reconcile.py --experiments 1000
	$(BIN)/python benchmarks/large_repository.py

clean: ## remove runs, caches and the virtual environment
	rm -rf $(VENV) runs build demo site .pytest_cache .mypy_cache .ruff_cache
