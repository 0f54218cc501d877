# Two commands for a newcomer: `make demo` and `make test`. Each makes .venv, and installs what it needs, if it is missing.
# The others are the stages of CI (.ci/run).
PYTHON    ?= python3
PROCESSES ?= 2
VENV      := .venv
BIN       := $(VENV)/bin
DEMO      := $(VENV)/.installed-demo
DEV       := $(VENV)/.installed-dev

.PHONY: demo test test-all lint types imports docs build clean

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "mmoe needs Python 3.10 or newer; run: make PYTHON=/path/to/python3.10"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip

$(DEMO): pyproject.toml | $(BIN)/python
	@test -e $(DEV) -a $(DEV) -nt pyproject.toml || $(BIN)/python -m pip install --quiet -e '.[media,report]'
	@touch $@

$(DEV): pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet -e '.[dev]'
	@touch $@

demo: $(DEMO)
	$(BIN)/python experiments/demo.py

# Tests are many small steps: one thread a process is the quickest, and gives the same numbers everywhere.
test: $(DEV)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(PROCESSES) -m "not slow"

test-all: $(DEV)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(PROCESSES)

lint: $(DEV)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python tools/check_names.py

types: $(DEV)
	$(BIN)/mypy

imports: $(DEV)
	$(BIN)/lint-imports --no-cache

docs: $(DEV)
	$(BIN)/python tools/check_docs.py

build: $(DEV)
	$(BIN)/python tools/check_build.py

clean:
	rm -rf $(VENV) out runs build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis .import_linter_cache
