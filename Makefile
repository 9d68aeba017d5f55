# Every target makes its own virtual environment first; nothing has to be prepared.
#
#   make demo       the whole job on a real language model
#   make test       lint, then the tests of every day (two cores: at most 12 minutes)
#   make test-all   lint, then these and the full matrices
#   make test-gpu   the tests that need a CUDA device
#   make lint       style, types, arrows between packages, generated pages
#   make docs       write docs/cli.md and docs/methods.md again from the code
#   make bench      ratios against reference runs

PYTHON ?= python3
VENV ?= .venv
WORKERS ?= 2
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check

# One BLAS thread a worker: more are slower on small matrices, and results stay the same bytes.
THREADS := OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 MKL_NUM_THREADS=1
# Tests and demo use models that packages carry; nothing is fetched from a hub.
OFFLINE := HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1 HF_HUB_DISABLE_TELEMETRY=1 TOKENIZERS_PARALLELISM=false
PYTEST := $(THREADS) $(OFFLINE) $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

.PHONY: venv demo test test-all test-gpu lint docs bench clean
.DEFAULT_GOAL := test

venv: $(STAMP)

# torch is pinned in constraints.txt: unpinned, pip may choose a build of several gigabytes.
$(STAMP): pyproject.toml constraints.txt tests/model-packages.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) -c constraints.txt -e '.[test,dev]'
	$(PIP) --no-deps -r tests/model-packages.txt
	touch $@

demo: $(STAMP)
	PATH="$(abspath $(BIN)):$$PATH" $(OFFLINE) bash examples/demo.sh

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo
	PYTHONPATH=. $(BIN)/pyright --pythonpath $(BIN)/python --verifytypes adapterhub_tools --ignoreexternal
	$(BIN)/python tools/generate_cli_docs.py --check
	$(BIN)/python tools/generate_methods_docs.py --check

# The recipes call pytest last, so that its closing line is the last line printed.
test: lint
	$(PYTEST) -m "not slow and not gpu"

test-all: lint
	$(PYTEST) -m "not gpu"

test-gpu: $(STAMP)
	$(OFFLINE) $(BIN)/python -m pytest -m gpu

docs: $(STAMP)
	$(BIN)/python tools/generate_cli_docs.py
	$(BIN)/python tools/generate_methods_docs.py

bench: $(STAMP)
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python benchmarks/merge.py
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python benchmarks/verify.py
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python benchmarks/startup.py

clean:
	rm -rf $(VENV) build dist .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis demo-output
