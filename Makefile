# make train: a hybrid language model trains on this machine's own Python sources, in a few minutes on two cores.
# make test:  installs and passes the tests. make test-all adds the slow ones.
PYTHON ?= python3
VERSION := $(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null)
SUPPORTED := $(shell $(PYTHON) -c 'import sys; print(sys.version_info >= (3, 11))' 2>/dev/null)
PINS := $(firstword $(wildcard constraints/python-$(VERSION).txt) constraints/python-3.12.txt)
VENV ?= .venv
RUN := $(VENV)/bin/python
CONFIG ?= hybrid_tiny
export PIP_DISABLE_PIP_VERSION_CHECK = 1

.PHONY: train test test-all test-quick lint docs clean
.DELETE_ON_ERROR:

ifneq ($(SUPPORTED),True)
$(error $(PYTHON) is Python '$(VERSION)': hybridlm needs Python 3.11 or newer; name one with make PYTHON=python3.12)
endif

train: $(VENV)/installed
	$(RUN) train.py --config $(CONFIG) $(ARGS)

test: $(VENV)/installed-dev
	$(RUN) -m pytest $(ARGS)

test-all: $(VENV)/installed-dev
	$(RUN) -m pytest -m "slow or not slow" $(ARGS)

# What differs between JAX versions: the ops, one family of layers, one short run.
test-quick: $(VENV)/installed-dev
	$(RUN) -m pytest -m "quick and not slow" $(ARGS)

lint: $(VENV)/installed-dev
	$(RUN) -m ruff check . && $(RUN) -m ruff format --check .

docs: $(VENV)/installed
	$(RUN) -m pip install -q mkdocs-material && $(VENV)/bin/mkdocs build --strict

$(VENV)/installed: pyproject.toml $(PINS)
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install -q --retries 10 -e . -c $(PINS)
	touch $@

$(VENV)/installed-dev: $(VENV)/installed
	$(RUN) -m pip install -q --retries 10 -e '.[dev]' -c $(PINS)
	touch $@

clean:
	rm -rf $(VENV) .jax_cache .pytest_cache build dist site
