"""What a kernel call asks of an array, be it a torch tensor or a numpy array."""

from __future__ import annotations

import ctypes
from typing import Any

from kimi_deploy.errors import ContractError


def place(arguments: ctypes.Structure, name: str, array: Any, dtype: str, shape: tuple[int, ...]) -> None:
    """Puts the array's address into the field `name`. Raises ContractError unless dtype, shape and layout fit."""
    if tuple(array.shape) != shape or dtype_name(array) != dtype or not _is_contiguous(array):
        raise ContractError(
            f"kernel call: {name} does not fit",
            seen=f"{dtype_name(array)} {tuple(array.shape)}" + ("" if _is_contiguous(array) else ", not contiguous"),
            expected=f"{dtype} {shape}, contiguous",
        )
    setattr(arguments, name, address(array))


def dtype_name(array: Any) -> str:
    """As in `abi.DATA_TYPES`."""
    return str(array.dtype).removeprefix("torch.")


def address(array: Any) -> int | None:
    """Of the first element; None where there is none."""
    if num_bytes(array) == 0:
        return None
    return array.data_ptr() if _is_torch(array) else array.ctypes.data


def num_bytes(array: Any) -> int:
    return array.numel() * array.element_size() if _is_torch(array) else array.nbytes


def bytes_like(array: Any, size: int) -> Any:
    """A new uint8 array of `size` bytes where `array` is."""
    if _is_torch(array):
        import torch

        return torch.empty(size, dtype=torch.uint8, device=array.device)
    import numpy as np

    return np.empty(size, dtype=np.uint8)


def _is_torch(array: Any) -> bool:
    return hasattr(array, "data_ptr")


def _is_contiguous(array: Any) -> bool:
    return array.is_contiguous() if _is_torch(array) else array.flags["C_CONTIGUOUS"]
