# Everything from a bare machine with Python >= 3.11 and make: each target makes the environment that it needs.
PYTHON ?= python3
VENV := .venv
OLDEST := .venv-oldest
EXTRAS := dev,plot,peft,quant
RUN := $(VENV)/bin/python
export PIP_DISABLE_PIP_VERSION_CHECK := 1
# one thread a process: the tests' tensors are small, and pytest runs one process a core
TEST_ENV := OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
JOBS ?= 2
QUICK := not slow and not gpu and not network

.PHONY: help demo test test-oldest test-all mutants lint bench wheel clean

help:  ## what there is
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "%-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

# $(1): environment, $(2): constraints
define install
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(1)
	$(1)/bin/python -m pip install --quiet -c $(2) -e '.[$(EXTRAS)]'
	touch $@
endef

$(VENV)/.installed: pyproject.toml constraints.txt
	$(call install,$(VENV),constraints.txt)

$(OLDEST)/.installed: pyproject.toml constraints-oldest.txt
	$(call install,$(OLDEST),constraints-oldest.txt)

demo: $(VENV)/.installed  ## train, evaluate, save and reload a small hybrid on Python's standard library
	$(RUN) train.py configs/runs/demo.yaml

test: $(VENV)/.installed lint  ## ruff, and every test that is not slow and needs neither GPU nor network
	$(TEST_ENV) $(RUN) -m pytest -q -n $(JOBS) -m "$(QUICK)"

test-oldest: $(OLDEST)/.installed  ## parity, generate and remote code on the oldest supported transformers
	$(TEST_ENV) $(OLDEST)/bin/python -m pytest -q -n $(JOBS) -m "$(QUICK)" tests/parity tests/integration

test-all: $(VENV)/.installed  ## the slow tests too
	$(TEST_ENV) $(RUN) -m pytest -q -n $(JOBS) -m "not gpu and not network"

mutants: $(VENV)/.installed  ## remove each guard from each mixer and see a named test fail
	$(TEST_ENV) $(RUN) tests/mutants.py

lint: $(VENV)/.installed  ## ruff check and format
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

bench: $(VENV)/.installed  ## speed and memory against transformers, on one thread
	OMP_NUM_THREADS=1 $(RUN) benchmarks/cpu.py --against transformers

wheel: $(VENV)/.installed  ## build the sdist and the wheel into dist/
	$(RUN) -m build --no-isolation

clean:  ## remove environments and build results
	rm -rf $(VENV) $(OLDEST) build dist .pytest_cache .ruff_cache .hypothesis
