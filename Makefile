# What to type. Every target works from a fresh clone; `make` alone lists them.
# Another run:  make run CONFIG=configs/tiny.yaml CORES=2
CONFIG ?= config.yaml
CORES ?= all
PYTHON ?= python3

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.PHONY: help run test check lint format schema study peers bench kills clean lock dev

export PATH := $(CURDIR)/.venv/bin:$(PATH)
BIN := .venv/bin
CHECKED := circuitflow workflow_scripts tests envs $(wildcard benchmarks)
CHOSEN := $(if $(filter-out config.yaml,$(CONFIG)),--configfile "$(CONFIG)")
PEERS := $(wildcard envs/peers/*.txt)
# As many files of tests at once as there are processors, the long ones first.
SIDE_BY_SIDE := -n logical --dist loadfile --no-loadscope-reorder
RULES := Snakefile $(wildcard rules/*.smk)

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "make %-8s %s\n", $$1, $$2}' Makefile

run: .venv/runtime ## install what is pinned, then run the workflow on CONFIG (default config.yaml) with CORES (default all)
	$(BIN)/circuitflow fetch $(CHOSEN)
	$(BIN)/circuitflow unlock
	$(BIN)/snakemake --cores $(CORES) $(CHOSEN)

test: dev ## every test that can run here; those that need Slurm, Chromium or a GPU say so and skip
	$(BIN)/python -m pytest $(SIDE_BY_SIDE)

check: lint ## lint, and the quick tests
	$(BIN)/python -m pytest -q -m "not slow" $(SIDE_BY_SIDE) tests/unit

lint: dev ## formatting, style and types, of Python and Snakemake files
	$(BIN)/ruff format --check $(CHECKED)
	$(BIN)/ruff check $(CHECKED)
	$(BIN)/snakefmt --check $(RULES)
	$(BIN)/snakemake --lint
	$(BIN)/mypy

format: dev ## put Python and Snakemake files into their standard form
	$(BIN)/ruff format $(CHECKED)
	$(BIN)/ruff check --fix $(CHECKED)
	$(BIN)/snakefmt $(RULES)

schema: .venv/runtime ## write config.schema.json, by which editors complete and check config.yaml
	$(BIN)/circuitflow schema > config.schema.json

study: .venv/runtime ## train and compare the dictionaries of the configuration's section study
	$(BIN)/circuitflow fetch $(CHOSEN)
	$(BIN)/circuitflow unlock
	$(BIN)/snakemake --cores $(CORES) $(CHOSEN) -- study

peers: $(PEERS:envs/peers/%.txt=.venv-peers/%/installed) ## install the libraries we compare with, each in an environment of its own

.venv-peers/%/installed: envs/peers/%.txt
	$(PYTHON) -m venv --clear .venv-peers/$*
	.venv-peers/$*/bin/python -m pip install --quiet --disable-pip-version-check $$(grep ^torch== $<)
	.venv-peers/$*/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -r $<
	@touch $@

bench: dev ## measure speed and memory side by side (benchmarks/)
	@for script in benchmarks/[!_]*.py; do echo "== $$script"; $(BIN)/python "$$script"; done

kills: dev ## kill runs at random moments, 25 times per stage, and compare with a run never killed
	CIRCUITFLOW_KILLS=25 $(BIN)/python -m pytest -q --timeout 3600 tests/workflow/test_kill.py

clean: .venv/runtime ## remove kept results that nothing points to, after showing their sizes
	$(BIN)/circuitflow clean

lock: ## pin the newest packages that pyproject.toml allows: requirements*.lock and envs/circuitflow.yaml
	$(PYTHON) -m venv --clear .venv-lock
	.venv-lock/bin/python -m pip install --quiet --editable '.[dev]'
	.venv-lock/bin/python envs/lock.py
	rm -r .venv-lock

dev: .venv/dev

# The stamps: packages are installed again only when what pins them has changed.
.venv/runtime: requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "circuitflow needs Python 3.11 or newer: make PYTHON=python3.12 run")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	@touch $@

.venv/dev: .venv/runtime requirements-dev.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.lock -r requirements-dev.lock
	@touch $@
