PYTHON ?= python3
VENV ?= .venv
PYTEST_ARGS ?= -n 2

BIN := $(VENV)/bin
SOURCES := $(wildcard setup.py llava_jax launch configs tests benchmarks)

.DEFAULT_GOAL := help
.PHONY: help demo test test-slow test-tpu-compile checks format clean

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-18s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo
	@echo "Another interpreter: make test PYTHON=python3.12 VENV=.venv312"

# The stamps are written last, so an installation that broke off is done again.
$(VENV)/.installed: setup.py
	test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --editable '.[dev]'
	touch $@

$(VENV)/.installed-tpu: $(VENV)/.installed
	$(BIN)/pip install --quiet --editable '.[tpu]'
	touch $@

# Without PyTorch, and without what the tests need.
$(VENV)/.installed-demo: setup.py
	test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --editable '.[data]'
	touch $@

demo: $(VENV)/.installed-demo  ## from an empty machine to demo.html
	$(BIN)/python launch/demo.py

test: $(VENV)/.installed-tpu  ## every quick test, one small compilation for a TPU with them
	$(BIN)/python -m pytest $(PYTEST_ARGS)

test-slow: $(VENV)/.installed  ## what takes minutes: runs killed at random moments, other devices
	$(BIN)/python -m pytest -m slow -n 0 --durations=0

test-tpu-compile: $(VENV)/.installed-tpu  ## compile for real TPU topologies (no TPU needed)
	$(BIN)/python -m pytest -m tpu_compile -n 0 -rP --durations=0

checks: $(VENV)/.installed  ## formatting, lint, types, import layers
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/basedpyright --pythonpath $(BIN)/python
	$(BIN)/python -m pytest --quiet tests/test_layers.py

format: $(VENV)/.installed  ## rewrite files the way `make checks` wants them
	$(BIN)/ruff check --fix $(SOURCES)
	$(BIN)/ruff format $(SOURCES)

clean:  ## remove caches and build outputs (environments stay)
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache
	find $(SOURCES) -name __pycache__ -type d -prune -exec rm -rf {} +
