"""Float dtypes of checkpoints, and casting between them in blocks so that a cast needs no second tensor."""

from __future__ import annotations

from collections.abc import Iterator

import ml_dtypes
import numpy as np

from kimi_deploy.errors import CheckpointError

# name in a safetensors header -> numpy dtype
FLOAT_DTYPES: dict[str, np.dtype] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
}
# name in this package (`contract.Dtype`) -> name in a safetensors header
SAFETENSORS_NAMES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}

BLOCK_ELEMENTS = 1 << 22
_CACHED = 1 << 17


def row_blocks(array: np.ndarray) -> Iterator[tuple[slice, ...]]:
    """Index tuples that cut `array` along its leading axes into blocks of at most about 4 million elements."""
    if array.size <= BLOCK_ELEMENTS or array.ndim == 0:
        yield (slice(None),) * array.ndim
        return
    per_row = array.size // array.shape[0]
    rows = max(1, BLOCK_ELEMENTS // per_row)
    for start in range(0, array.shape[0], rows):
        yield (slice(start, start + rows),)


# of the dtypes whose bits numpy compares faster than it tests them: (integer type, exponent bits)
_EXPONENTS = {
    "bfloat16": (np.uint16, np.uint16(0x7F80)),
    "float16": (np.uint16, np.uint16(0x7C00)),
    "float32": (np.uint32, np.uint32(0x7F800000)),
}


def all_finite(array: np.ndarray) -> bool:
    """Whether no element is NaN or Inf."""
    if array.dtype.name not in _EXPONENTS or not array.flags.c_contiguous:
        return bool(np.isfinite(array).all())
    integer, exponent = _EXPONENTS[array.dtype.name]
    bits = array.reshape(-1).view(integer)
    # blocks that stay in a cache between the two operations
    blocks = (bits[i : i + _CACHED] & exponent for i in range(0, bits.size, _CACHED))
    return not any((block == exponent).any() for block in blocks)


def cast_block(source: np.ndarray, dtype: np.dtype, name: str) -> np.ndarray:
    """`source` as `dtype`, itself where that is its dtype; through float32 otherwise.

    Every value must be finite before and after. Raises CheckpointError naming the tensor `name` otherwise.
    """
    if not all_finite(source):
        raise CheckpointError(
            f"{name} holds NaN or Inf",
            seen=f"{int((~np.isfinite(source)).sum())} values that are not finite in one block of rows",
            expected="finite weights",
            fix="download or save the checkpoint again",
        )
    if source.dtype == dtype:
        return source
    # too large values become Inf here and are reported below, with the tensor's name
    with np.errstate(over="ignore"):
        result = source.astype(np.float32).astype(dtype, copy=False)
    if not all_finite(result):
        raise CheckpointError(
            f"{name} does not fit into {dtype.name}",
            seen=f"values up to {float(np.abs(source.astype(np.float64)).max()):g}",
            expected=f"at most {float(ml_dtypes.finfo(dtype).max):g}",
            fix="use bfloat16 or float32",
        )
    return result


def cast_blocks(value: np.ndarray, dtype: np.dtype, name: str) -> Iterator[tuple[tuple[slice, ...], np.ndarray]]:
    """`value` block by block as `dtype`, with each block's index; raises as `cast_block`."""
    for block in row_blocks(value):
        yield block, cast_block(value[block], dtype, name)
