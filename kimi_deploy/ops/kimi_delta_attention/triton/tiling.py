"""Sizes of the prefill kernels' tiles: by head size, dtype and the shared memory of the device."""

from __future__ import annotations

from dataclasses import dataclass

import torch

WORKSPACE = 2**30
"""Bytes that one pass of the three kernels may use; a longer prefill takes several."""


@dataclass(frozen=True)
class Tiling:
    """`block` is the padded head size, `chunk` the steps of a chunk, `block_v` the values of a chain program."""

    block: int
    chunk: int
    block_v: int
    prep_warps: int
    chain_warps: int
    stages: int

    def window(self, heads: int) -> int:
        """Steps of one pass over `heads` heads of all rows, a multiple of `chunk`: at most 20 bytes a value."""
        return max(1, WORKSPACE // (heads * self.block * 20 * self.chunk)) * self.chunk


def prefill_tiling(head_dim: int, x: torch.Tensor) -> Tiling:
    """The tiling for data like `x` on its device.

    No tile is narrower than 32: heads padded to 16 gave wrong results on an H200 (Triton 3.6), 32 and more right ones.
    Measured on an H100, 8192 steps, 32 heads of 128: the first kernel takes 0.77 ms with chunks of 16 and two warps,
    1.14 ms with four, 1.59 ms with chunks of 64 and eight: fewer threads meet less often. The chain takes 0.38 ms then,
    0.23 with chunks of 64. Of its tilings tried, 32 values per program and three stages were the fastest.
    """
    block = max(32, 1 << (head_dim - 1).bit_length())
    wide = x.dtype == torch.float32
    return Tiling(
        block=block,
        chunk=16,
        block_v=32,
        prep_warps=(8 if block >= 128 else 4) if wide else max(1, block // 64),
        chain_warps=4,
        stages=1 if wide else 3 if block <= 128 else 2,
    )
