# make demo: train on the built-in text and read what the model writes.   make test: run the tests.
#
# PYTHON=... names the Python to use; without it, the newest one that serves is used.
CANDIDATES := $(if $(PYTHON),"$(PYTHON)",python3.13 python3.12 python3.11 python3)
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check

.DELETE_ON_ERROR: # so that a virtual environment without pip is made again
.PHONY: demo setup test lint clean

demo: .venv/run.stamp
	$(BIN)/mlx-gpt train --data builtin --recipe quick --out weights/demo --overwrite
	$(BIN)/mlx-gpt generate --model weights/demo --prompt "The statement" --seed 1

setup: .venv/test.stamp

test: .venv/test.stamp
	$(BIN)/pytest

lint: .venv/test.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo
	$(BIN)/check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml

clean:
	rm -rf .venv

# A candidate may be there without working, as pyenv's shims are, so each is run and says what it is. pip would refuse a
# wrong one as well, but without saying which Python to get.
$(BIN)/python:
	@wrong= intel=; \
	for python in $(CANDIDATES); do \
	  facts=$$("$$python" -c 'import platform as p; print(p.system(), p.machine(), *p.python_version_tuple()[:2])' \
	    2> /dev/null); \
	  set -- $$facts; \
	  case "$$3.$$4" in \
	    3.11 | 3.12 | 3.13) \
	      if [ "$$1 $$2" = "Darwin x86_64" ]; then intel=$$python; continue; fi; \
	      echo "$$python -m venv .venv"; \
	      exec "$$python" -m venv --clear .venv;; \
	    .) $(if $(PYTHON),wrong=" ($$python does not run)") ;; \
	    *) wrong=", not $$3.$$4 ($$python)";; \
	  esac; \
	done; \
	if [ "$$intel" ]; then \
	  echo "MLX needs a Mac with an M-series chip and a native arm64 Python, but $$intel is built for Intel: install" \
	    "Python 3.13 from python.org or with 'brew install python@3.13', in a Terminal that does not use Rosetta."; \
	else \
	  echo "mlx-gpt needs Python 3.11, 3.12 or 3.13$$wrong: install one from python.org or with" \
	    "'brew install python@3.13', or name one that is installed elsewhere with PYTHON=/path/to/python."; \
	fi >&2; \
	exit 1

# The program and its server. An existing .venv keeps the Python that it was made with.
.venv/run.stamp: pyproject.toml $(BIN)/python
	$(PIP) --editable '.[serve]'
	touch $@

# Everything that the tests and checks need as well.
.venv/test.stamp: .venv/run.stamp
	$(PIP) --editable '.[test]'
	touch $@
