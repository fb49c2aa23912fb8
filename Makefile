PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: help demo test test-slow lint format docs bench clean wheel wheel-aarch64

help: ## list the targets
	@grep -E '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 15

demo: $(VENV)/.installed ## install, train on the embedded digits, print the held-out accuracy
	$(BIN)/multifire demo

# Two test processes on few cores need threads that sleep while they wait. What computes is tested as users run it: one
# process, all threads, OpenMP's default policy; and again with oneDNN limited to AVX2, which has had faults of its own.
COMPUTING := tests/nn tests/training tests/export/test_int8.py tests/test_repeatability.py tests/ops/test_cpu.py \
	tests/ops/test_held_gradients.py

test: lint ## install and run every check but the slow ones
	OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -m "not slow" -n 2 $(COMPUTING:%=--ignore=%)
	$(BIN)/python -m pytest -m "not slow" $(COMPUTING)
	ONEDNN_MAX_CPU_ISA=AVX2 $(BIN)/python -m pytest -m "not slow" tests/test_repeatability.py

test-slow: $(VENV)/.installed-dev ## the tests that take minutes or need a data set
	OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -m slow

lint: $(VENV)/.installed-dev ## style, types, and the direction of imports
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright
	$(BIN)/lint-imports --no-cache

format: $(VENV)/.installed-dev ## rewrite the sources in the house style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(VENV)/.installed-docs ## build the documentation into build/docs; runs the tutorials, a few minutes
	$(BIN)/python -m sphinx -W --keep-going -b html -d build/doctrees docs build/docs
	$(BIN)/python docs/check_links.py build/docs

bench: build/bench-venv/.installed ## measure beside other frameworks, in a venv of their own (PARTS=..., RUNS=7)
	build/bench-venv/bin/python -m benchmarks $(PARTS) --runs $(or $(RUNS),7)

# The libraries of a wheel use torch's OpenMP, so that is the one to look at, not the system's.
SHOW_WHEEL = $(BIN)/auditwheel show --ldpaths "$$($(BIN)/python -c 'import torch; print(torch.__path__[0])')/lib"

wheel: $(VENV)/.installed-dev ## build the wheel into dist/, and try it in a fresh environment without a compiler
	rm -rf dist
	$(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir dist .
	$(PIP_INSTALL) auditwheel
	$(SHOW_WHEEL) dist/*.whl
	$(BIN)/python tools/try_wheel.py dist/*.whl

wheel-aarch64: $(VENV)/.installed-dev ## the wheel for 64-bit ARM Linux into dist/, by the cross compiler g++-aarch64-linux-gnu
	MULTIFIRE_PLATFORM=linux_aarch64 CMAKE_TOOLCHAIN_FILE=$(CURDIR)/cmake/aarch64.cmake \
		$(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir dist .
	$(PIP_INSTALL) auditwheel
	$(SHOW_WHEEL) dist/*aarch64.whl

clean: ## remove what was installed and built; runs and data stay
	rm -rf $(VENV) build dist .pytest_cache .ruff_cache .hypothesis

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: $(BIN)/python pyproject.toml constraints.txt
	$(PIP_INSTALL) -e .
	@touch $@

$(VENV)/.installed-dev: $(BIN)/python pyproject.toml constraints.txt
	$(PIP_INSTALL) -e '.[dev]'
	@touch $@ $(VENV)/.installed

$(VENV)/.installed-docs: $(BIN)/python pyproject.toml constraints.txt
	$(PIP_INSTALL) -e '.[docs]'
	@touch $@ $(VENV)/.installed

build/bench-venv/.installed: benchmarks/requirements.txt pyproject.toml constraints.txt
	$(PYTHON) -m venv build/bench-venv
	build/bench-venv/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	build/bench-venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -r benchmarks/requirements.txt
	@touch $@
