# `make demo` and `make test` do everything on a fresh machine: they create .venv and reuse it until the lock changes.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEMO := runs/quickstart
MINUTES ?= 8
PIP_OPTIONS := --quiet --disable-pip-version-check -c constraints.txt

.PHONY: demo test test-slow check lint format types docs env clean

env: $(VENV)/.ready

$(VENV)/.ready: constraints.txt pyproject.toml
	@echo "make env: creating $(VENV)"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "make env: [1/2] torch: about 0.2 GB of downloads in its CPU build, 3 GB with CUDA (the default on Linux)"
	@echo "make env:       CPU build: make env PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu"
	$(BIN)/python -m pip install $(PIP_OPTIONS) torch
	@echo "make env: [2/2] the package, its extras and the tools of development: about 0.5 GB of downloads"
	$(BIN)/python -m pip install $(PIP_OPTIONS) -e '.[dev]'
	@echo "make env: done, $$(du -sh $(VENV) | cut -f1) in $(VENV)"
	touch $@

demo: env
	$(BIN)/calm quickstart $(DEMO) --minutes $(MINUTES)

test: check
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow" --numprocesses 2 --dist loadfile

test-slow: env
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow

check: lint types

lint: env
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: env
	$(BIN)/mypy

format: env
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: env
	$(BIN)/python -m pip install $(PIP_OPTIONS) -e '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

clean:
	rm -rf $(VENV) runs site
