# A few words for the whole life of the project. Each builds .venv first where it must (`make setup`).
#   make quickstart    from nothing to a tuned model, and what came of it
#   make setup         .venv with PyTorch (CPU) and the development tools, at the versions of constraints.txt
#   make check         format, lint, types, floors, house rules: under a minute
#   make test          the suite; make test-nightly adds the long tests
#   make bench         rivals side by side on the same work: every bench, then docs/benchmarks.md (40 minutes)
#   make docs          rewrites the generated pages of docs/
BIN := .venv/bin
PYTHON ?=
QUICKSTART ?=
BENCH ?=
TESTS ?= tests
WORKERS ?= 2
export HF_HUB_OFFLINE ?= 1

.PHONY: quickstart setup check test test-nightly bench docs clean
.DEFAULT_GOAL := quickstart

setup:
	@PYTHON="$(PYTHON)" .ci/setup

quickstart: setup
	@$(BIN)/luthier quickstart $(QUICKSTART)

check: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo
	$(BIN)/python -m pytest -q tests/house

# Two workers with one thread each beat one worker with two: the models of the tests are small.
test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(WORKERS) --dist loadfile -m "not nightly" $(TESTS)

test-nightly: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(WORKERS) --dist loadfile $(TESTS)

bench: setup
	$(BIN)/python -m pip install -q --constraint constraints.txt --editable '.[bench]'
	$(BIN)/python -m bench $(BENCH)

docs: setup
	$(BIN)/python docs/generate.py
	$(BIN)/python -m bench.page

clean:
	rm -rf .venv build dist .pytest_cache .ruff_cache .mypy_cache .hypothesis .import_linter_cache
	find src tests examples bench docs -name __pycache__ -type d -prune -exec rm -rf {} +
