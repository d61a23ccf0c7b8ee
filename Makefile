# Everything a person types. A fresh machine needs python3 (3.11 or later), make and g++; all else goes into .venv.

PYTHON ?= python3
BIN := .venv/bin
# Twice --quiet leaves pip's errors, and among them the output of a build that failed.
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet --quiet install -c constraints.txt

# What an installation depends on. Python files are not here: the installation is editable and runs the working tree.
INSTALLED_FROM := pyproject.toml constraints.txt CMakeLists.txt $(shell find csrc)

.DEFAULT_GOAL := help
.PHONY: help demo test slow check docs clean

help:  ## show this list
	@sed -n 's/^\([a-z]*\):.*## /\1|/p' $(MAKEFILE_LIST) | awk -F'|' '{printf "make %-8s %s\n", $$1, $$2}'

demo: .venv/.installed  ## quantize a small network from end to end; results in runs/demo
	rm -rf runs/demo
	$(BIN)/mixbits demo --out runs/demo

test: .venv/.installed-dev  ## run the tests and the examples in docstrings
	OMP_NUM_THREADS=1 $(BIN)/pytest -n auto --maxprocesses 4

slow: .venv/.installed-dev  ## run the slow tests, with more examples of each law
	$(BIN)/pytest -m slow
	$(BIN)/pytest --hypothesis-profile=thorough tests/contracts

check: .venv/.installed-dev  ## lint: style, types, who imports whom
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/clang-format --dry-run -Werror $(shell find csrc tests -name '*.h' -o -name '*.cpp')
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports

docs: .venv/.installed-dev  ## build the pages of docs/ into build/docs; a warning is an error
	$(BIN)/sphinx-build -W --keep-going -q -d build/doctrees docs build/docs
	@echo "build/docs/index.html"

clean:  ## remove .venv, builds, caches and runs
	rm -rf .venv build dist runs .hypothesis .pytest_cache .ruff_cache .import_linter_cache
	find . -name __pycache__ -prune -exec rm -rf {} +

.venv/bin/python:
	@echo "Creating .venv with $$($(PYTHON) --version) ..."
	@$(PYTHON) -m venv .venv

.venv/.installed: $(INSTALLED_FROM) | .venv/bin/python
	@echo "Installing mixbits into .venv (a few minutes the first time) ..."
	@$(PIP) -e .
	@$(SAY_IF_NOT_NATIVE)
	@touch $@

.venv/.installed-dev: $(INSTALLED_FROM) | .venv/bin/python
	@echo "Installing mixbits and its development tools into .venv (a few minutes the first time) ..."
	@$(PIP) -e '.[dev]'
	@$(SAY_IF_NOT_NATIVE)
	@touch .venv/.installed $@

# pip hides what a successful build said.
define SAY_IF_NOT_NATIVE
$(BIN)/python -c 'from mixbits.pack import native_available as native; native() or print("Built WITHOUT the native \
extension: no working C++ compiler, or no Python headers. Same results, more slowly.")'
endef
