"""What the runtimes of a `bench` need, asked before the first of them runs."""

from __future__ import annotations

import importlib.util
from collections.abc import Collection
from pathlib import Path

from kimi_deploy.errors import BackendError, UsageError
from kimi_deploy.optional_packages import INSTALL, require_packages
from kimi_deploy.runtime.ort_kernels import MAKE, OrtKernels
from kimi_deploy.runtime.ort_runner import MODEL_NAME

ORT = ("ort", "ort-bodies")
_PACKAGES = {"torch": ("torch",), "transformers": ("torch", "transformers"), "llama.cpp": ("llama_cpp",)}


def check_packages(backends: Collection[str]) -> None:
    """Raise BackendError when a package is not installed, or is a transformers from before Kimi Linear."""
    require_packages(*dict.fromkeys(module for name in backends for module in _PACKAGES.get(name, ())))
    if "transformers" in backends:
        found = importlib.util.find_spec("transformers")
        assert found is not None
        assert found.origin is not None
        if not (Path(found.origin).parent / "models" / "kimi_linear").is_dir():
            raise BackendError("this transformers has no Kimi Linear", seen=found.origin, fix=INSTALL["transformers"])


def resolve_kernels(kernels: str, backends: Collection[str], export: Path) -> str:
    """What --kernels names for `export`, as the path of a library or "none", so that every process takes the same.

    Raises UsageError where no backend would take a library that was named, where that has no kernel for `export`, or
    where ort and ort-bodies would be the same, and as OrtKernels.find.
    """
    if not set(backends) & set(ORT):
        if kernels not in ("auto", "none"):
            raise UsageError(
                "kernels of a library run on ONNX Runtime alone",
                seen=f"--kernels {kernels}, --backend {', '.join(backends)}",
                fix="add --backend ort, or leave --kernels out",
            )
        return "none"
    library = OrtKernels.find(kernels)
    taken = None if library is None else library.covers((export / MODEL_NAME).read_bytes())
    if taken is None and set(ORT) <= set(backends):
        raise UsageError(
            "ort and ort-bodies are the same here",
            seen="no library of kernels" if library is None else f"{library.path} has no kernel for {export}",
            fix=f"leave one of them out, or build the library: {MAKE}",
        )
    if taken is None and kernels not in ("auto", "none"):
        raise UsageError(
            "the library has no kernel for this export",
            seen=f"--kernels {kernels}; {export}",
            expected="a float32 export, also one with quantised weights, with ops of the library",
            fix="leave --kernels out",
        )
    return "none" if library is None else str(library.path)
