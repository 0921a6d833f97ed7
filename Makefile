# Every command sets up what it needs: a virtual environment, the dependencies, the build.
PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV ?= .venv
BIN := $(VENV)/bin
SOURCES := setup.py pyproject.toml CMakeLists.txt $(shell find csrc engine kernels benches -type f -not -name '*.so' -not -path '*/__pycache__/*' 2>/dev/null)
CXX_SOURCES := $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

.PHONY: help demo test test-all bench lint format docs build wheel-check gpu-check sanitize clean
help:
	@echo "make demo       four generative workloads, stock against onepass; writes demo_out/report.html"
	@echo "make test       the test suite          make test-all   with the slow sweeps"
	@echo "make bench      benchmarks to bench_out/            make lint       ruff, clang-format, mypy, generated docs"
	@echo "make gpu-check  build, tests and baselines on an NVIDIA GPU machine (OUT=DIR)"
	@echo "make sanitize   the CPU kernels under ASan and UBSan"

$(BIN)/python:
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) is missing: apt-get install python3 python3-venv python3-dev"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo "venv is missing: apt-get install python3-venv"; exit 1; }
	@$(PYTHON) -c 'import sysconfig, pathlib, sys; sys.exit(not (pathlib.Path(sysconfig.get_path("include")) / "Python.h").exists())' \
		|| { echo "Python.h is missing: apt-get install python3-dev"; exit 1; }
	@command -v $${CXX:-c++} >/dev/null || { echo "a C++ compiler is missing: apt-get install g++"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip

# torch first and by itself: a range would fetch a build for GPUs.
$(VENV)/.torch-$(TORCH): $(BIN)/python
	$(BIN)/pip install --quiet "$(TORCH)"
	@rm -f $(VENV)/.torch-* && touch "$@"

$(VENV)/.dev: $(VENV)/.torch-$(TORCH) pyproject.toml
	$(BIN)/python tools/dev_requirements.py | $(BIN)/pip install --quiet -r /dev/stdin
	@touch $@

$(VENV)/.built: $(VENV)/.dev $(SOURCES)
	$(BIN)/pip install --quiet --no-build-isolation --no-deps --editable .
	@touch $@

build: $(VENV)/.built
