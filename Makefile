# make train: a hybrid language model trains on this machine's own Python sources, in a few minutes on two cores.
# make test:  installs and passes the tests. make test-all adds the slow ones; make parity and make tpu-compiler first
#             install what some of them compare with or compile by, and are skipped without.
PYTHON ?= python3
VERSION := $(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null)
SUPPORTED := $(shell $(PYTHON) -c 'import sys; print(sys.version_info >= (3, 11))' 2>/dev/null)
PINS := $(firstword $(wildcard constraints/python-$(VERSION).txt) constraints/python-3.12.txt)
VENV ?= .venv
RUN := $(VENV)/bin/python
CONFIG ?= hybrid_tiny
# Processes of a test run; each takes up to 7 GB. Tests move to whoever has none left.
WORKERS ?= 2
PYTEST := $(RUN) -m pytest -n $(WORKERS) --dist worksteal
export PIP_DISABLE_PIP_VERSION_CHECK = 1

.PHONY: train test test-all test-quick test-newer parity lm-eval storage-test wandb tpu-compiler lint types docs clean
.DELETE_ON_ERROR:

ifneq ($(SUPPORTED),True)
$(error $(PYTHON) is Python '$(VERSION)': hybridlm needs Python 3.11 or newer; name one with make PYTHON=python3.12)
endif

train: $(VENV)/installed
	$(RUN) train.py --config $(CONFIG) $(ARGS)

test: $(VENV)/installed-dev
	$(PYTEST) $(ARGS)

# The targets below compile programs as users do; `make test`, and the slow ones of test-all, in the least time.
test-quick test-newer: export COMPILE_AS_SHIPPED = 1

# The slow ones run even if one of the others fails.
test-all: $(VENV)/installed-dev
	COMPILE_AS_SHIPPED=1 $(PYTEST) $(ARGS); others=$$?; $(PYTEST) -m slow $(ARGS) && exit $$others

# What differs between JAX versions: the ops, one family of layers, one short run.
test-quick: $(VENV)/installed-dev
	$(PYTEST) -m "quick and not slow" $(ARGS)

# The same and what older Pythons skip: interpreted Hopper kernels (JAX 0.11), programs compiled for TPUs (libtpu).
test-newer: $(VENV)/installed-dev
	$(PYTEST) -m "(quick or newer or libtpu) and not slow" $(ARGS)

parity: $(VENV)/installed-parity

lm-eval: $(VENV)/installed-lm-eval

storage-test: $(VENV)/installed-storage-test

wandb: $(VENV)/installed-wandb

tpu-compiler: $(VENV)/installed-tpu-compiler

lint: $(VENV)/installed-dev
	$(RUN) -m ruff check . && $(RUN) -m ruff format --check .

# The types of the packages and of a user's program, tests/typed, whose wrong calls have to be errors.
types: $(VENV)/installed-dev
	$(RUN) -m mypy

docs: $(VENV)/installed
	$(RUN) -m pip install -q mkdocs-material && $(VENV)/bin/mkdocs build --strict

$(VENV)/installed: pyproject.toml $(PINS)
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install -q --retries 10 -e . -c $(PINS)
	touch $@

$(VENV)/installed-dev: $(VENV)/installed
	$(RUN) -m pip install -q --retries 10 -e '.[dev]' -c $(PINS)
	touch $@

$(VENV)/installed-%: $(VENV)/installed-dev
	$(RUN) -m pip install -q --retries 10 -e '.[$*]' -c $(PINS)
	touch $@

clean:
	rm -rf $(VENV) .jax_cache .mypy_cache .pytest_cache build dist site
