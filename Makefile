# `make demo` and `make test` need Python 3.11 or newer and make, and do the rest themselves: they create .venv, install
# into it what is missing, and do nothing about it the next time. `make help` lists the targets.

PYTHON ?= python3
JOBS   ?= 2# test processes, each with its share of the cores
VENV   := .venv
BIN    := $(VENV)/bin
LOWEST := .venv-lowest
# The oldest torch that the metadata allows comes only as a CUDA build of several GB; LOG.md, "The lowest versions".
LOWEST_TORCH ?= 2.13.0

export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test check format docs test-lowest clean lint

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' Makefile

demo: $(VENV)/.core ## Fine-tune the default model on the sample data: before, after, and three answers
	@$(BIN)/python examples/demo.py

test: lint ## Run the linters and all the tests
	@$(BIN)/python -m pytest -n $(JOBS)

check: lint ## Run the linters and the tests that are not slow
	@$(BIN)/python -m pytest -n $(JOBS) -m "not slow"

lint: $(VENV)/.dev
	@$(BIN)/ruff format --quiet --check . || { echo "Run 'make format'."; exit 1; }
	@$(BIN)/ruff check --quiet .
	@$(BIN)/mypy --no-error-summary
	@$(BIN)/lint-imports >$(VENV)/imports.log 2>&1 || { cat $(VENV)/imports.log; exit 1; }

format: $(VENV)/.dev ## Format the code, and mend what ruff can mend by itself
	@$(BIN)/ruff check --quiet --fix .; $(BIN)/ruff format --quiet .

docs: $(VENV)/.docs ## Build the documentation into site/
	@$(BIN)/zensical build --clean -f mkdocs.yml

test-lowest: $(LOWEST)/.dev ## Run the tests on the lowest versions that the metadata allows (own environment)
	@$(LOWEST)/bin/python -m pytest -n $(JOBS) -m "not slow"

clean: ## Remove the environments and everything else that was built or cached
	rm -rf $(VENV) $(LOWEST) .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache build dist site
	find src tests examples bench -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true

# What is installed. Each stamp is as new as the newest file that it depends on; a failed installation leaves none.

# $(call install,ENVIRONMENT,ARGUMENTS OF pip install): quiet, with the log's end shown if it fails
define install
	@echo "installing into $(1) (a few minutes the first time; log: $(1)/install.log)" >&2
	@$(1)/bin/python -m pip install $(2) >$(1)/install.log 2>&1 \
		|| { grep -v 'is ignored: ' $(1)/install.log | tail -n 30; echo "The installation failed." >&2; exit 1; }
endef

%/.made:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "onebase needs Python 3.11 or newer. Name one: make PYTHON=python3.12 ..." >&2; exit 1; }
	@$(PYTHON) -m venv $*
	@touch $@

$(VENV)/.core: pyproject.toml constraints.txt | $(VENV)/.made
	$(call install,$(VENV),-c constraints.txt -e .)
	@touch $@

$(VENV)/.dev: pyproject.toml constraints.txt | $(VENV)/.made
	$(call install,$(VENV),-c constraints.txt -e '.[dev]')
	@touch $@ $(VENV)/.core

$(VENV)/.docs: pyproject.toml constraints.txt | $(VENV)/.made
	$(call install,$(VENV),-c constraints.txt -e '.[docs]')
	@touch $@ $(VENV)/.core

$(LOWEST)/.dev: pyproject.toml constraints-lowest.txt | $(LOWEST)/.made
	$(call install,$(LOWEST),-c constraints-lowest.txt torch==$(LOWEST_TORCH) -e '.[dev]')
	@touch $@
