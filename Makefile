# `make demo` and `make test` are all a newcomer needs: each sets up .venv on a machine with nothing but Python 3.11.
PYTHON ?= python3
BIN := .venv/bin
RUN := $(BIN)/python -m
# uv does not read pip.conf: a machine that installs from a folder or a mirror says so in the same variables as for pip
export UV_FIND_LINKS ?= $(PIP_FIND_LINKS)
export UV_INDEX_URL ?= $(PIP_INDEX_URL)
FAST := not slow and not gpu and not network
SLOW := slow and not gpu and not network

.PHONY: demo test test-slow lint types bench clean

demo: .venv/installed
	$(BIN)/diffalign demo --out runs/demo

test: .venv/installed-dev
	$(RUN) pytest -m "$(FAST)" -rs tests

test-slow: .venv/installed-dev
	$(RUN) pytest -m "$(SLOW)" -rs tests

lint: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check --quiet . || { echo "run: $(BIN)/ruff format ."; exit 1; }

types: .venv/installed-dev
	$(BIN)/mypy

.venv/bin/uv:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "diffalign needs Python 3.11 or newer, this is " + sys.version.split()[0])'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv

.venv/installed: .venv/bin/uv pyproject.toml constraints.txt
	env $(if $(UV_FIND_LINKS),,-u UV_FIND_LINKS) $(if $(UV_INDEX_URL),,-u UV_INDEX_URL) $(BIN)/uv pip install --quiet --python $(BIN)/python -e . -c constraints.txt
	@touch $@

.venv/installed-dev: .venv/installed
	env $(if $(UV_FIND_LINKS),,-u UV_FIND_LINKS) $(if $(UV_INDEX_URL),,-u UV_INDEX_URL) $(BIN)/uv pip install --quiet --python $(BIN)/python -e ".[dev]" -c constraints.txt
	@touch $@

clean:
	rm -rf .venv build dist *.egg-info
