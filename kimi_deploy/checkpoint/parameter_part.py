"""A part of one parameter: which bytes of the checkpoint make it, and reading them."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from kimi_deploy.checkpoint.cast import FLOAT_DTYPES, SAFETENSORS_NAMES, cast_block, row_blocks
from kimi_deploy.checkpoint.safetensors_file import TensorInfo
from kimi_deploy.contract import Dtype
from kimi_deploy.errors import CheckpointError
from kimi_deploy.page_cache import will_need
from kimi_deploy.weights import Form, Weight, stored_views

READ_AHEAD_BYTES = 128 << 20
"""How far ahead of what is being read the operating system is told to read: parts are loaded in the files' order."""


@dataclass(frozen=True)
class Span:
    """Bytes of the stored tensor `tensor`: `nbytes` from `offset` of its file."""

    tensor: TensorInfo
    offset: int
    nbytes: int


@dataclass(frozen=True)
class ParameterPart:
    """Consecutive rows (axis 0) of a parameter, the first of them row `start` of the whole.

    `weight` is the part described as a parameter of its own: its name is the parameter's, its shape the part's.
    `spans` are the stored bytes it is made of, in the order of the layout. Made by `Checkpoint.part`.
    """

    folder: Path
    weight: Weight
    form: Form
    start: int
    spans: tuple[Span, ...]

    def stored_dtype(self, dtype: Dtype) -> np.dtype:
        """The numpy dtype it has in a model of `dtype`: parameters of the float32 class stay float32."""
        return FLOAT_DTYPES[SAFETENSORS_NAMES["float32" if self.weight.dtype == "float32" else dtype]]

    def load(self, dtype: Dtype) -> np.ndarray:
        """The rows as a new array [rows, ...] of `stored_dtype(dtype)`, cast through float32; bfloat16 is ml_dtypes'.

        Read block by block without a memory map: what stays in memory is the array itself and one block.
        Raises CheckpointError naming the tensor for NaN or Inf, values too large for `dtype` and a file that has
        become shorter.
        """
        out = np.empty(self.weight.shape, self.stored_dtype(dtype))
        for view, span in zip(stored_views(self.weight, self.form, out), self.spans, strict=True):
            self._read(span, view)
        return out

    def _read(self, span: Span, view: np.ndarray) -> None:
        """Fill `view`, whose elements are the span's in their order."""
        stored = FLOAT_DTYPES[span.tensor.dtype]
        offset = span.offset
        with (self.folder / span.tensor.file).open("rb", buffering=0) as file:
            # by itself it reads a few hundred kilobytes ahead, and nothing while a part is worked on
            will_need(file.fileno(), span.offset + READ_AHEAD_BYTES, span.nbytes)
            for index in row_blocks(view):
                target = view[index]
                direct = target.dtype == stored and target.flags.c_contiguous
                block = target if direct else np.empty(target.shape, stored)
                _read_exactly(file.fileno(), block, offset, span.tensor)
                values = cast_block(block, view.dtype, span.tensor.name)
                if not direct:
                    target[...] = values
                offset += block.nbytes


def _read_exactly(file: int, block: np.ndarray, offset: int, tensor: TensorInfo) -> None:
    buffer = block.reshape(-1).view(np.uint8).data
    done = 0
    # one call reads at most 2 GB
    while done < len(buffer):
        count = os.preadv(file, [buffer[done:]], offset + done)
        if count == 0:
            raise CheckpointError(
                f"{tensor.file} is shorter than when it was opened",
                seen=f"it ends at byte {offset + done}, inside {tensor.name}",
                expected="a checkpoint that nothing changes while it is read",
                fix="download the whole checkpoint again",
            )
        done += count
