"""What this machine has and what that allows: each check gives ok, warning or problem, and the fix."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from kimi_deploy.doctor import cuda, machine, packages, tensorrt
from kimi_deploy.doctor.check import Check

__all__ = ["Check", "run_checks"]


def run_checks(folder: Path) -> list[Check]:
    """Every check; `folder` is where artefacts would be written. A check that fails to run is itself a problem."""
    checks: dict[str, Callable[[], list[Check]]] = {
        "python": machine.python,
        "packages": packages.packages,
        "torch": packages.torch,
        "onnxruntime": packages.onnxruntime,
        "cuda driver": cuda.driver,
        "gpu": cuda.gpus,
        "cuda toolkit": cuda.toolkit,
        "cuda-python": cuda.cuda_python,
        "tensorrt": tensorrt.flavours,
        "libraries": tensorrt.libraries,
        "disk": lambda: machine.disk(folder),
        "memory": machine.memory,
    }
    results: list[Check] = []
    for name, check in checks.items():
        try:
            results += check()
        except Exception as error:  # a broken installation must not hide the other findings
            seen = f"{type(error).__name__}: {error}"
            results.append(Check(name, "problem", seen[:500], "reinstall what it names"))
    return results
