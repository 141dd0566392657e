"""What the TensorRT runner needs of a device: memory, copies, one stream, graphs, and the greedy choice."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np


class Device(Protocol):
    """One device and one stream on it. Everything below is ordered by that stream; `download` waits for it."""

    stream: int
    dlpack_device: tuple[int, int]
    """DLPack's device type and number."""

    def allocate(self, nbytes: int) -> int:
        """The address of new memory with any content. Raises MemoryError when there is not enough."""

    def free(self, address: int) -> None:
        """Give memory of `allocate` back, once the stream is done with it."""

    def zero(self, address: int, nbytes: int) -> None:
        """Fill with zero bytes."""

    def copy(self, target: int, source: int, nbytes: int) -> None:
        """Copy device memory that does not overlap."""

    def upload(self, address: int, value: np.ndarray) -> None:
        """Copy a contiguous array to the device; the array may change as soon as this returns."""

    def download(self, address: int, value: np.ndarray) -> None:
        """Fill a contiguous array from the device, after everything that was ordered before."""

    def argmax(self, logits: int, rows: int, columns: int, index: int, value: int) -> None:
        """Per row of float32 [rows, columns] at `logits`: the largest value, NaN above all, and its smallest index.

        Writes int64 [rows] to `index` and float32 [rows] to `value`.
        """

    def capture(self, work: Callable[[], None]) -> Any:
        """Record what `work` orders, as a graph, without doing it. Raises BackendError when it cannot be recorded."""

    def launch(self, graph: Any) -> None:
        """Do once what a graph of `capture` recorded."""


class DeviceBuffer:
    """Device memory that is given back with the object."""

    def __init__(self, device: Device, nbytes: int) -> None:
        """Raises MemoryError when there is not enough."""
        self.nbytes = nbytes
        self.address = device.allocate(max(nbytes, 1))
        self._device = device
        weakref.finalize(self, device.free, self.address)

    def zero(self) -> None:
        self._device.zero(self.address, self.nbytes)
