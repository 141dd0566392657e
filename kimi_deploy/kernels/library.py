"""Loading the kernel library, and calls that raise instead of returning codes."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any, Literal

from kimi_deploy.errors import BackendError, ContractError
from kimi_deploy.kernels.abi import ABI_VERSION, STATUS, KdaArguments, declare

Kind = Literal["cuda", "emulated"]

FILES: dict[Kind, str] = {"cuda": "libkimi_kernels.so", "emulated": "libkimi_kernels_emulated.so"}
FOLDERS: dict[Kind, str] = {"cuda": "kernels", "emulated": "kernels-emulated"}
TARGETS: dict[Kind, str] = {"cuda": "make kernels", "emulated": "make kernels-emulated"}


def default_path(kind: Kind) -> Path:
    """Where `make kernels` and `make kernels-emulated` put the library."""
    return Path(__file__).parents[2] / "build" / FOLDERS[kind] / FILES[kind]


class KernelLibrary:
    """A loaded library. `backend` is "cuda" (pointers lead to device memory) or "emulated" (to host memory)."""

    def __init__(self, path: Path, library: ctypes.CDLL) -> None:
        self.path, self._library = path, library
        self.backend: str = library.kimi_backend().decode()

    @classmethod
    def open(cls, path: str | Path | None = None, kind: Kind = "cuda") -> KernelLibrary:
        """Loads `path`, or the library of `kind` that the Makefile built.

        Raises BackendError when it is missing, cannot be loaded, or has another ABI.
        """
        where = Path(path) if path is not None else default_path(kind)
        if not where.is_file():
            raise BackendError("the kernel library is not there", seen=str(where), fix=f"build it: {TARGETS[kind]}")
        try:
            library = ctypes.CDLL(str(where.resolve()))
            declare(library)
        except (OSError, AttributeError) as error:
            raise BackendError("the kernel library cannot be loaded", seen=str(error), fix=TARGETS[kind]) from None
        version = library.kimi_abi_version()
        if version != ABI_VERSION:
            raise BackendError(
                f"the kernel library {where} has another ABI",
                seen=str(version),
                expected=str(ABI_VERSION),
                fix=f"rebuild it: {TARGETS[kind]}",
            )
        return cls(where, library)

    def decode(self, arguments: KdaArguments) -> None:
        """kimi_kda_decode. Raises ContractError for refused arguments, BackendError for a failed launch."""
        self._check("kda_decode", self._library.kimi_kda_decode(ctypes.byref(arguments)))

    def prefill_workspace(self, arguments: KdaArguments) -> int:
        """Bytes of workspace that `prefill` needs. Raises ContractError for refused sizes."""
        return self.workspace_size("kimi_kda_prefill_workspace", arguments)

    def prefill(self, arguments: KdaArguments) -> None:
        """kimi_kda_prefill. Raises ContractError for refused arguments, BackendError for a failed launch."""
        self._check("kda_prefill", self._library.kimi_kda_prefill(ctypes.byref(arguments)))

    def call(self, function: str, arguments: ctypes.Structure, *more: Any) -> None:
        """A function by name. Raises ContractError for refused arguments, BackendError for a failed launch."""
        self._check(function.removeprefix("kimi_"), getattr(self._library, function)(ctypes.byref(arguments), *more))

    def workspace_size(self, function: str, arguments: ctypes.Structure) -> int:
        """Bytes of workspace, by the function that tells them. Raises ContractError for refused sizes."""
        size = ctypes.c_size_t()
        self.call(function, arguments, ctypes.byref(size))
        return size.value

    def set_seed(self, seed: int) -> None:
        """Seed of the order of threads and blocks; the emulated library only (AttributeError otherwise)."""
        self._library.kimi_emulation_set_seed(ctypes.c_uint64(seed))

    def _check(self, name: str, code: int) -> None:
        if code == 0:
            return
        status = STATUS.get(code, str(code))
        message = self._library.kimi_last_error().decode()
        if status == "launch":
            raise BackendError(f"{name} could not run", seen=message)
        raise ContractError(f"{name} refused its arguments ({status})", seen=message)
