# make demo: the whole job on a small real data set.   make test: all checks.   Both set everything up first.
SHELL := /bin/bash
export PATH := $(CURDIR)/.venv/bin:$(PATH)
DATA ?=
# One process per core, four at most: some tests start two ranks of their own. Files with these come first (conftest.py),
# so that no process ends with minutes of them while the others have nothing left.
PYTEST := pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

ENGINE ?= $(firstword $(notdir $(foreach name,docker podman,$(shell command -v $(name)))))
IMAGE ?= mrmae

.PHONY: setup slurm image demo lint docs test test-fast test-all coverage clean
setup:
	@bash scripts/setup.sh

# For tests/slurm: needs root or sudo on Debian or Ubuntu; elsewhere these tests are skipped.
slurm: setup
	@bash scripts/setup.sh --slurm

# A container (docs/container.md); IMAGE=tag, BASE=another base image, ENGINE=podman.
image:
	@[ -n "$(ENGINE)" ] || { echo "make image: neither docker nor podman is on the PATH; see docs/container.md" >&2; exit 2; }
	$(ENGINE) build --tag $(IMAGE) $(if $(BASE),--build-arg BASE=$(BASE)) .

demo: setup
	@bash scripts/demo.sh --data "$(DATA)"

lint: setup
	ruff check .
	ruff format --check .
	mypy

docs: setup
	NO_MKDOCS_2_WARNING=1 mkdocs build --strict --site-dir site

test: lint docs slurm
	$(PYTEST) -m "not slow"

# Single-process tests only: under five minutes on two cores.
test-fast: setup
	$(PYTEST) -m "not slow and not multi_process"

test-all: lint docs slurm
	$(PYTEST)

# Lines of the package that the tests of `make test-fast` reach; ranks and workers that other tests start are not measured.
coverage: setup
	$(PYTEST) -m "not slow and not multi_process" --cov=mrmae_ds --cov-report=term:skip-covered

clean:
	rm -rf runs datasets site .pytest_cache .mypy_cache .ruff_cache .coverage
