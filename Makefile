# Each target sets up what it needs. `make demo` and `make test` are enough on their own.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
STEPS  ?=
export TOKENIZERS_PARALLELISM := false

.PHONY: demo demo-smollm2 test lint clean-test release-check gpu-dry-run docs
demo: $(VENV)/.train
	$(BIN)/hsd demo small $(if $(STEPS),--max_steps $(STEPS)) $(if $(ARGS),$(ARGS))

demo-smollm2: $(VENV)/.train
	$(BIN)/hsd demo additions $(if $(STEPS),--max_steps $(STEPS)) $(if $(ARGS),$(ARGS))

test: lint
	$(BIN)/python -m pytest

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

# A bare machine: a new clone with a new environment.
clean-test:
	dir=$$(mktemp -d) && git clone -q . $$dir/clone && $(MAKE) -C $$dir/clone test && rm -rf $$dir

# Builds what a release ships, from a clone of HEAD, and installs and runs it in new environments (docs/releasing.md).
release-check: $(VENV)/.release
	$(BIN)/python tools/release_check.py

# All parts of the GPU suite on a CPU at toy size, without what a plain CUDA image lacks.
gpu-dry-run: $(VENV)/.dev
	SUITE_DEVICE=cpu bash benchmarks/gpu_suite.sh abc runs/gpu_dry_run $(BIN)/python

docs: $(VENV)/.release
	$(BIN)/python tools/api_docs.py build/docs

# torch first and alone: an unconstrained request, also inside an isolated build, would pull CUDA packages.
$(VENV)/.train: pyproject.toml constraints.txt setup.py $(wildcard csrc/cpu/*)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt torch setuptools wheel
	$(BIN)/python -m pip install -q -c constraints.txt --no-build-isolation -e '.[train]'
	touch $@

# The tests want the C++ rows: here a build that fails is an error. DeepSpeed builds its operators when they are used.
$(VENV)/.dev: $(VENV)/.train
	HSD_BUILD_CPU=1 DS_BUILD_OPS=0 $(BIN)/python -m pip install -q -c constraints.txt --no-build-isolation -e '.[train,dev]'
	touch $@

$(VENV)/.release: $(VENV)/.dev
	$(BIN)/python -m pip install -q -c constraints.txt build pdoc
	touch $@
