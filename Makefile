# `make train` and `make test` work on a fresh machine with Python 3.11 (3.10 and 3.12 should do) and make.

SHELL := /bin/bash
.DEFAULT_GOAL := help

# CUDA stack where an NVIDIA driver answers, else CPU; `make FLAVOUR=cpu …` decides otherwise.
FLAVOUR := $(shell nvidia-smi > /dev/null 2>&1 && echo cuda || echo cpu)
FBGEMM := $(if $(filter cuda,$(FLAVOUR)),fbgemm-gpu,fbgemm-gpu-cpu)
OTHER_FBGEMM := $(if $(filter cuda,$(FLAVOUR)),fbgemm-gpu-cpu,fbgemm-gpu)

SUPPORTED := import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))
PYTHON := $(shell for python in python3.11 python3 python3.12 python3.10; do \
	$$python -c '$(SUPPORTED)' 2> /dev/null && echo $$python && break; done)

BIN := .venv/bin
INSTALLED := .venv/.installed-$(FLAVOUR)
# Tests of the Spark engine run where there is Java 17 or later; elsewhere they say that they were left out.
JAVA := $(shell java -version 2>&1 | sed -n 's/.* version "\([0-9]*\).*/\1/p')
SPARK := $(shell test 0$(JAVA) -ge 17 && echo .venv/.installed-spark)
PIP := $(BIN)/python -m pip --disable-pip-version-check -qq
RECIPE := hstu_kuairand_sample
SAMPLE := datasets/kuairand-sample

.PHONY: help env train test test-gpu some-gpu faults lint types format clean

help: ## Show this list
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 10

env: $(INSTALLED) ## Make .venv and install everything, pinned; does nothing when that is done

train: $(INSTALLED) $(SAMPLE)/dataset.json ## Train the sample recipe on two processes; again continues the run
	$(BIN)/ultrarec launch $(RECIPE) --scheduler local_cwd -j 1x2 --out runs/$(RECIPE)

# A file stays on one worker, so that what its fixtures build is built once; files start in the order of collection, in
# which tests/conftest.py puts those with slow tests first. Bytecode is kept whatever the environment says: many tests
# start processes, and one that has to compile torch and TorchRec needs 13 s to import them instead of 5.
test: $(INSTALLED) $(SPARK) ## Run all tests, two at a time
	OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

RUNS := 100
faults: $(INSTALLED) ## Kill, stop and starve RUNS small runs at random moments; each must end as if nothing had happened
	OMP_NUM_THREADS=1 $(BIN)/python tests/fault_campaign.py --runs $(RUNS)

# Before anything is installed, and once more as PyTorch sees it: without a GPU tests would be skipped, not fail.
test-gpu: some-gpu $(INSTALLED) ## Run the kernel tests and the attention benchmark on the GPU of this machine
	@$(BIN)/python -c 'import sys, torch; sys.exit(not torch.cuda.is_available() and "error: PyTorch finds no GPU here")'
	env -u TRITON_INTERPRET $(BIN)/python -m pytest tests/kernels
	env -u TRITON_INTERPRET $(BIN)/python -m pytest -m gpu tests
	env -u TRITON_INTERPRET $(BIN)/ultrarec bench attention --device cuda --out bench

some-gpu:
	@if [ $(FLAVOUR) != cuda ]; then echo "error: nvidia-smi finds no GPU here; make test runs all that needs none"; exit 1; fi

lint: $(INSTALLED) ## Check style and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(INSTALLED) ## Format, and mend what ruff can mend
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: $(INSTALLED) ## Check types
	$(BIN)/mypy

clean: ## Remove the environment and all caches; datasets and runs stay
	rm -rf .venv build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(INSTALLED): pyproject.toml setup.py constraints/$(FLAVOUR).txt
	@if [ -z "$(PYTHON)" ]; then \
		echo "error: no Python 3.10 to 3.12 found; install python3.11, or say make PYTHON=/path/to/python3.11"; exit 1; fi
	@$(PYTHON) -c '$(SUPPORTED)' || { echo "error: $(PYTHON) is not Python 3.10 to 3.12"; exit 1; }
	@echo "Installing the $(FLAVOUR) stack into .venv; the first time takes a few minutes"
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(PIP) install --no-compile --constraint constraints/$(FLAVOUR).txt --editable '.[dev]'
	@# The two builds of fbgemm share one folder, and torchrec asks for the CUDA build by name: hence one, then no
	@# requirements.
	@if $(PIP) show $(OTHER_FBGEMM) 2> /dev/null; then $(PIP) uninstall --yes $(OTHER_FBGEMM) $(FBGEMM); fi
	$(PIP) install --no-compile --no-deps --constraint constraints/$(FLAVOUR).txt $(FBGEMM) torchrec
	@rm -f .venv/.installed-* && touch $@

.venv/.installed-spark: $(INSTALLED)
	$(PIP) install --no-compile --constraint constraints/$(FLAVOUR).txt --editable '.[spark]'
	@touch $@

$(SAMPLE)/dataset.json: | $(INSTALLED)
	$(BIN)/ultrarec prepare sample:kuairand --out $(SAMPLE) --user user_id --item item_id --time time_ms \
		--split-time 1651330969569 \
		--action is_click --action is_like --action is_follow --action is_comment --action is_forward \
		--action is_hate --action long_view --action is_profile_enter \
		--column play_time_ms --column duration_ms --column tab
