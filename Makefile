# `make demo` and `make test` are all a newcomer needs: each sets up .venv on a machine with nothing but Python 3.11,
# and goes straight to work when pyproject.toml and constraints.txt have not changed since.
PYTHON ?= python3
WORKERS ?= 2
BIN := .venv/bin
FAST := not slow and not gpu and not network
SLOW := slow and not gpu and not network

# uv does not read pip's settings: a machine that installs from a folder or a mirror says so in pip's own variables
ifneq ($(PIP_FIND_LINKS),)
export UV_FIND_LINKS ?= $(PIP_FIND_LINKS)
endif
ifneq ($(PIP_INDEX_URL),)
export UV_DEFAULT_INDEX ?= $(PIP_INDEX_URL)
endif
INSTALL := $(BIN)/python -m uv pip install --quiet --python $(BIN)/python -c constraints.txt

.PHONY: demo test test-slow lint types bench bench-gpu bench-rewards bench-inversion bench-paid bench-noise bench-noise-gpu league league-paid league-noise league-video clean

demo: .venv/installed
	$(BIN)/diffalign demo --out runs/demo

# in as many processes as there are WORKERS, with one thread each: tests are small, and threads would only wait
test: .venv/installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "$(FAST)" -rs -n $(WORKERS) --dist loadfile tests

test-slow: .venv/installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "$(SLOW)" -rs -n $(WORKERS) --dist loadfile tests

lint: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/installed-dev
	$(BIN)/mypy

# ours and a plain DPO step on a small SDXL, on the CPU
bench: .venv/installed
	$(BIN)/python -m benchmarks.dpo_step --out runs/bench.json

# the same at full size on one GPU: one call, nothing to download, under 9 minutes
bench-gpu: .venv/installed
	$(BIN)/python -m benchmarks.gpu --minutes 9 --out runs/bench-gpu.json

# rewards against the plain way, on the CPU
bench-rewards: .venv/installed
	$(BIN)/python -m benchmarks.rewards --out runs/bench-rewards.json

# every method on every shipped model; resumable, hours on a CPU
league: .venv/installed
	$(BIN)/python -m benchmarks.league

# methods that are paid by a reward, at a larger budget; resumable, days on a CPU
league-paid: .venv/installed
	$(BIN)/python -m benchmarks.league_paid

# ways to look for better noise, on a distilled model; resumable, two hours of a core
league-noise: .venv/installed
	$(BIN)/python -m benchmarks.league_noise

# preference learning and motion, on tiny-video; resumable, two hours of a core
league-video: .venv/installed
	$(BIN)/python -m benchmarks.league_video

# inversion in batches against one picture at a time, on the CPU
bench-inversion: .venv/installed
	$(BIN)/python -m benchmarks.inversion --out runs/bench-inversion.json

# noise optimization against a loop in the order of the released code, on the CPU
bench-noise: .venv/installed
	$(BIN)/python -m benchmarks.noise --out runs/bench-noise.json

# the same at full size on one GPU: SDXL at 512 pixels, four rewards, random weights, under 9 minutes
bench-noise-gpu: .venv/installed
	$(BIN)/python -m benchmarks.noise_gpu --out runs/bench-noise-gpu.json

# updates on rollouts against the straightforward way, on the CPU
bench-paid: .venv/installed
	$(BIN)/python -m benchmarks.paid --out runs/bench-paid.json

.venv/bin/uv:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "diffalign needs Python 3.11 or newer, $(PYTHON) is " + sys.version.split()[0] + ": make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv

.venv/installed: .venv/bin/uv pyproject.toml constraints.txt
	$(INSTALL) -e .
	@touch $@

.venv/installed-dev: .venv/installed
	$(INSTALL) -e ".[dev]"
	@# compiled once, for the tests that start programs; files that are no Python 3 are no fault
	@$(BIN)/python -m compileall -q -j 0 .venv/lib >/dev/null 2>&1 || true
	@touch $@

clean:
	rm -rf .venv build dist *.egg-info
