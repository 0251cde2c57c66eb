# `make demo` and `make test` are all a newcomer needs; `make help` lists the rest.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
PROTOS := $(wildcard protos/paceline/v1/*.proto)

.DEFAULT_GOAL := help
.PHONY: help install demo serve test check lint types format stubs stubs-check docs docs-check clean

help:  ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(STAMP)  ## make .venv with pinned versions

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("Paceline needs Python 3.11 or newer, $(PYTHON) is %d.%d: make PYTHON=python3.12 …" % sys.version_info[:2] if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt torch
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	@touch $@

demo: $(STAMP)  ## a two-turn chat served by 2 drafts and 2 targets, then a clean exit
	@$(BIN)/paceline demo

serve: $(STAMP)  ## the same cluster, kept running; prints the URLs
	@$(BIN)/paceline serve deployments/local-cpu.yaml

test: $(STAMP)  ## the whole test suite
	$(BIN)/python -m pytest

check: lint types stubs-check docs-check test  ## everything CI runs

lint: $(STAMP)  ## ruff: style and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP)  ## mypy --strict
	$(BIN)/mypy

format: $(STAMP)  ## apply ruff's fixes and format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

stubs: $(STAMP)  ## regenerate gRPC stubs from protos/
	$(BIN)/python -m grpc_tools.protoc -Iprotos --python_out=. --pyi_out=. --grpc_python_out=. $(PROTOS)

stubs-check: $(STAMP)  ## fail if the stubs differ from protos/
	@tmp=$$(mktemp -d) && trap 'rm -rf "$$tmp"' EXIT \
	&& $(BIN)/python -m grpc_tools.protoc -Iprotos --python_out="$$tmp" --pyi_out="$$tmp" --grpc_python_out="$$tmp" $(PROTOS) \
	&& diff -r -x __pycache__ -x __init__.py "$$tmp/paceline/v1" paceline/v1 \
	&& echo "stubs match protos/"

docs: $(STAMP)  ## regenerate the tables and references in README and docs
	$(BIN)/python -m paceline.cli.reference --write
	$(BIN)/python monitoring/grafana/build.py
	$(BIN)/python helm/build.py
	$(BIN)/python -m tests.api.field_cases

docs-check: $(STAMP)  ## fail if they differ from the code
	$(BIN)/python -m paceline.cli.reference --check
	$(BIN)/python monitoring/grafana/build.py --check
	$(BIN)/python helm/build.py --check

clean:  ## remove .venv and caches (downloaded models stay)
	rm -rf $(VENV) build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
