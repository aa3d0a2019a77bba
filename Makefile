# Everything runs in .venv, which the first target that needs it makes.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test test-others test-runs test-minigpt lint kernels bench bench-gpu figures mutants clean

demo: .venv/demo          ## fine-tune the bundled model three ways
	$(BIN)/python -m minigpt.commands.demo

test: test-others test-runs test-minigpt        ## the whole suite; `make -j2 test` on two cores

test-others: .venv/test
	$(BIN)/python -m pytest tests --ignore tests/minigpt

RUNS := tests/minigpt/commands tests/minigpt/training

test-runs: .venv/test
	$(BIN)/python -m pytest $(RUNS)

test-minigpt: .venv/test
	$(BIN)/python -m pytest tests/minigpt $(RUNS:%=--ignore %)

lint: .venv/test          ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

kernels: .venv/test       ## compile every Triton kernel for three GPUs, without one, and look for faults
	$(BIN)/python -W ignore -m minigpt_kernels.compile_check

bench: .venv/test         ## measure against the peers, write benchmarks/results/*.csv and the tables
	$(BIN)/python -m benchmarks

bench-gpu: .venv/test     ## all that a GPU measures, in at most eight minutes, and what is drawn from it
	$(BIN)/python -m benchmarks.gpu

figures: .venv/test       ## list the published figures that a later commit has made stale
	$(BIN)/python -m benchmarks.figures

mutants: .venv/test       ## put faults into the code, one at a time: a test fails for each
	$(BIN)/python -m tests.mutants

.venv/demo: pyproject.toml constraints.txt
	test -d .venv || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[reports]'
	touch $@

.venv/test: .venv/demo
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test,bench]'
	touch $@

clean:
	rm -rf .venv .mutants .mypy_cache .ruff_cache .pytest_cache .hypothesis
