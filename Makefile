# `make demo` and `make test` do everything on a fresh machine: they create .venv and reuse it until the lock changes.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEMO := runs/quickstart
MINUTES ?= 8

.PHONY: demo test check lint format types env clean

env: $(VENV)/.ready

$(VENV)/.ready: constraints.txt pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

demo: env
	$(BIN)/calm quickstart $(DEMO) --minutes $(MINUTES)

test: check
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow" --numprocesses 2 --dist loadfile

check: lint types

lint: env
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: env
	$(BIN)/mypy

format: env
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) runs
