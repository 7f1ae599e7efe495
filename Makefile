# Everything here needs Python 3.11 or newer and nothing else; a C++ compiler is used when there is one.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: help demo test test-slow lint types format bench clean

help:
	@echo "make demo       compress the carried teacher to half its size and show the table and the page (15 minutes)"
	@echo "make test       all tests but the slow ones"
	@echo "make test-slow  the slow ones"
	@echo "make lint       style and types"
	@echo "make bench      measure speed and memory; results go to benchmarks/results/"

# The environment is made once, with the exact versions of constraints.txt, and again when either file changes.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "halflap needs Python 3.11 or newer and $(PYTHON) is $$($(PYTHON) --version 2>&1): give another with PYTHON=..." >&2; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing halflap and its dependencies into $(VENV) ..."
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $(READY)

demo: $(READY)
	$(BIN)/python demo/run.py

test: $(READY)
	$(BIN)/python -m pytest -q

test-slow: $(READY)
	$(BIN)/python -m pytest -q -m slow

lint: $(READY) types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY)
	$(BIN)/pyright

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(READY)
	@for script in $$(ls benchmarks/*.py | grep -v '/_'); do echo "== $$script"; $(BIN)/python $$script || exit 1; done

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .hypothesis build src/*.egg-info
