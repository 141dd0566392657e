"""Memory for plugins, host or device: buffers with exact sizes between guards that nothing may write to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

GUARD = 256
PATTERN = 0xA5


@dataclass
class Buffer:
    """`size` bytes at `address`; `raw` holds them between two guards."""

    raw: Any
    address: int
    size: int


class Memory(Protocol):
    name: str

    def allocate(self, size: int) -> Buffer: ...
    def write(self, buffer: Buffer, data: bytes) -> None: ...
    def read(self, buffer: Buffer) -> bytes:
        """The whole allocation, guards included."""
        ...

    def stream(self) -> int: ...
    def synchronize(self) -> None: ...


class HostMemory:
    """For the emulated library."""

    name = "emulated"

    def allocate(self, size: int) -> Buffer:
        raw = np.full(size + 2 * GUARD + 256, PATTERN, np.uint8)
        # 256-byte alignment, as from a device allocator
        raw = raw[-raw.ctypes.data % 256 :][: size + 2 * GUARD]
        return Buffer(raw, raw.ctypes.data + GUARD, size)

    def write(self, buffer: Buffer, data: bytes) -> None:
        buffer.raw[GUARD : GUARD + len(data)] = np.frombuffer(data, np.uint8)

    def read(self, buffer: Buffer) -> bytes:
        return buffer.raw.tobytes()

    def stream(self) -> int:
        return 0

    def synchronize(self) -> None:
        pass


class CudaMemory:
    """Device memory through torch, and a stream of its own."""

    name = "cuda"

    def __init__(self) -> None:
        import torch

        self._torch = torch
        self._stream = torch.cuda.Stream()

    def allocate(self, size: int) -> Buffer:
        raw = self._torch.full((size + 2 * GUARD,), PATTERN, dtype=self._torch.uint8, device="cuda")
        self._torch.cuda.synchronize()
        return Buffer(raw, raw.data_ptr() + GUARD, size)

    def write(self, buffer: Buffer, data: bytes) -> None:
        # through numpy: torch.frombuffer takes no empty buffer, and some workspaces are
        part = self._torch.from_numpy(np.frombuffer(data, np.uint8).copy())
        buffer.raw[GUARD : GUARD + len(data)].copy_(part)
        self._torch.cuda.synchronize()

    def read(self, buffer: Buffer) -> bytes:
        self._torch.cuda.synchronize()
        return buffer.raw.cpu().numpy().tobytes()

    def stream(self) -> int:
        return self._stream.cuda_stream

    def synchronize(self) -> None:
        self._torch.cuda.synchronize()


def contents(memory: Memory, buffer: Buffer) -> bytes:
    """What is in the buffer, after its guards were found whole."""
    raw = memory.read(buffer)
    assert raw[:GUARD] == raw[GUARD + buffer.size :] == bytes([PATTERN]) * GUARD, "written outside of a buffer"
    return raw[GUARD : GUARD + buffer.size]
