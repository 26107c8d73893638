# `make up` starts everything a newcomer needs; `make test` is all that CI runs.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin

.PHONY: up down install lint test soak bench clean

up: install
	$(BIN)/millpond up

down: install
	$(BIN)/millpond down

install: $(VENV)/.installed

# Installed anew whenever what is to be installed changes.
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[local,emqx,dev]'
	touch $@

lint: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

test: lint
	$(BIN)/pytest tests/unit tests/simulation --numprocesses auto --cov --cov-report=term-missing:skip-covered
	$(BIN)/python -m tests.simulation --agent queue --first 1000 --seeds 1500
	$(BIN)/pytest tests/contracts tests/system --numprocesses 2 --dist loadfile

# Long simulations: more seeds than CI has time for.
soak: install
	$(BIN)/python -m tests.simulation

bench: install
	$(BIN)/python -m tests.benchmarks

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis .coverage
