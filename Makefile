# Every command sets up what it needs: a virtual environment, the dependencies, the build. Repeated, it is quick.
PYTHON ?= python3
TORCH ?= torch==2.13.0
OUT ?= gpu_check_out
VENV ?= .venv
JOBS ?= 2
BIN := $(VENV)/bin
# In several processes, whose threads yield the cores where they wait.
PYTEST := OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -q -n $(JOBS) --dist worksteal
SOURCES := setup.py pyproject.toml CMakeLists.txt $(shell find csrc -type f)
CXX_SOURCES := $(shell find csrc tests/gpuless/cuda -type f -regex '.*\.\(h\|cpp\|cuh\|cu\)')
SANITIZED := build/sanitize
SANITIZED_TESTS := $(filter-out %_plans.py %_reference.py,$(wildcard tests/test_attention*.py tests/test_denoise*.py tests/test_volrend*.py)) \
	tests/test_reparam.py tests/test_rng.py -k "not compile and not library_op and not fake"

# The oldest and the newest Triton that pair with the supported builds of PyTorch. The oldest compiles for one target
# in `make gpuless`, for all of them in `make test-all` and `make kernel-report`.
TRITON_OLD := 3.6.0
TRITON_NEW := 3.9.0
OLD_TARGETS ?= sm_90
GPULESS := build/gpuless
with_triton = TRITON_CACHE_DIR=$(abspath $(GPULESS))/cache-$(1) PYTHONPATH=$(abspath $(GPULESS))/triton-$(1) $(2) $(BIN)/python
INTERPRETED := rng reparam latent gumbel interpolate denoise denoise_api volrend volrend_api volrend_reference \
	attention_triton attention_backward_triton attention_merge

.PHONY: help build demo test test-all bench lint format docs gpu-check sanitize clean
help:
	@echo "make demo       four generative workloads, stock against onepass; writes demo_out/report.html"
	@echo "make test       the test suite; make test-all adds the slow sweeps and every GPU target"
	@echo "make bench      benchmarks of every op, to bench_out/"
	@echo "make lint       ruff, clang-format, mypy on the installed package, generated docs; make format mends"
	@echo "make docs       writes docs/ops.md and docs/performance.md from the table of ops and the results"
	@echo "make gpuless    GPU kernels without a GPU; make kernel-report accepts what they compile to"
	@echo "make gpu-check  build, GPU tests and baselines on a machine with an NVIDIA GPU; OUT=DIR"
	@echo "make sanitize   the tests of the CPU kernels under ASan and UBSan"
	@echo "make TORCH='torch==X' ... chooses the build of PyTorch ($(TORCH))"

$(BIN)/python:
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) is missing: apt-get install python3 python3-venv python3-dev"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo "Python's venv is missing: apt-get install python3-venv"; exit 1; }
	@$(PYTHON) -c 'import sysconfig, pathlib; pathlib.Path(sysconfig.get_path("include"), "Python.h").stat()' 2>/dev/null \
		|| { echo "Python.h is missing: apt-get install python3-dev"; exit 1; }
	@command -v $${CXX:-c++} >/dev/null || { echo "a C++ compiler is missing: apt-get install g++"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip "setuptools>=77" "pybind11>=2.13" "cmake>=3.25" ninja

# torch first and by itself: a range would fetch a build for GPUs. The stamp holds the choice.
$(VENV)/torch.txt: $(BIN)/python force
	@echo "$(TORCH)" | cmp -s - $@ || { $(BIN)/pip install --quiet "$(TORCH)" && echo "$(TORCH)" > $@; }
.PHONY: force
force:

$(VENV)/built: $(VENV)/torch.txt $(SOURCES)
	ONEPASS_NATIVE=$${ONEPASS_NATIVE:-1} $(BIN)/pip install --quiet --no-build-isolation --editable '.[dev]'
	@touch $@

build: $(VENV)/built

demo: build
	$(BIN)/onepass demo

test: build
	$(PYTEST) -m "not slow and not gpu"

test-all: build
	$(PYTEST) -m "not gpu"
	$(MAKE) --no-print-directory gpuless OLD_TARGETS=

bench: build
	$(BIN)/onepass bench

# Types are checked on the package as installed: engine/ is onepass only there.
lint: build
	$(BIN)/ruff check .
	$(BIN)/clang-format --dry-run --Werror $(CXX_SOURCES)
	@$(BIN)/pip install --quiet --no-build-isolation --no-deps --upgrade --target build/installed .
	cd build/installed && $(abspath $(BIN))/mypy --config-file $(CURDIR)/pyproject.toml -p onepass
	@$(BIN)/onepass info --markdown | diff -u docs/ops.md - || { echo "docs/ops.md is old: make docs"; exit 1; }

format: build
	$(BIN)/ruff check --fix .
	$(BIN)/clang-format -i $(CXX_SOURCES)

docs: build
	$(BIN)/onepass info --markdown > docs/ops.md
	$(BIN)/python -m onepass.benches.performance > docs/performance.md

# Two Tritons lie beside the environment, which needs none itself.
$(GPULESS)/triton-%/ready: | build
	$(BIN)/pip install --quiet --no-deps --upgrade --target $(@D) triton==$*
	@touch $@

# GPU kernels without a GPU: interpreted, compiled for every architecture, and the report of what they compile to. The
# longest part first.
.PHONY: gpuless kernel-report gpuless-interpreted gpuless-nvcc
gpuless: build $(GPULESS)/triton-$(TRITON_OLD)/ready $(GPULESS)/triton-$(TRITON_NEW)/ready
	$(MAKE) --no-print-directory -j2 --output-sync=target gpuless-compiled-$(TRITON_NEW) gpuless-interpreted \
		gpuless-compiled-$(TRITON_OLD) gpuless-driven-$(TRITON_NEW) gpuless-driven-$(TRITON_OLD) gpuless-nvcc
	$(BIN)/python tests/gpuless/report.py check $(GPULESS)/*.json
	$(call with_triton,$(TRITON_NEW)) -m pytest -q tests/gpuless/test_cubin.py tests/gpuless/test_report.py

gpuless-interpreted:
	$(call with_triton,$(TRITON_OLD),TRITON_INTERPRET=1) -m pytest -q tests/gpuless/triton
	$(call with_triton,$(TRITON_NEW),TRITON_INTERPRET=1) -m pytest -q tests/gpuless/triton $(INTERPRETED:%=tests/test_%.py) \
		-k "triton" -m "not slow"

gpuless-driven-%:
	$(call with_triton,$*) -m pytest -q tests/gpuless/triton

gpuless-compiled-$(TRITON_OLD): gpuless-compiled-%:
	$(call with_triton,$*) tests/gpuless/report.py collect $(GPULESS)/triton-$*.json $(OLD_TARGETS)

gpuless-compiled-$(TRITON_NEW): gpuless-compiled-%:
	$(call with_triton,$*) tests/gpuless/report.py collect $(GPULESS)/triton-$*.json
	$(call with_triton,$*) tests/gpuless/triton/benchmarks.py check

# What nvcc made of the CUDA kernels in `make build`; Triton brings the tool that reads it.
gpuless-nvcc: build $(GPULESS)/triton-$(TRITON_NEW)/ready
	@if command -v nvcc >/dev/null; then $(call with_triton,$(TRITON_NEW)) tests/gpuless/cuda/compiled.py $(GPULESS)/nvcc.json; \
		else echo "no nvcc: the report's CUDA rows are not checked"; rm -f $(GPULESS)/nvcc.json; fi

kernel-report: build $(GPULESS)/triton-$(TRITON_OLD)/ready $(GPULESS)/triton-$(TRITON_NEW)/ready gpuless-nvcc
	$(call with_triton,$(TRITON_OLD)) tests/gpuless/report.py collect $(GPULESS)/triton-$(TRITON_OLD).json
	$(call with_triton,$(TRITON_NEW)) tests/gpuless/report.py collect $(GPULESS)/triton-$(TRITON_NEW).json
	$(BIN)/python tests/gpuless/report.py write $(GPULESS)/*.json
	$(call with_triton,$(TRITON_NEW)) tests/gpuless/triton/benchmarks.py write
	$(MAKE) --no-print-directory docs

gpu-check:
	$(PYTHON) benches/gpu_check.py --out $(OUT)

# A copy of the package with an extension built for ASan and UBSan, whose runtimes must be the process's first libraries.
sanitize: build
	rm -rf $(SANITIZED)/package && mkdir -p $(SANITIZED)/package && cp -r engine $(SANITIZED)/package/onepass
	rm -f $(SANITIZED)/package/onepass/_C.*.so
	$(BIN)/cmake -S . -B $(SANITIZED) -G Ninja -DCMAKE_BUILD_TYPE=RelWithDebInfo -DONEPASS_CUDA=OFF \
		-DONEPASS_SANITIZE=address,undefined -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN))/ninja \
		-DPython_EXECUTABLE=$(abspath $(BIN))/python -Dpybind11_DIR=$$($(BIN)/python -m pybind11 --cmakedir) \
		-DCMAKE_LIBRARY_OUTPUT_DIRECTORY=$(abspath $(SANITIZED))/package/onepass
	$(BIN)/cmake --build $(SANITIZED)
	PYTHONPATH=$(abspath $(SANITIZED))/package ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 \
		LD_PRELOAD="$$(for name in libasan libubsan libstdc++; do $${CXX:-c++} -print-file-name=$$name.so; done | xargs)" \
		$(BIN)/python -m pytest -q --capture=sys -p no:cacheprovider -m "not slow and not gpu" $(SANITIZED_TESTS)

clean:
	rm -rf build $(VENV) *.egg-info engine/_C.*.so
