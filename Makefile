# One folder, one virtual environment, no other state. `make demo` and `make test` set up what they need.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
DEMO   := export/demo
ENGINE := engines/demo
MODEL  := models/demo
RESULTS ?= build/gpu-results

.PHONY: demo test engine-sizes lint format clean help cpu-kernels kernels kernels-emulated plugins gpu

help:
	@echo "make demo   set up, then export, generate, validate and build an engine on the CPU"
	@echo "make test   set up, then run the whole test suite"
	@echo "make engine-sizes   engines of mini-62m in every dtype: what a plan holds beside the weights, time and memory"
	@echo "make lint   ruff, mypy and clang-format"
	@echo "make cpu-kernels       our ops as kernels of ONNX Runtime on the CPU"
	@echo "make kernels           the CUDA kernels, for every supported GPU (needs CUDA 13's nvcc, or the cuda-build extra in PYTHON)"
	@echo "make kernels-emulated  the same kernels for the CPU"
	@echo "make plugins           the CUDA kernels and, over them, the TensorRT plugins; TENSORRT_ROOT=folder, or headers from GitHub"
	@echo "make gpu    on a machine with an NVIDIA GPU: build, GPU tests, sanitizer, benchmark; RESULTS=folder"
	@echo "make clean  remove what demo produced, not the environment"

# torch is installed by itself and pinned: a range may bring a build with gigabytes of CUDA libraries.
# TensorRT-RTX's package is built from a stub whose build needs setuptools and wheel from this environment.
$(VENV)/.usable: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip setuptools wheel
	$(BIN)/pip install --quiet torch==2.13.0
	$(BIN)/pip install --quiet --no-build-isolation tensorrt-rtx-cu13==1.7.1.116
	$(BIN)/pip install --quiet --no-build-isolation --editable '.[torch,tensorrt-rtx,plot]'
	touch $@

# What the tests need besides is as large again. Of the full TensorRT, 10 and 11, PyPI serves nothing but lean runtimes:
# their registry takes the plugins. In folders of their own, as two of them are no one package.
LEAN := 10.16.1.11 11.4.0.106
$(VENV)/.ready: $(VENV)/.usable
	$(BIN)/pip install --quiet --no-build-isolation --editable '.[torch,tensorrt-rtx,plot,dev]'
	set -e; for version in $(LEAN); do $(BIN)/pip install --quiet --no-deps --upgrade --target $(VENV)/tensorrt-lean/$$version \
	  tensorrt-lean-cu13-libs==$$version tensorrt-lean-cu13-bindings==$$version; done
	touch $@

demo: $(VENV)/.usable
	PATH="$(abspath $(BIN)):$$PATH" scripts/demo.sh $(MODEL) $(DEMO) $(ENGINE)

test: $(VENV)/.ready
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python -m pytest -n 2 -m "not gpu"

engine-sizes: $(VENV)/.ready
	$(BIN)/python scripts/engine_sizes.py

lint: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy kimi_deploy
	git ls-files '*.cu' '*.cuh' '*.cpp' '*.h' '*.c' | xargs $(BIN)/clang-format --dry-run -Werror

cpu-kernels:
	cmake -S plugins -B build/cpu -DKIMI_CPU=ON
	cmake --build build/cpu --parallel

kernels:
	cmake -S plugins -B build/kernels -DKIMI_EMULATED=OFF -DKIMI_PYTHON="$(shell command -v $(PYTHON))"
	cmake --build build/kernels --parallel
	$(PYTHON) plugins/ptxas_report.py build/kernels

kernels-emulated:
	cmake -S plugins -B build/kernels-emulated -DKIMI_CUDA=OFF
	cmake --build build/kernels-emulated --parallel --target kimi_kernels_emulated

plugins:
	cmake -S plugins -B build/kernels -DKIMI_EMULATED=OFF -DKIMI_TENSORRT=ON -DKIMI_PYTHON="$(shell command -v $(PYTHON))"
	cmake --build build/kernels --parallel

gpu:
	PYTHON=$(PYTHON) scripts/gpu_suite.sh $(RESULTS)

format: $(VENV)/.ready
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(DEMO) $(ENGINE)
