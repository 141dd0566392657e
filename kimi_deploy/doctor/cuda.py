"""The CUDA driver, the GPUs, the toolkit, and cuda-python."""

from __future__ import annotations

import re
import shutil
import subprocess

from kimi_deploy.cuda_driver import driver_version, gpu_devices
from kimi_deploy.doctor.check import Check, installed_version
from kimi_deploy.errors import install_line

NO_GPU = "running engines needs a GPU; ONNX Runtime on the CPU and building TensorRT-RTX engines do not"


def driver() -> list[Check]:
    version = driver_version()
    if version is None:
        return [Check("cuda driver", "warning", "none, or none that starts", "install NVIDIA's driver to run engines")]
    good = version[0] >= 13
    fix = "" if good else "update it: TensorRT-RTX for CUDA 13, cuda-python and our kernels want a driver for CUDA 13"
    return [Check("cuda driver", "ok" if good else "warning", f"CUDA {version[0]}.{version[1]}", fix)]


def gpus() -> list[Check]:
    found: list[Check] = []
    for index, device in enumerate(gpu_devices()):
        old = int(device.capability.split(".")[0]) < 8
        fix = "the project's kernels start at 8.0: engines built with --plugin none" if old else ""
        seen = f"{device.name}, compute capability {device.capability}"
        found.append(Check(f"gpu {index}", "warning" if old else "ok", seen, fix))
    return found or [Check("gpu", "warning", "none", NO_GPU)]


def toolkit() -> list[Check]:
    path = shutil.which("nvcc")
    if path is None:
        fix = "only needed to compile the kernels and plugins (make kernels, make plugins); CUDA 13 or later"
        return [Check("cuda toolkit", "warning", "no nvcc on PATH", fix)]
    text = subprocess.run([path, "--version"], capture_output=True, text=True, check=True).stdout
    release = re.search(r"release (\d+)\.(\d+)", text)
    seen = f"{release[0]}, {path}" if release else path
    if release and int(release[1]) >= 13:
        return [Check("cuda toolkit", "ok", seen)]
    return [Check("cuda toolkit", "warning", seen, "the kernels are compiled with CUDA 13 or later")]


def cuda_python() -> list[Check]:
    version, compiler = installed_version("cuda-bindings"), installed_version("nvidia-cuda-nvrtc")
    seen = f"{version or 'not installed'}, NVRTC {compiler or 'of the toolkit, if any'}"
    if version is not None:
        return [Check("cuda-python", "ok", seen)]
    return [Check("cuda-python", "warning", seen, f"to run engines: {install_line('run-engine')}")]
