"""libkimi_plugins.so from Python: loaded into the process, registered with TensorRT, its ABI compared."""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path

from kimi_deploy.errors import BackendError, EngineError
from kimi_deploy.kernels.library import FOLDERS, Kind
from kimi_deploy.ops.plugins import PLUGINS

FILES: dict[Kind, str] = {"cuda": "libkimi_plugins.so", "emulated": "libkimi_plugins_emulated.so"}


def default_path(kind: Kind = "cuda") -> Path:
    """Where `make plugins` puts the library, beside the kernels."""
    return Path(__file__).parents[2] / "build" / FOLDERS[kind] / FILES[kind]


class PluginLibrary:
    """A loaded plugin library. Its plugins stay registered for the life of the process."""

    def __init__(self, path: Path, library: ctypes.CDLL) -> None:
        self.path, self._library = path, library

    @classmethod
    def open(cls, path: str | Path | None = None) -> PluginLibrary:
        """Load `path`, or the library that `make plugins` built; loading it twice is loading it once.

        Raises BackendError when it is missing or is no plugin library, EngineError when it was built for another ABI of
        an op than this package has.
        """
        return _open(Path(default_path() if path is None else path).resolve())

    @property
    def abis(self) -> dict[str, str]:
        """ABI hash by op; empty for ONNX's own operators."""
        names = [self._text("name", i) for i in range(self._library.kimi_plugins_count())]
        return {name: self._text("abi", i) for i, name in enumerate(names)}

    def register(self) -> None:
        """Register the plugins with every TensorRT that this process has loaded; calling it again changes nothing.

        Raises EngineError when a TensorRT has other plugins of these names, or is too old.
        """
        done = self._library.kimi_plugins_register()
        error = self._library.kimi_plugins_error().decode()
        if done < 1 or error:
            raise EngineError(
                "the plugins of the library cannot be registered",
                seen=error or "no TensorRT in this process",
                fix="load the library after TensorRT, into a process that has not registered other plugins of these "
                "names, such as this package's Python ones",
            )

    def _text(self, what: str, index: int) -> str:
        return getattr(self._library, f"kimi_plugins_{what}")(index).decode()


@cache
def _open(path: Path) -> PluginLibrary:
    if not path.is_file():
        raise BackendError("the plugin library is not there", seen=str(path), fix="build it: make plugins")
    try:
        library = ctypes.CDLL(str(path))
        for name, result in (
            ("register", ctypes.c_int32),
            ("count", ctypes.c_int32),
            ("error", ctypes.c_char_p),
            ("name", ctypes.c_char_p),
            ("abi", ctypes.c_char_p),
        ):
            getattr(library, f"kimi_plugins_{name}").restype = result
    except (OSError, AttributeError) as error:
        raise BackendError("the plugin library cannot be loaded", seen=str(error), fix="make plugins") from None
    opened = PluginLibrary(path, library)
    for name, abi in opened.abis.items():
        wanted = PLUGINS[name].abi if name in PLUGINS else None
        if abi != (wanted or ""):
            raise EngineError(
                f"the plugin library {path} was built for another ABI of {name} than this package has",
                seen=f"library: {abi}",
                expected=f"package: {wanted}",
                fix="build it again: make plugins",
            )
    return opened
