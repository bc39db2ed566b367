# make demo: train on the built-in text and read what the model says.   make test: run the tests.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/pip install --quiet --disable-pip-version-check

.PHONY: demo setup test lint clean

demo: .venv/run.stamp
	$(BIN)/mlx-gpt train --data builtin --preset tiny --out weights/demo --overwrite
	$(BIN)/mlx-gpt generate --model weights/demo --prompt "The statement" --seed 1

setup: .venv/test.stamp

test: .venv/test.stamp
	$(BIN)/pytest

lint: .venv/test.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf .venv

# What running needs, and serving.
.venv/run.stamp: pyproject.toml
	$(PYTHON) -m venv .venv
	$(PIP) --editable '.[serve]'
	touch $@

# What tests and checks need beside it.
.venv/test.stamp: .venv/run.stamp
	$(PIP) --editable '.[test]'
	touch $@
