"""The only reasons a test may be skipped: a declared capability that this machine does not have."""

import importlib.util
import os
import platform
import shutil
import sys
from pathlib import Path

import onnxruntime
import pytest
import torch

from kimi_deploy.cuda_driver import gpu_devices
from kimi_deploy.engine.backend import TensorRT, installed, load

needs_tensorrt_rtx = pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx") is None, reason="the tensorrt-rtx extra is not installed"
)
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
needs_no_cuda = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
needs_cuda_provider = pytest.mark.skipif(
    "CUDAExecutionProvider" not in onnxruntime.get_available_providers(), reason="onnxruntime-gpu is not installed"
)
interprets_triton = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="Triton compiles for the GPU of this machine"
)

needs_x86 = pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="not an x86-64 processor")
needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="no CUDA compiler on this machine")
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium to open a page in")
needs_packaged_tensorrt_headers = pytest.mark.skipif(
    importlib.util.find_spec("kernel_lens") is None or "TENSORRT_ROOT" in os.environ,
    reason="no package carries TensorRT's C++ headers here, or TENSORRT_ROOT has others",
)
needs_tensorrt_headers = pytest.mark.skipif(
    importlib.util.find_spec("kernel_lens") is None and "TENSORRT_ROOT" not in os.environ,
    reason="TensorRT's C++ headers are nowhere: no TENSORRT_ROOT, no package that carries them (kernel-lens)",
)


def runnable_tensorrt() -> TensorRT | None:
    """The TensorRT that runs engines on this machine's GPU, if there is one."""
    devices = gpu_devices()
    if devices and installed("tensorrt"):
        return "tensorrt"
    if devices and installed("tensorrt-rtx") and devices[0].capability in load("tensorrt-rtx").offered_capabilities:
        return "tensorrt-rtx"
    return None


needs_runnable_tensorrt = pytest.mark.skipif(
    runnable_tensorrt() is None, reason="no TensorRT that runs on a GPU of this machine"
)

# TensorRT's lean runtimes, which `make test` installs beside everything else: two cannot be imported from one place
LEAN_RUNTIMES = {folder.name: folder for folder in (Path(sys.prefix) / "tensorrt-lean").glob("*")}
needs_lean_runtimes = pytest.mark.skipif(not LEAN_RUNTIMES, reason="TensorRT's lean runtimes are not installed")
