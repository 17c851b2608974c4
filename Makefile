# make demo   sets up .venv, trains a small codec on the bundled clips and reconstructs held-out ones
# make test   sets up .venv and runs lint, types and tests
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin

.PHONY: demo test test-slow format clean

demo: $(VENV)/.run
	$(BIN)/python -m examples.demo

test: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/pytest -n auto --maxprocesses 4

test-slow: $(VENV)/.dev
	$(BIN)/pytest -m slow

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build runs

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed, this is " + sys.version if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip

$(VENV)/.run: $(BIN)/python requirements.txt pyproject.toml
	$(BIN)/python -m pip install --quiet --editable .
	$(BIN)/python -m pip install --quiet pesq 2>/dev/null || echo "pesq needs a C compiler: its columns will say so"
	touch $@

$(VENV)/.dev: $(VENV)/.run
	$(BIN)/python -m pip install --quiet --editable '.[dev,torch,ray]'
	$(BIN)/python -m pip install --quiet --editable '.[eval]' || echo "tests of what is not installed are skipped"
	$(BIN)/python -m pip install --quiet --editable '.[tpu]' || echo "tests that need libtpu are skipped"
	touch $@
