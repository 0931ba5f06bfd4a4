# `make demo`: the whole job on a small real data set.   `make test`: the checks.   Both set everything up first.
SHELL := /bin/bash
export PATH := $(CURDIR)/.venv/bin:$(PATH)
DATA ?=

.PHONY: setup demo test test-all lint clean
setup:
	@bash scripts/setup.sh

demo: setup
	@bash scripts/demo.sh --data "$(DATA)"

lint: setup
	ruff check .
	mypy

test: lint
	pytest -m "not slow"

test-all: lint
	pytest

clean:
	rm -rf runs datasets .pytest_cache .mypy_cache .ruff_cache
