# make demo         sets up .venv, fine-tunes the shipped codec on some of the bundled clips and compares it on the others
# make check        lint, types and the tests that take little time, of files, lists and options: before each commit
# make test         all that CI runs
# make test-slow    full-size runs, which CI leaves out
# make test-newest  the suite on the newest versions that the ranges allow, in .venv-newest
# make test-oldest  the suite on the oldest, in .venv-oldest
# make lock         renews requirements.lock
# make docs         builds the documentation into build/site
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
UV_VERSION = 0.13.9

# Every package has the version that the lock names, and so has what builds packages.
VERSIONS ?= --constraints requirements.lock --build-constraints requirements.lock
INSTALL = $(BIN)/uv pip install --quiet --compile-bytecode --python $(BIN)/python $(VERSIONS)

# uv does not read pip's settings: who has told pip where packages are has told uv.
ifdef PIP_INDEX_URL
export UV_DEFAULT_INDEX ?= $(PIP_INDEX_URL)
endif
ifdef PIP_FIND_LINKS
export UV_FIND_LINKS ?= $(PIP_FIND_LINKS)
endif

PYTEST = $(BIN)/pytest -n auto --maxprocesses 4

.PHONY: demo check test test-slow test-newest test-oldest lint lock docs format clean

demo: $(VENV)/.run
	$(BIN)/python -m examples.demo

check: lint
	$(PYTEST) -m "quick and not slow"

# PyTorch and the compilers for other devices would fill a gigabyte of each process until its end.
APART = tests/parity tests/test_planning.py
test: lint
	$(PYTEST) $(APART:%=--ignore=%)
	$(PYTEST) $(APART)

test-slow: $(VENV)/.dev
	$(BIN)/pytest -m slow

test-newest:
	rm -rf .venv-newest
	$(MAKE) test VENV=.venv-newest VERSIONS=--upgrade

test-oldest:
	rm -rf .venv-oldest
	$(MAKE) test VENV=.venv-oldest VERSIONS="--resolution lowest-direct"

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

lock: $(BIN)/uv
	env -u UV_FIND_LINKS $(BIN)/uv pip compile --quiet --upgrade --universal --python-version 3.11 --all-extras --no-emit-find-links \
		--no-emit-index-url --custom-compile-command "make lock" --output-file requirements.lock pyproject.toml

# The page that runs a codec in the browser has the shipped one beside it.
docs: $(VENV)/.docs
	$(BIN)/zensical build --strict --clean
	$(BIN)/omnicodec export --format onnx --what encoder-from-audio --out build/site/browser/encoder-from-audio.onnx
	$(BIN)/omnicodec export --format onnx --what decoder --out build/site/browser/decoder.onnx

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv .venv-newest .venv-oldest build runs

$(BIN)/uv:
	$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed, this is " + sys.version if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet uv==$(UV_VERSION)

$(VENV)/.run: $(BIN)/uv requirements.txt requirements.lock pyproject.toml
	$(INSTALL) --editable .
	$(INSTALL) pesq 2>/dev/null || echo "pesq needs a C compiler: its columns will say so"
	touch $@

$(VENV)/.dev: $(VENV)/.run
	$(INSTALL) --editable '.[dev,torch,onnx,ray,gcs,s3,http]'
	$(INSTALL) --editable '.[eval]' || echo "tests of what is not installed are skipped"
	$(INSTALL) --no-deps auv==0.1.1 einops==0.8.2 || echo "tests of AUV are skipped"
	$(INSTALL) --editable '.[plan]' || echo "tests that need the compilers of TPUs and GPUs are skipped"
	npm install --silent --no-save --prefix build onnxruntime-web@1.30.0 || echo "tests of a codec in the browser are skipped"
	touch $@

$(VENV)/.docs: $(VENV)/.run
	$(INSTALL) --editable '.[docs,torch,onnx]'
	touch $@
