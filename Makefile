# Everything runs in .venv, which the first target that needs it makes with $(PYTHON) and fills with the versions of
# requirements.lock; it is filled again when the lock or pyproject.toml changes.

PYTHON ?= python3
# make aot AOT="aot and not slow", make meshes MESHES="mesh and not slow", make drills DRILLS="slow and not long": what
# .ci/run takes of them
AOT ?= aot
MESHES ?= mesh
DRILLS ?= slow
BIN := .venv/bin
INSTALL := $(BIN)/pip install --disable-pip-version-check --quiet --constraint requirements.lock
RECIPE := pyproject.toml setup.py requirements.lock

.PHONY: quickstart test lint format drills drills-table meshes parity interpret aot bench clean

quickstart: .venv/installed  ## trains a tiny SAMBA on the source code of Python's standard library
	$(BIN)/python scripts/train.py --config=configs/quickstart.py --workdir=runs/quickstart

test: .venv/installed-test  ## the tests that take seconds
	$(BIN)/pytest -n 2 --dist loadfile -m "not slow and not parity and not aot and not mesh"

drills: .venv/installed-test  ## the tests that take minutes: kills and resumes, whole runs
	$(BIN)/pytest -n 2 --dist loadfile -m "($(DRILLS)) and not parity and not aot and not mesh"

drills-table:  ## what the drills have shown, into docs/reliability.md
	$(PYTHON) tests/drills/table.py

meshes: .venv/installed-test  ## every mixer and family on every mesh, against one device, and runs of fifty steps
	$(BIN)/pytest -n 2 --dist worksteal -m "$(MESHES)" tests/laws tests/training

aot: .venv-aot/installed  ## compiles kernels for TPUs and GPUs that are not here, and prints what they take
	JAX_PLATFORMS=cpu TPU_SKIP_MDS_QUERY=1 ALLOW_MULTIPLE_LIBTPU_LOAD=1 .venv-aot/bin/pytest -n 2 --dist loadfile -m "$(AOT)" tests/aot

bench: .venv/installed  ## times kernels beside what one would write instead
	$(BIN)/python scripts/benchmark.py kernels

interpret: .venv/installed-parity  ## all tests of the Triton kernels in Triton's interpreter: half an hour
	$(BIN)/pytest -n 2 --dist loadfile -m "parity and slow" tests/parity

parity: .venv/installed-parity  ## beside PyTorch and transformers: logits, gradients, a hundred steps
	$(BIN)/pytest -n 2 --dist loadfile -m "parity and not slow" tests/parity

lint: .venv/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: .venv/installed-test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## what was built; .venv and runs stay
	rm -rf build dist *.egg-info .cache .hypothesis .pytest_cache .ruff_cache

.venv/installed: $(RECIPE) | .venv/bin/python
	@echo "installing lcx into .venv (some minutes the first time)"
	$(INSTALL) --editable .
	@touch $@

.venv/installed-test: $(RECIPE) | .venv/bin/python
	@echo "installing lcx and its test tools into .venv (some minutes the first time)"
	$(INSTALL) --editable '.[test]'
	@touch .venv/installed $@

# PyTorch's build for CPUs is enough; pip's own settings say which one is found.
.venv/installed-parity: $(RECIPE) | .venv/bin/python
	@echo "installing lcx, its test tools, PyTorch and transformers into .venv (some minutes the first time)"
	$(INSTALL) --editable '.[test,parity]'
	@touch .venv/installed .venv/installed-test $@

# An environment of its own: JAX looks for the devices of every plugin that is installed beside it.
.venv-aot/installed: $(RECIPE)
	@echo "installing lcx and the compilers for TPUs and GPUs into .venv-aot (some minutes the first time)"
	test -x .venv-aot/bin/python || $(PYTHON) -m venv .venv-aot
	.venv-aot/bin/pip install --disable-pip-version-check --quiet --constraint requirements.lock --editable '.[test,aot]'
	@touch $@

.venv/bin/python:
	$(PYTHON) -m venv .venv
