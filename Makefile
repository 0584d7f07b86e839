# make quickstart   the main job, on text found in this installation
# make test         lint, types, tests
# make help         every target

PYTHON ?= python3
VENV   ?= .venv
# Passed to pip. A machine without a GPU can point pip at PyTorch's CPU builds here or in pip.conf.
PIP_ARGS ?=

BIN := $(VENV)/bin

.PHONY: help install quickstart test test-slow coverage lint format types docs clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 16

install: $(VENV)/installed  ## make .venv with steplm and the development tools in it

$(VENV)/installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check $(PIP_ARGS) -e '.[dev]'
	@touch $@

quickstart: install  ## train a small LLaMA in three ways on text found here
	@$(BIN)/steplm quickstart

test: lint types  ## ruff, mypy and pytest
	$(BIN)/pytest -n auto --dist loadfile

test-slow: install  ## the tests that take minutes
	$(BIN)/pytest -m slow

coverage: install  ## the tests, with a report of the lines that they run
	$(BIN)/pytest -n auto --dist loadfile --cov --cov-report=term:skip-covered

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: install  ## reformat the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: install
	$(BIN)/mypy

docs: install  ## the documentation as a site in site/; any warning is an error
	$(BIN)/pip install --quiet --disable-pip-version-check $(PIP_ARGS) -e '.[docs]'
	$(BIN)/mkdocs build --strict

clean:  ## remove caches and build outputs; runs are kept
	rm -rf build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis site .coverage*
