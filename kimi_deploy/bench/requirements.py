"""What the runtimes of a `bench` need, asked before the first of them runs."""

from __future__ import annotations

import importlib.util
from collections.abc import Collection
from pathlib import Path

from kimi_deploy.errors import BackendError, UsageError, install_line
from kimi_deploy.runtime.ort_kernels import MAKE, OrtKernels
from kimi_deploy.runtime.ort_runner import MODEL_NAME

ORT = ("ort", "ort-bodies")
_PACKAGES = {
    "torch": ("torch", install_line("torch")),
    "transformers": ("transformers", "pip install 'transformers>=5.23'"),
    "llama.cpp": ("llama_cpp", "pip install llama-cpp-python"),
}


def check_packages(backends: Collection[str]) -> None:
    """Raise BackendError for a runtime whose package is not installed, or is too old for Kimi Linear."""
    for backend in backends:
        package, fix = _PACKAGES.get(backend, ("", ""))
        if not package:
            continue
        found = importlib.util.find_spec(package)
        if found is None or found.origin is None:
            raise BackendError(
                f"--backend {backend} cannot be measured", seen=f"the package {package} is not installed", fix=fix
            )
        if backend == "transformers" and not (Path(found.origin).parent / "models" / "kimi_linear").is_dir():
            raise BackendError(
                "--backend transformers cannot be measured", seen="this transformers has no Kimi Linear", fix=fix
            )


def resolve_kernels(kernels: str, backends: Collection[str], export: Path) -> str:
    """What --kernels names for `export`, as the path of a library or "none", so that every process takes the same.

    Raises UsageError where no backend would take a library that was named, or where ort and ort-bodies would be the
    same, and as OrtKernels.find.
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
    return "none" if library is None else str(library.path)
