#!/usr/bin/env bash
# Builds the kernels for this machine's GPU, runs every GPU test, compute-sanitizer on a small case, and the kernel
# benchmark; everything they say goes into one folder. Needs CUDA 13's nvcc and CMake, and a python3 with PyTorch,
# Triton and pytest; no network, no virtual environment. Under 8 minutes.
#
# The TensorRT plugins are built and tested where TensorRT's headers are: TENSORRT_ROOT, or build/tensorrt-headers/include.
#
#   scripts/gpu_suite.sh [FOLDER] [BENCHMARK_SECONDS]
#
# Exit status 0 if every step passed. Each step's log and, in suite.txt, its status and seconds are in FOLDER.
set -uo pipefail
started_as="scripts/gpu_suite.sh $*"
results=$(realpath -m "${1:-build/gpu-results}")
benchmark_seconds=${2:-150}
cd "$(dirname "$0")/.."
mkdir -p "$results"
python=${PYTHON:-python3}
export PYTHONPATH=.${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
[ -d /usr/local/cuda/bin ] && PATH=$PATH:/usr/local/cuda/bin
failed=0
if [ -z "${TENSORRT_ROOT:-}" ] && [ -f build/tensorrt-headers/include/NvInferRuntime.h ]; then
  TENSORRT_ROOT=$PWD/build/tensorrt-headers
  export TENSORRT_ROOT
fi

# step NAME SECONDS COMMAND...: runs it with its output in NAME.log, and notes how it went
step() {
  local name=$1 limit=$2 begin=$SECONDS status=0
  shift 2
  timeout --kill-after=15 "$limit" "$@" >"$results/$name.log" 2>&1 || status=$?
  echo "$name: status $status, $((SECONDS - begin)) s" | tee -a "$results/suite.txt"
  [ "$status" -eq 0 ] || tail -n 15 "$results/$name.log"
  return "$status"
}

architecture=$("$python" - <<'PYTHON'
from kimi_deploy.cuda_driver import gpu_devices
devices = gpu_devices()
if devices:
    number = devices[0].capability.replace(".", "")
    # 9.0 and later have instructions of their own, which only the suffixed name turns on
    print(number + "a" if int(number) >= 90 else number)
PYTHON
)
if [ -z "$architecture" ]; then
  echo "error: this machine has no CUDA device; run the suite on one that has" >&2
  exit 1
fi

{
  echo "date: $(date -u +%Y-%m-%dT%H:%M:%SZ)"
  echo "command: $started_as"
  echo "commit: $(git rev-parse --verify --quiet HEAD 2>/dev/null || echo unknown)"
  nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader 2>/dev/null | sed 's/^/device: /'
  echo "architecture: sm_$architecture"
  echo "nvcc: $(nvcc --version 2>/dev/null | tail -n 1)"
  "$python" - <<'PYTHON'
import platform
from importlib.metadata import PackageNotFoundError, version
print("python:", platform.python_version())
for name in ("torch", "triton", "numpy", "onnxruntime", "fla-core", "flash-kda", "flashinfer-python"):
    try:
        print(f"{name}: {version(name)}")
    except PackageNotFoundError:
        print(f"{name}: not installed")
PYTHON
} >"$results/suite.txt"
cat "$results/suite.txt"

build() {
  cmake -S plugins -B build/kernels -DKIMI_EMULATED=OFF "-DKIMI_ARCHITECTURES=$architecture" &&
    cmake --build build/kernels --parallel && "$python" plugins/ptxas_report.py build/kernels
}
export -f build
export architecture python
step build 180 bash -c build || failed=1
[ -f build/kernels/libkimi_plugins.so ] || echo "plugins: not built, no TensorRT headers" | tee -a "$results/suite.txt"

# 100 s to compile everybody's kernels, on all cores; kernels.json grows as it goes, and a limit ends it politely
step benchmark $((benchmark_seconds + 130)) "$python" -m kimi_deploy bench kernels \
  --budget "$benchmark_seconds" --output "$results" || failed=1

step thresholds 60 "$python" -m kimi_deploy.bench.kernels.thresholds || failed=1

# side by side from here on: nothing is timed any more
sanitize() {
  local bad=0
  for tool in memcheck racecheck; do
    echo "== $tool"
    timeout 90 compute-sanitizer --tool "$tool" --error-exitcode 9 "$python" scripts/sanitizer_case.py || bad=1
  done
  return "$bad"
}
export -f sanitize
if command -v compute-sanitizer >/dev/null; then
  step sanitizer 190 bash -c sanitize &
else
  echo "sanitizer: not on this machine" | tee -a "$results/suite.txt"
fi

workers=()
"$python" -c 'import xdist' 2>/dev/null && workers=(-n "$(($(nproc) < 16 ? ($(nproc) + 1) / 2 : 8))")
step tests 230 "$python" -m pytest -m gpu -q -p no:cacheprovider "${workers[@]}" \
  tests/kernels \
  tests/ops \
  tests/parity/test_source_model.py \
  tests/engine/test_plugin_on_gpu.py \
  tests/plugins \
  tests/runtime/test_cuda_device.py \
  tests/runtime/test_engine_on_gpu.py \
  tests/runtime/test_ort_cuda.py || failed=1
for job in $(jobs -p); do
  wait "$job" || failed=1
done

echo "total: $SECONDS s, $([ "$failed" -eq 0 ] && echo passed || echo FAILED)" | tee -a "$results/suite.txt"
exit "$failed"
