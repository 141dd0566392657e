"""What this machine has and what that allows: each check gives ok, warning or problem, and the fix."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from kimi_deploy.cuda_driver import driver_version, gpu_devices

Status = Literal["ok", "warning", "problem"]


@dataclass(frozen=True)
class Check:
    """One finding: `status`, what was `seen`, and for anything but ok the `fix` or what does not work without it."""

    name: str
    status: Status
    seen: str
    fix: str = ""

    def to_dict(self) -> dict[str, str]:
        return asdict(self)


def run_checks(folder: Path) -> list[Check]:
    """Every check; `folder` is where artefacts would be written. A check that fails to run is itself a problem."""
    checks: list[Callable[[], Check | list[Check]]] = [
        _python,
        _packages,
        _onnxruntime,
        _driver,
        _gpu,
        _nvcc,
        _tensorrt,
        lambda: _disk(folder),
        _memory,
    ]
    results: list[Check] = []
    for check in checks:
        try:
            found = check()
        except Exception as error:  # a broken installation must not hide the other findings
            name = getattr(check, "__name__", "check").strip("_<>")
            found = Check(name, "problem", f"{type(error).__name__}: {error}", "reinstall the package it names")
        results += found if isinstance(found, list) else [found]
    return results


def _python() -> Check:
    version = platform.python_version()
    good = (3, 11) <= sys.version_info[:2] <= (3, 12)
    return Check("python", "ok" if good else "problem", version, "" if good else "use Python 3.11 or 3.12")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _packages() -> list[Check]:
    wanted = (
        ("torch", "kimi-deploy[torch]", "export and validate need it; generate with ONNX Runtime does not"),
        ("onnx", "kimi-deploy", "everything needs it"),
        ("onnx-ir", "kimi-deploy", "everything needs it"),
        ("polygraphy", "kimi-deploy[tensorrt-rtx]", "build-engine's printed command lines use it"),
        ("triton", "kimi-deploy[triton]", "GPU kernels of the source model use it"),
    )
    found = []
    for package, extra, use in wanted:
        version = _version(package)
        required = extra == "kimi-deploy"
        status: Status = "ok" if version else "problem" if required else "warning"
        fix = "" if version else f"pip install '{extra}' ({use})"
        found.append(Check(package, status, version or "not installed", fix))
    return found


def _onnxruntime() -> Check:
    import onnxruntime

    providers = onnxruntime.get_available_providers()
    seen = f"{onnxruntime.__version__}: {', '.join(providers)}"
    if "CUDAExecutionProvider" in providers:
        return Check("onnxruntime", "ok", seen)
    return Check(
        "onnxruntime",
        "ok" if not Path("/dev/nvidia0").exists() else "warning",
        seen,
        "for --provider cuda: pip uninstall onnxruntime; pip install onnxruntime-gpu",
    )


def _driver() -> Check:
    version = driver_version()
    if version is None:
        return Check(
            "cuda driver",
            "warning",
            "none, or no device",
            "ONNX Runtime's CPU provider and building TensorRT-RTX engines work without; running engines does not",
        )
    good = version[0] >= 13
    return Check(
        "cuda driver",
        "ok" if good else "warning",
        f"CUDA {version[0]}.{version[1]}",
        "" if good else "TensorRT-RTX for CUDA 13 and our kernels want a driver for CUDA 13",
    )


def _gpu() -> list[Check]:
    found = []
    for index, device in enumerate(gpu_devices()):
        old = int(device.capability.split(".")[0]) < 8
        found.append(
            Check(
                f"gpu {index}",
                "warning" if old else "ok",
                f"{device.name}, compute capability {device.capability}",
                "the project's kernels start at 8.0" if old else "",
            )
        )
    return found


def _nvcc() -> Check:
    path = shutil.which("nvcc")
    return Check(
        "nvcc",
        "ok" if path else "warning",
        path or "not on PATH",
        "" if path else "only needed to compile the CUDA kernels yourself",
    )


def _tensorrt() -> list[Check]:
    found = []
    for name, packages, extra in (
        ("tensorrt", ("tensorrt",), "tensorrt"),
        ("tensorrt-rtx", ("tensorrt-rtx-cu13", "tensorrt-rtx-cu12", "tensorrt-rtx"), "tensorrt-rtx"),
    ):
        version = next((v for v in map(_version, packages) if v), None)
        fix = "" if version else f"pip install 'kimi-deploy[{extra}]'"
        found.append(Check(name, "ok" if version else "warning", version or "not installed", fix))
    if all(c.status == "ok" for c in found) or not any(c.status == "ok" for c in found):
        return found
    # one of the two is enough to build engines
    return [Check(c.name, "ok", c.seen, c.fix) for c in found]


def _disk(folder: Path) -> Check:
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free / 1e9
    return Check(
        "disk",
        "ok" if free > 5 else "warning",
        f"{free:.1f} GB free at {folder}",
        "" if free > 5 else "an export needs as much as the checkpoint",
    )


def _memory() -> Check:
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    return Check(
        "memory",
        "ok" if total > 4 else "warning",
        f"{total:.1f} GB, {os.cpu_count()} CPUs",
        "" if total > 4 else "small models only",
    )
