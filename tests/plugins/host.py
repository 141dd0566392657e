"""The plugin host (`plugins/tests/plugin_host.h`) from Python: plugins driven as TensorRT drives them."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from kimi_deploy.ops.spec import AttributeValue

# nvinfer1::DataType and PluginFieldType
TYPES = {"float32": 0, "float16": 1, "int8": 2, "int32": 3, "bfloat16": 7, "int64": 8}
FIELD_TYPES = {"float": 1, "int": 5, "string": 6}
LINEAR, HWC8 = 0, 2
MAX_DIMS = 8


class HostTensor(ctypes.Structure):
    _fields_ = (
        ("type", ctypes.c_int32),
        ("format", ctypes.c_int32),
        ("rank", ctypes.c_int32),
        ("reserved", ctypes.c_int32),
        ("dims", ctypes.c_int64 * MAX_DIMS),
        ("min", ctypes.c_int64 * MAX_DIMS),
        ("opt", ctypes.c_int64 * MAX_DIMS),
        ("max", ctypes.c_int64 * MAX_DIMS),
    )


class HostField(ctypes.Structure):
    _fields_ = (
        ("name", ctypes.c_char_p),
        ("data", ctypes.c_void_p),
        ("type", ctypes.c_int32),
        ("length", ctypes.c_int32),
    )


@dataclass(frozen=True)
class Tensor:
    """What TensorRT says of a tensor: shape, dtype, and the profile's smallest and largest shape."""

    shape: tuple[int, ...]
    dtype: str
    smallest: tuple[int, ...] | None = None
    largest: tuple[int, ...] | None = None
    format: int = LINEAR

    @classmethod
    def of(cls, array: np.ndarray) -> Tensor:
        return cls(array.shape, str(array.dtype))

    def c(self) -> HostTensor:
        tensor = HostTensor(type=TYPES[self.dtype], format=self.format, rank=len(self.shape))
        for name, shape in (
            ("dims", self.shape),
            ("min", self.smallest or self.shape),
            ("opt", self.shape),
            ("max", self.largest or self.shape),
        ):
            getattr(tensor, name)[: len(shape)] = shape
        return tensor


Fields = Sequence[tuple[str, AttributeValue | bytes]]


def _c_fields(fields: Fields) -> Any:
    """A HostField array that owns what it points at; the type of a field is the type of its value."""
    result = (HostField * len(fields))()
    keep: list[Any] = []
    for item, (name, value) in zip(result, fields, strict=True):
        data: Any
        if isinstance(value, str | bytes):
            raw = value if isinstance(value, bytes) else value.encode()
            data, kind, length = ctypes.create_string_buffer(raw, len(raw) + 1), "string", len(raw)
        elif isinstance(value, float):
            data, kind, length = ctypes.c_float(value), "float", 1
        else:
            data, kind, length = ctypes.c_int32(value), "int", 1
        item.name, item.data = name.encode(), ctypes.addressof(data)
        item.type, item.length = FIELD_TYPES[kind], length
        keep.append(data)
    result.keep = keep
    return result


def _values(fields: Any, count: int) -> dict[str, tuple[int, bytes]]:
    """Type and bytes of each field."""
    sizes = {FIELD_TYPES["float"]: 4, FIELD_TYPES["int"]: 4, FIELD_TYPES["string"]: 1}
    return {
        f.name.decode(): (f.type, ctypes.string_at(f.data, f.length * sizes[f.type]) if f.data else b"")
        for f in fields[:count]
    }


class Host:
    """A plugin library, and the host that drives it."""

    def __init__(self, host: Path, library: Path) -> None:
        self._c = ctypes.CDLL(str(host))
        pointer, text = ctypes.c_void_p, ctypes.c_char_p
        for name, result in (
            ("open", pointer),
            ("messages", text),
            ("creator", pointer),
            ("creator_version", text),
            ("creator_namespace", text),
            ("create", pointer),
            ("clone", pointer),
            ("attach", pointer),
            ("identity", text),
            ("workspace", ctypes.c_size_t),
        ):
            getattr(self._c, f"host_{name}").restype = result
        self._library = self._c.host_open(str(library).encode())
        assert self._library, self.messages()

    def close(self) -> None:
        self._c.host_close(ctypes.c_void_p(self._library))

    def messages(self) -> str:
        """What was logged since the last call."""
        return self._c.host_messages().decode()

    def call(self, name: str, *arguments: Any) -> Any:
        return getattr(self._c, f"host_{name}")(*arguments)

    def creator(self, name: str) -> ctypes.c_void_p:
        found = self._c.host_creator(ctypes.c_void_p(self._library), name.encode())
        assert found, f"no creator {name}"
        return ctypes.c_void_p(found)

    def creator_identity(self, name: str) -> tuple[str, str]:
        """Version and namespace."""
        creator = self.creator(name)
        return self.call("creator_version", creator).decode(), self.call("creator_namespace", creator).decode()

    def field_names(self, name: str) -> dict[str, int]:
        """The declared fields and their types."""
        fields = (HostField * 16)()
        count = self.call("creator_fields", self.creator(name), fields, 16)
        return {f.name.decode(): f.type for f in fields[:count]}

    @contextmanager
    def plugin(self, name: str, fields: Fields, *, phase: int = 0) -> Iterator[Plugin | None]:
        """A plugin made from fields; None where it was refused. Destroyed at the end."""
        given = _c_fields(fields)
        made = self.call("create", self.creator(name), b"node 7", given, len(given), phase)
        with Plugin.owned(self, made) as plugin:
            yield plugin

    @contextmanager
    def plugin_from(self, name: str, serialized: Mapping[str, tuple[int, bytes]]) -> Iterator[Plugin | None]:
        """A plugin made from what another one serialised, as when a plan is read."""
        fields = (HostField * len(serialized))()
        keep = []
        for item, (key, (kind, raw)) in zip(fields, serialized.items(), strict=True):
            keep.append(ctypes.create_string_buffer(raw, len(raw) + 1))
            item.name, item.data, item.type = key.encode(), ctypes.addressof(keep[-1]), kind
            item.length = len(raw) if kind == FIELD_TYPES["string"] else len(raw) // 4
        made = self.call("create", self.creator(name), b"node 7", fields, len(fields), 1)
        with Plugin.owned(self, made) as plugin:
            yield plugin


class Plugin:
    """A plugin's virtual functions."""

    def __init__(self, host: Host, address: int) -> None:
        self.host, self._address = host, ctypes.c_void_p(address)

    @classmethod
    @contextmanager
    def owned(cls, host: Host, address: int | None) -> Iterator[Any]:
        plugin = cls(host, address) if address else None
        try:
            yield plugin
        finally:
            if plugin is not None:
                plugin._call("destroy")

    def _call(self, name: str, *arguments: Any) -> Any:
        return self.host.call(name, self._address, *arguments)

    def clone(self) -> Any:
        return Plugin.owned(self.host, self._call("clone"))

    def attach(self) -> Any:
        return Plugin.owned(self.host, self._call("attach"))

    @property
    def identity(self) -> str:
        return self._call("identity").decode()

    def output_types(self, inputs: Sequence[str]) -> list[str]:
        made = (ctypes.c_int32 * self._call("num_outputs"))()
        given = (ctypes.c_int32 * len(inputs))(*(TYPES[t] for t in inputs))
        assert self._call("output_types", given, len(inputs), made) == 0, self.host.messages()
        names = {v: k for k, v in TYPES.items()}
        return [names[t] for t in made]

    def output_shapes(self, inputs: Sequence[Tensor]) -> list[tuple[int, ...]]:
        made = (HostTensor * self._call("num_outputs"))()
        assert self._call("output_shapes", _array(inputs), len(inputs), made) == 0, self.host.messages()
        return [tuple(t.dims[: t.rank]) for t in made]

    def supports(self, position: int, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> bool:
        return self._call("supports", position, _array([*inputs, *outputs]), len(inputs), len(outputs)) == 1

    def configure(self, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> bool:
        return self._call("configure", _array(inputs), len(inputs), _array(outputs), len(outputs)) == 0

    def workspace(self, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> int:
        return self._call("workspace", _array(inputs), len(inputs), _array(outputs), len(outputs))

    def aliased_input(self, output: int) -> int:
        return self._call("aliased_input", output)

    def serialize(self) -> dict[str, tuple[int, bytes]]:
        """Type and bytes of every field, in order."""
        fields = (HostField * 16)()
        count = self._call("serialize", fields, 16)
        assert count >= 0, self.host.messages()
        return _values(fields, count)

    def shape_change(self, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> bool:
        return self._call("shape_change", _array(inputs), len(inputs), _array(outputs), len(outputs)) == 0

    def enqueue(
        self,
        inputs: Sequence[Tensor],
        outputs: Sequence[Tensor],
        input_memory: Sequence[int],
        output_memory: Sequence[int],
        workspace: int,
        stream: int = 0,
    ) -> bool:
        read = (ctypes.c_void_p * len(input_memory))(*input_memory)
        written = (ctypes.c_void_p * len(output_memory))(*output_memory)
        pointers = (read, written, ctypes.c_void_p(workspace), ctypes.c_void_p(stream))
        arrays = (_array(inputs), len(inputs), _array(outputs), len(outputs))
        return self._call("enqueue", *arrays, *pointers) == 0


def _array(tensors: Sequence[Tensor]) -> Any:
    return (HostTensor * len(tensors))(*(t.c() for t in tensors))


def numpy_dtype(name: str) -> np.dtype:
    return np.dtype(ml_dtypes.bfloat16) if name == "bfloat16" else np.dtype(name)
