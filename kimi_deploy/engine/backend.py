"""Which TensorRT builds and runs an engine: the full one or TensorRT-RTX, behind one object."""

from __future__ import annotations

import importlib
import importlib.util
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import Any, Literal, get_args

from kimi_deploy.cuda_driver import gpu_devices
from kimi_deploy.engine.soname_stub import serve_name
from kimi_deploy.errors import BackendError, install_line
from kimi_deploy.optional_packages import INSTALL

TensorRT = Literal["tensorrt", "tensorrt-rtx"]
BackendChoice = Literal["auto", "tensorrt", "tensorrt-rtx"]
BACKEND_CHOICES: tuple[BackendChoice, ...] = get_args(BackendChoice)

MODULES: dict[TensorRT, str] = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}
"""Python module of each TensorRT."""


@dataclass(frozen=True)
class Backend:
    """A loaded TensorRT: its Python module, name, version, and the one logger of this process.

    TensorRT keeps the first logger it is given for all of its objects, so that there is one per module, made here.
    """

    name: TensorRT
    module: ModuleType
    version: str
    logger: Any

    @property
    def registry(self) -> Any:
        """The process-wide plugin registry."""
        return self.module.get_plugin_registry()

    @property
    def offered_capabilities(self) -> tuple[str, ...]:
        """Compute capabilities TensorRT-RTX builds for and runs on; empty for the full TensorRT, which runs on any."""
        if self.name == "tensorrt":
            return ()
        names = self.module.ComputeCapability.__members__
        return tuple(f"{n[2:-1]}.{n[-1]}" for n in names if n.startswith("SM"))


def installed(name: TensorRT) -> bool:
    """Whether the Python package is there, without importing it."""
    return importlib.util.find_spec(MODULES[name]) is not None


def choose(choice: BackendChoice) -> TensorRT:
    """The TensorRT that `choice` means on this machine.

    auto takes the full TensorRT where it is installed and a GPU is present, since it cannot build without one, and
    TensorRT-RTX otherwise. Raises BackendError, with the line that installs it, when there is none.
    """
    candidates: tuple[TensorRT, ...] = ("tensorrt", "tensorrt-rtx") if choice == "auto" else (choice,)
    found = [name for name in candidates if installed(name)]
    gpus = gpu_devices()
    if choice == "auto" and not gpus:
        found = [name for name in found if name != "tensorrt"]
    if found:
        return found[0]
    wanted = "tensorrt-rtx" if choice == "auto" else choice
    raise BackendError(
        "no TensorRT can be used here" if choice == "auto" else f"{choice} is not installed",
        seen=f"GPUs: {len(gpus)}; installed: {[n for n in MODULES if installed(n)] or 'neither'}",
        expected="tensorrt with a GPU, or tensorrt-rtx" if choice == "auto" else f"Python module {MODULES[choice]}",
        fix=INSTALL[MODULES[wanted]],
    )


@cache
def load(name: TensorRT) -> Backend:
    """Import a TensorRT and prepare it for parsing graphs with plugins.

    Raises BackendError when it is missing or its libraries cannot be loaded.
    """
    choose(name)
    try:
        module = importlib.import_module(MODULES[name])
        if name == "tensorrt-rtx":
            serve_name("libtensorrt_rtx.so", "libtensorrt_rtx.so.1")
    except (ImportError, OSError) as error:
        raise BackendError(
            f"{name} is installed but does not load",
            seen=str(error),
            fix=install_line(name, "--force-reinstall --no-build-isolation"),
        ) from error
    from kimi_deploy.engine.logger import make_logger

    return Backend(name, module, module.__version__, make_logger(module))
