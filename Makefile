# Every target sets itself up. `make demo` trains the nano model and asks it about a picture; `make test` runs the tests.
PYTHON ?= python3
BIN := .venv/bin
.DEFAULT_GOAL := help
.PHONY: help setup check test slow demo bench size clean

help:  ## this list
	@grep -hE '^[a-z]+:.*##' Makefile | sed 's/:.*## /\t/' | expand -t 10

# The stamp is written last, so an interrupted installation is done again.
.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

setup: .venv/installed  ## make .venv with everything

check: setup  ## format, lint, types, layers, README
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m ruff check .
	$(BIN)/python -m mypy
	$(BIN)/lint-imports
	$(BIN)/python -m pytest tests/test_readme.py

test: setup  ## the whole test suite, without the slow tier
	$(BIN)/python -m pytest -m "not slow"

slow: setup  ## the slow tier too
	$(BIN)/python -m pytest

demo: setup  ## train the nano curriculum on this machine, then ask about a picture
	$(BIN)/python -m sailvl run nano --out runs/nano --workers 1
	$(BIN)/python -m sailvl ask examples/pictures/ball.png "Where is the animal, seen from the ball?"
	$(BIN)/python -m sailvl ask examples/pictures/things.png "How many things are there?"
	@echo "Look at runs/nano/report.html"

bench: setup  ## measure; results go to benchmarks/results (an hour; opponents are installed below build/)
	mkdir -p benchmarks/results
	$(BIN)/python benchmarks/packing.py --ranks 8 --max-tokens 8192 --json benchmarks/results/packing.json
	$(BIN)/python benchmarks/packing.py --sync-pool 32 --json benchmarks/results/sync_pool.json
	$(BIN)/python benchmarks/train_step.py --json benchmarks/results/train_step.json
	$(BIN)/python benchmarks/train/compare.py --venvs build/bench --json benchmarks/results/train.json
	$(BIN)/python benchmarks/data_plane.py --venvs build/bench --json benchmarks/results/data_plane.json
	$(BIN)/python benchmarks/memory.py --json benchmarks/results/memory.json
	$(BIN)/python benchmarks/evaluation.py --json benchmarks/results/evaluation.json
	$(BIN)/python benchmarks/inference.py --size 2b --json benchmarks/results/inference.json

size: setup  ## lines per folder, longest files and functions
	$(BIN)/python tools/size.py

clean:  ## remove the environment, runs and caches
	rm -rf .venv runs build ./*.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
