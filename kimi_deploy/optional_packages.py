"""Packages that only some commands need: which are missing, and the command that installs each."""

from __future__ import annotations

from importlib.util import find_spec

from kimi_deploy.errors import BackendError, install_line

INSTALL = {
    "torch": install_line("torch"),
    "tensorrt_rtx": install_line("tensorrt-rtx", "setuptools wheel && pip install --no-build-isolation"),
    "tensorrt": install_line("tensorrt"),
    "polygraphy": "pip install polygraphy",
    "matplotlib": install_line("plot"),
    "triton": install_line("triton"),
    # no part of this package uses it but the comparison, which names the version that the tests have
    "transformers": "pip install transformers==5.23.0",
    "llama_cpp": "pip install llama-cpp-python",
}
"""By the module that is imported."""


def missing_packages(*modules: str) -> BackendError:
    """The error that says how to install `modules`, keys of `INSTALL`."""
    names = " and ".join(modules)
    return BackendError(
        f"this needs {names}, which {'is' if len(modules) == 1 else 'are'} not installed",
        fix="; ".join(INSTALL[module] for module in modules),
    )


def require_packages(*modules: str) -> None:
    """Raise BackendError when one of `modules`, keys of `INSTALL`, is not installed; nothing is imported."""
    missing = [module for module in modules if find_spec(module) is None]
    if missing:
        raise missing_packages(*missing)
