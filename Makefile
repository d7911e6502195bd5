# Every target works in a fresh clone: it needs Python 3.11 or later, make and the package index, and makes its own
# environment in .venv. `make` alone lists the targets.

PYTHON ?= python3
# The versions that CI tests with. `make install CONSTRAINTS=` takes the newest ones instead.
CONSTRAINTS := constraints.txt
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
# One thread a test worker: two workers with a thread for each core would wait for each other.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 8 --dist worksteal

.DEFAULT_GOAL := help
.PHONY: help install demo test test-slow experiments benchmarks lint docs clean

help: ## Show this list
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | while IFS="$$(printf '\t')" read -r name text; do \
		printf '  make %-12s %s\n' "$$name" "$$text"; done

install: $(VENV)/.installed ## Make .venv with the library, ready to edit, and its tools (about three minutes, once)

demo: install ## Train on the bundled protein table and write demo/report.html (under three minutes on two cores)
	$(BIN)/python -m energyreg.cli.demo --output demo

test: install ## Run the tests and the doctests
	$(PYTEST)

test-slow: install ## Run the tests that take minutes each
	$(PYTEST) -m slow

experiments: install ## Run the one-dimensional experiments that have no result yet (hours), and write their tables
	OMP_NUM_THREADS=1 $(BIN)/python -m experiments.one_dimensional run --jobs 2
	$(BIN)/python -m experiments.one_dimensional report

benchmarks: install ## Measure speed and memory as ratios (half an hour on an idle machine), and write their table
	$(BIN)/python -m benchmarks

lint: install ## Check style, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(VENV)/.installed-docs ## Build the documentation into site/
	$(BIN)/mkdocs build --strict

clean: ## Remove everything that the other targets made
	rm -rf $(VENV) .venv-ci site demo dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamps are written last, so an interrupted install starts again.
$(VENV)/.installed: pyproject.toml $(CONSTRAINTS)
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("energyreg needs Python 3.11 or later, but $(PYTHON) is " + sys.version.split()[0] + ". Name another one: make install PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(PIP) install $(CONSTRAINTS:%=-c %) -e '.[tables,vision,dev]'
	@touch $@

$(VENV)/.installed-docs: $(VENV)/.installed
	$(PIP) install $(CONSTRAINTS:%=-c %) -e '.[docs]'
	@touch $@
