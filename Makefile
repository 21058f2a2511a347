SHELL := /bin/sh
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --quiet --quiet --disable-pip-version-check
ARGS ?=

# The first interpreter that is new enough; `make PYTHON=/path/to/python` chooses another.
PYTHON ?= $(shell for name in python3 python3.14 python3.13 python3.12 python3.11 python; do \
	"$$name" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && { command -v "$$name"; break; }; done)

.PHONY: dashboard test bench lint types clean help

help:
	@echo "make dashboard   install into $(VENV) and serve the dashboard (ARGS=--port=5001 for another port)"
	@echo "make test        run the tests"
	@echo "make bench       run the benchmarks against their peers (ARGS=pool for one of them)"
	@echo "make lint        check style; make types: check types; make clean: remove $(VENV)"

dashboard: $(VENV)/.stamp-run
	@exec $(BIN)/wiseflow dashboard $(ARGS)

test: $(VENV)/.stamp-test
	@$(BIN)/python -m pytest $(ARGS)

bench: $(VENV)/.stamp-bench
	@$(BIN)/python -m tests.benchmarks --check $(ARGS)

lint: $(VENV)/.stamp-test
	@$(BIN)/python -m ruff check .
	@$(BIN)/python -m ruff format --check .

types: $(VENV)/.stamp-test
	@$(BIN)/python -m mypy

$(VENV)/.stamp-python:
	@if [ -z "$(PYTHON)" ]; then \
		echo "error: Python 3.11 or later was not found; install it, or run: make PYTHON=/path/to/python" >&2; exit 1; fi
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "error: $(PYTHON) is older than Python 3.11; run: make PYTHON=/path/to/a/newer/python" >&2; exit 1; }
	@"$(PYTHON)" -c 'import ensurepip, venv' 2>/dev/null || { \
		echo "error: $(PYTHON) cannot make virtual environments; install its venv package (Debian: python3-venv)" >&2; exit 1; }
	@"$(PYTHON)" -m venv "$(VENV)"
	@touch $@

$(VENV)/.stamp-run: $(VENV)/.stamp-python pyproject.toml
	@echo "installing wiseflow_nb into $(VENV) (once; it takes a minute or two)"
	@$(PIP) install -e .
	@touch $@

$(VENV)/.stamp-test: $(VENV)/.stamp-run pyproject.toml
	@echo "installing the test tools into $(VENV) (once)"
	@$(PIP) install -e ".[test]"
	@touch $@

$(VENV)/.stamp-bench: $(VENV)/.stamp-test pyproject.toml
	@echo "installing the peers of the benchmarks into $(VENV) (once)"
	@$(PIP) install -e ".[bench]"
	@touch $@

clean:
	@rm -rf "$(VENV)"
