# `make demo` and `make test` are all a new clone needs; each creates .venv when it is missing.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test check lint bench clean
.DEFAULT_GOAL := help

help:
	@echo "make demo   scenes -> shards -> 2 ranks -> K-means and linear -> runs/demo/report.html"
	@echo "make test   the whole test suite"
	@echo "make check  lint, types and the fast tests, in under two minutes"
	@echo "make lint   ruff and mypy"
	@echo "make bench  every benchmark and the plots, into runs/bench/ (hours); ROOT=, SHARDS=, LABELLED="

# The stamp depends on what is installed, so that an unchanged clone installs nothing twice.
$(VENV)/.installed: setup.cfg pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dali,deepspeed,dev,export,masks,parquet,s3]'
	touch $@

demo: $(VENV)/.installed
	$(BIN)/maskbank demo

test: $(VENV)/.installed
	$(BIN)/python -m pytest -n 3 --dist loadfile

check: lint
	$(BIN)/python -m pytest -q -m "not slow" -n 2

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check 'matplotlib>=3.7'
	$(BIN)/python -m benchmarks $(if $(ROOT),--root $(ROOT)) $(if $(SHARDS),--shards $(SHARDS)) \
		$(if $(LABELLED),--labelled $(LABELLED))

clean:
	rm -rf $(VENV) build dist *.egg-info
