"""libkimi_ort.so: our ops as kernels of ONNX Runtime's CPU provider, in the place of their function bodies.

A session that has the library registered takes its kernels for the nodes of our domain and leaves the bodies of those
ops aside; an op that the library lacks is still run by its body.
"""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path

import onnx
import onnxruntime as ort
from google.protobuf.message import DecodeError

from kimi_deploy.contract import METADATA_KEY, GraphContract
from kimi_deploy.errors import BackendError
from kimi_deploy.manifest import sha256
from kimi_deploy.ops.registry import OPS
from kimi_deploy.ops.spec import DOMAIN
from kimi_deploy.runtime.base import Kernels
from kimi_deploy.runtime.ort_tokenwise import ABI as TOKENWISE_ABI
from kimi_deploy.runtime.ort_tokenwise import NAME as TOKENWISE
from kimi_deploy.runtime.ort_tokenwise import fuse

FILE = "libkimi_ort.so"
MAKE = "make cpu-kernels in the root of a clone of kimi-deploy"


def default_path() -> Path:
    """Where `make cpu-kernels` puts the library."""
    return Path(__file__).parents[2] / "build" / "cpu" / FILE


class OrtKernels:
    """A loaded library. `sha256` is that of its file, `abis` the ABI hash by op."""

    def __init__(self, path: Path, library: ctypes.CDLL) -> None:
        self.path, self.sha256 = path, sha256(path)
        self.abis = {
            library.kimi_ort_name(i).decode(): library.kimi_ort_abi(i).decode() for i in range(library.kimi_ort_count())
        }
        self._library = library

    @classmethod
    def open(cls, path: str | Path | None = None) -> OrtKernels:
        """Load `path`, or the library that `make cpu-kernels` built; loading it twice is loading it once.

        Raises BackendError when it is missing, is no such library, or was built for another ABI of an op than this
        package has.
        """
        return _open(Path(default_path() if path is None else path).resolve())

    @classmethod
    def find(cls, wanted: str | Path) -> OrtKernels | None:
        """The library that `wanted` names: "auto" is the built one, if there is one, "none" is none, else a path.

        Raises as `open` does.
        """
        if wanted == "none" or (wanted == "auto" and not default_path().is_file()):
            return None
        return cls.open(None if wanted == "auto" else wanted)

    @property
    def instruction_set(self) -> str:
        """What its kernels use: the best of this machine, or what was chosen."""
        return str(self._library.kimi_ort_instruction_set().decode())

    def choose(self, instruction_set: str) -> bool:
        """Use a lesser instruction set in this process from now on; False if this machine does not have that one."""
        return bool(self._library.kimi_ort_choose_instruction_set(instruction_set.encode()))

    def covers(self, graph: bytes) -> Kernels | None:
        """Its kernels for the ops of a serialised model: those of the library, in a float32 graph; None for no op.

        Tokenwise, which no model has, is among them where it takes the place of other nodes.
        """
        try:
            model = onnx.load_from_string(graph)
        except DecodeError:
            # ONNX Runtime refuses it too, and says what is wrong
            return None
        metadata = {p.key: p.value for p in model.metadata_props}
        if METADATA_KEY not in metadata or GraphContract.from_json(metadata[METADATA_KEY]).dtype != "float32":
            return None
        if TOKENWISE in self.abis:
            fuse(model)
        used = {node.op_type for node in model.graph.node if node.domain == DOMAIN}
        ops = tuple(sorted(used & self.abis.keys()))
        return Kernels(ops, self.sha256, self.instruction_set) if ops else None

    def register(self, options: ort.SessionOptions) -> None:
        """Let the sessions that are made with `options` have the kernels.

        Raises BackendError when this ONNX Runtime does not take the library.
        """
        try:
            options.register_custom_ops_library(str(self.path))
        except Exception as error:
            raise BackendError(
                f"ONNX Runtime {ort.__version__} does not take the library of CPU kernels",
                seen=str(error).splitlines()[0][:400],
                fix=f"build it again: {MAKE}, or run without it: --kernels none",
            ) from error


@cache
def _open(path: Path) -> OrtKernels:
    if not path.is_file():
        raise BackendError(
            "the library of CPU kernels is not there",
            seen=f"{path}: a folder" if path.is_dir() else str(path),
            expected=f"auto, none, or the path of a {FILE}",
            fix=f"build it: {MAKE}",
        )
    try:
        library = ctypes.CDLL(str(path))
        library.kimi_ort_count.restype = ctypes.c_int32
        for name in ("name", "abi", "instruction_set"):
            getattr(library, f"kimi_ort_{name}").restype = ctypes.c_char_p
        opened = OrtKernels(path, library)
    except (OSError, AttributeError) as error:
        raise BackendError("the library of CPU kernels cannot be loaded", seen=str(error), fix=MAKE) from None
    for name, abi in opened.abis.items():
        wanted = TOKENWISE_ABI if name == TOKENWISE else OPS[name].abi if name in OPS else None
        if abi != wanted:
            raise BackendError(
                f"the library of CPU kernels {path} was built for another ABI of {name} than this package has",
                seen=f"library: {abi}",
                expected=f"package: {wanted}",
                fix=f"build it again: {MAKE}, or run without it: --kernels none",
            )
    return opened
