# Every target sets up what it needs: a virtual environment with the pinned packages.

VENV ?= .venv
WORKERS ?= 2

# The first Python on the path that is new enough.
NEW_ENOUGH := import sys; sys.exit(sys.version_info < (3, 11))
PYTHON ?= $(shell for python in python3 python3.13 python3.12 python3.11 python; do \
	"$$python" -c '$(NEW_ENOUGH)' 2>/dev/null && echo "$$python" && break; done)

BIN := $(VENV)/bin
RUNTIME := $(VENV)/.installed-runtime
DEV := $(VENV)/.installed-dev
SOURCES := $(wildcard ep_jax experiments benchmarks docs tests tools)

.DEFAULT_GOAL := help
.PHONY: help demo test test-slow docs coverage lint typecheck wheel env clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo
	@echo 'Variables: PYTHON (3.11 or newer), VENV (.venv), WORKERS (2; 0 runs the tests in one process)'

demo: $(RUNTIME) ## train a small network on the digits, from scratch
	rm -rf runs/demo
	$(BIN)/ep-jax train --preset digits --out runs/demo

# Most of the tests' time is compilation, which these make cheaper; the second halves it.
test test-slow coverage: export JAX_DISABLE_MOST_OPTIMIZATIONS := 1
test test-slow coverage: export XLA_FLAGS := --xla_cpu_use_fusion_emitters=false $(XLA_FLAGS)

test: $(DEV) ## run the tests
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadgroup -m 'not slow'

test-slow: $(DEV) ## run the tests that take longest
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadgroup -m slow

# Strictly: a broken link, a name that is not documented or a notebook that fails ends it.
docs: $(DEV) ## build the documentation, notebooks executed, in docs/_build/html
	$(BIN)/python -m sphinx -W --keep-going -n -q -b html $(DOCS_FLAGS) docs docs/_build/html
	@echo 'documentation: docs/_build/html/index.html'

coverage: $(DEV) ## run all tests, and tell which lines of ep_jax they miss
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadgroup --cov --cov-report=term

lint: $(DEV) ## check style and formatting
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)

typecheck: $(DEV) ## check types
	$(BIN)/pyright --pythonpath $(BIN)/python

wheel: $(DEV) ## build the wheel and use it in empty environments
	$(BIN)/python tools/check_wheel.py

env: $(DEV) ## only set up the environment

clean: ## remove the environment, caches, runs/demo and the built documentation
	rm -rf .venv docs/_build .pytest_cache .ruff_cache .hypothesis build dist *.egg-info runs/demo
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamp is written last, so an interrupted installation starts over.
$(RUNTIME): EXTRA := [cli,digits,plot]
$(DEV): EXTRA := [dev,docs]
$(RUNTIME) $(DEV): pyproject.toml constraints.txt
	@$(or $(PYTHON),false) -c '$(NEW_ENOUGH)' || { \
		echo 'ep_jax needs Python 3.11 or newer; name one with: make PYTHON=/path/to/python3' >&2; \
		exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e '.$(EXTRA)'
	@touch $@
