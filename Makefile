# Each target sets up .venv by itself, once: a second call installs nothing.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: quickstart test test-all lint

quickstart: .venv/.run
	$(BIN)/python -m dyn_lightning.fit --config experiments/quickstart.yaml

test: .venv/.test
	$(BIN)/python -m pytest -m "not slow"

test-all: .venv/.test
	$(BIN)/python -m pytest

lint: .venv/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

.venv/.run: pyproject.toml | .venv
	$(BIN)/python -m pip install --editable .
	touch $@

.venv/.test: pyproject.toml | .venv
	$(BIN)/python -m pip install --editable '.[test]'
	touch $@

.venv:
	$(PYTHON) -m venv .venv
