"""A tensor in a runner's memory for any library that speaks DLPack (PyTorch, CuPy, JAX, NumPy), without a copy.

Layout of the structures: dlpack.h of DLPack 0.8, the version whose capsule is named "dltensor".
"""

from __future__ import annotations

import ctypes
from typing import Any

# type code (0 integer, 2 float, 4 bfloat) and bits of each dtype of a contract
_TYPES = {"float32": (2, 32), "float16": (2, 16), "bfloat16": (4, 16), "int64": (0, 64), "int32": (0, 32)}
_NAME = b"dltensor"


class _Device(ctypes.Structure):
    _fields_ = (("type", ctypes.c_int32), ("id", ctypes.c_int32))


class _DataType(ctypes.Structure):
    _fields_ = (("code", ctypes.c_uint8), ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16))


class _Tensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device", _Device),
        ("ndim", ctypes.c_int32),
        ("dtype", _DataType),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


class _Managed(ctypes.Structure):
    pass


_DELETER = ctypes.CFUNCTYPE(None, ctypes.POINTER(_Managed))
_Managed._fields_ = (("tensor", _Tensor), ("context", ctypes.c_void_p), ("deleter", _DELETER))

# what a consumer has not given back: keeps the structure, its arrays and the memory alive
_lent: dict[int, tuple[_Managed, Any]] = {}


@_DELETER
def _give_back(managed: Any) -> None:
    _lent.pop(ctypes.addressof(managed.contents), None)


@ctypes.PYFUNCTYPE(None, ctypes.c_void_p)
def _destroy_capsule(capsule: int) -> None:
    """Gives back a tensor whose capsule nobody took; a taken one is renamed by its taker."""
    if ctypes.pythonapi.PyCapsule_IsValid(ctypes.c_void_p(capsule), _NAME):
        get = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_char_p)
        _lent.pop(get(("PyCapsule_GetPointer", ctypes.pythonapi))(capsule, _NAME), None)


class DeviceTensor:
    """A contiguous tensor at `address`; `owner` keeps its memory alive.

    `torch.from_dlpack(tensor)` is a view: it changes with the state's next steps, and a state with two buffers moves to
    the other one at every step, so that a view is of the step it was asked for.
    """

    def __init__(
        self, owner: object, address: int, shape: tuple[int, ...], dtype: str, device: tuple[int, int]
    ) -> None:
        self.owner, self.address, self.shape, self.dtype = owner, address, shape, dtype
        self._device = device

    def __dlpack_device__(self) -> tuple[int, int]:
        return self._device

    def __dlpack__(self, *, stream: int | None = None, **_: Any) -> Any:
        """The capsule. The runner has waited for its stream by the end of every step, so that any stream may read."""
        managed = _Managed()
        dims = (ctypes.c_int64 * len(self.shape))(*self.shape)
        managed.tensor.data = self.address
        managed.tensor.device = _Device(*self._device)
        managed.tensor.ndim = len(self.shape)
        managed.tensor.dtype = _DataType(*_TYPES[self.dtype], 1)
        managed.tensor.shape = dims
        managed.deleter = _give_back
        address = ctypes.addressof(managed)
        _lent[address] = (managed, (dims, self))
        make = ctypes.PYFUNCTYPE(ctypes.py_object, ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)
        destructor = ctypes.cast(_destroy_capsule, ctypes.c_void_p)
        return make(("PyCapsule_New", ctypes.pythonapi))(address, _NAME, destructor)
