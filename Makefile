# What a developer types; `make help` says what each target does.
# A fresh Debian or Ubuntu machine needs nothing but make: the rest is installed and built.

PYTHON ?= python3
BIN := .venv/bin
TESTBED := tests/testbed
PACKAGES := $(TESTBED)/packages.sh

.PHONY: help bench demo test check lint types venv packages qemu testbed deb rpm fuzz pictures clean
.DEFAULT_GOAL := help

help: ## say what can be made
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-9s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: venv qemu ## show the main job step by step, with real guests
	@$(BIN)/python -m tests.demo

# percent of lines and branches; where parts are missing, tests are skipped and reach less
COVERAGE := $(if $(CI),95,0)

# tini reaps at once what daemons leave behind: libvirt waits for each QEMU that it has asked, and the
# first process of a container or a small machine may take its time
test: lint types testbed ## check style and types, and run all tests with branch coverage
	@$$(command -v tini >/dev/null && echo tini -s --) \
	    $(BIN)/python -m pytest --cov --cov-fail-under=$(COVERAGE)

check: test ## what CI runs: the same

lint: venv ## check style and format
	$(BIN)/ruff check
	$(BIN)/ruff format --check

types: venv ## check types
	$(BIN)/mypy

venv: $(BIN)/.installed ## the virtual environment in .venv, with igvmfw and what its tests need

# without the packages libvirt's Python module cannot be built
$(BIN)/.installed: pyproject.toml | packages
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and \
	    "igvmfw needs Python 3.11 or newer: make PYTHON=python3.11 …")'
	@echo "making the virtual environment .venv" >&2
	@$(PYTHON) -m venv --prompt igvmfw .venv
	@$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[completion,dev,libvirt]'
	@touch $@

packages:
	@$(PACKAGES) run

qemu: packages ## a QEMU that takes IGVM files: the distribution's, or one built into the cache
	@$(TESTBED)/build-qemu.sh >/dev/null

# the parts that only tests need
testbed: venv qemu ## everything the tests need, built into ~/.cache/igvmfw
	@$(PACKAGES) words rust roots
	@for release in $$($(TESTBED)/build-qemu.sh --releases); do \
	    $(TESTBED)/build-qemu.sh $$release >/dev/null || exit; done
	@PATH="$$($(TESTBED)/rust.sh):$$PATH" && \
	    $(TESTBED)/peers.sh >/dev/null && $(TESTBED)/reference.sh >/dev/null
	@for suite in $$($(TESTBED)/roots.sh --suites); do \
	    $(TESTBED)/roots.sh $$suite >/dev/null || exit; done
	@for kind in $$($(TESTBED)/package-roots.sh --kinds); do \
	    $(TESTBED)/package-roots.sh $$kind >/dev/null || exit; done
	@$(BIN)/python -c 'from tests.testbed.standin import build_library; build_library()'

# with QUICK=1 it only shows that it works
bench: testbed ## measure igvmfw beside its peers, and write docs/benchmarks.md
	@$(BIN)/python -m tests.bench $(if $(QUICK),--quick -o /dev/null)

deb: ## igvmfw's Debian packages, into dist (needs what packaging/debian/control names)
	@packaging/build-deb dist

rpm: ## igvmfw's RPM packages, into dist (needs rpmbuild and what the spec file names)
	@packaging/build-rpm dist

# atheris has wheels for x86-64 and some versions of Python; without it hypothesis does
fuzz: venv ## look for files that igvmfw does not cope with, for FUZZ_SECONDS (600)
	@$(BIN)/pip install --quiet --disable-pip-version-check --only-binary :all: atheris || \
	    echo "no atheris for this Python: drawing files with hypothesis" >&2
	@$(BIN)/python -m tests.fuzz.fuzz

pictures: venv ## draw the memory maps in docs/ anew
	@$(BIN)/python -m tests.pictures

clean: ## remove what was made in the checkout; the cache stays
	rm -rf .venv .demo build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis .coverage* *.egg-info
