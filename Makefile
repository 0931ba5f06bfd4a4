# `make demo`: the whole job on a small real data set.   `make test`: the checks.   Both set everything up first.
SHELL := /bin/bash
export PATH := $(CURDIR)/.venv/bin:$(PATH)
DATA ?=
# A process a core, four at most: some tests start two processes of their own.
PYTEST := pytest -n auto --maxprocesses 4 --dist loadfile

.PHONY: setup demo test test-all lint clean
setup:
	@bash scripts/setup.sh

demo: setup
	@bash scripts/demo.sh --data "$(DATA)"

lint: setup
	ruff check .
	mypy

test: lint
	$(PYTEST) -m "not slow"

test-all: lint
	$(PYTEST)

clean:
	rm -rf runs datasets .pytest_cache .mypy_cache .ruff_cache
