"""A state in device memory: two buffers for a state that the engine reads and writes apart, one for an aliased one."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any

import numpy as np

from kimi_deploy.contract import INPUT_IDS, LOGITS_INDICES, PAST_LENGTHS, SEQUENCE_LENGTHS, GraphContract, StateTensor
from kimi_deploy.errors import StateError
from kimi_deploy.runtime.dlpack import DeviceTensor
from kimi_deploy.runtime.storage import NUMPY_DTYPES
from kimi_deploy.runtime.trt_device import Device, DeviceBuffer

_ALIGNMENT = 256


class Buffers:
    """The memory of one state of `batch` rows and `capacity` tokens, and the graphs that hold its addresses.

    Two sides: a step reads one and writes the other, which is then the current one. A state in `aliased` has the same
    buffer on both.
    """

    def __init__(
        self, device: Device, contract: GraphContract, aliased: frozenset[str], batch: int, capacity: int
    ) -> None:
        """Raises MemoryError."""
        self.batch, self.capacity = batch, capacity
        self._states: dict[str, StateTensor] = {s.past_name: s for s in contract.states}
        self._buffers: dict[str, list[DeviceBuffer]] = {}
        for name, state in self._states.items():
            nbytes = int(np.prod(self.shape(name))) * NUMPY_DTYPES[state.dtype].itemsize
            self._buffers[name] = [DeviceBuffer(device, nbytes) for _ in range(1 if name in aliased else 2)]
        self.step = StepMemory(device, contract, batch)
        self.graphs: dict[tuple[int, int], Any] = {}
        """By the side that is read, and the slots of the cache that the step is shown."""

    @property
    def names(self) -> tuple[str, ...]:
        """Past names of the states."""
        return tuple(self._states)

    def shape(self, name: str, capacity: int | None = None) -> tuple[int, ...]:
        """Of a state tensor; of its first `capacity` slots, which lie together where there is one row."""
        return self._states[name].shape(self.batch, self.capacity if capacity is None else capacity)

    def dtype(self, name: str) -> str:
        return self._states[name].dtype

    def zero(self) -> None:
        for buffers in self._buffers.values():
            for buffer in buffers:
                buffer.zero()

    def addresses(self, side: int) -> dict[str, int]:
        """Where a step that reads `side` finds every past and present state."""
        found = {}
        for name, buffers in self._buffers.items():
            found[name] = buffers[side % len(buffers)].address
            found[self._states[name].present_name] = buffers[(side + 1) % len(buffers)].address
        return found

    @property
    def nbytes(self) -> int:
        return sum(b.nbytes for buffers in self._buffers.values() for b in buffers)


class StepMemory:
    """Inputs and results of a single-token step at addresses that never change, so that a graph can hold them.

    The inputs lie side by side, as do index and value of the greedy choice: a step is one copy in and one out.
    """

    def __init__(self, device: Device, contract: GraphContract, batch: int) -> None:
        self._device = device
        names = [INPUT_IDS, LOGITS_INDICES, SEQUENCE_LENGTHS] + [PAST_LENGTHS] * contract.has_latent
        self._offsets = {name: i * _round_up(8 * batch) for i, name in enumerate(names)}
        self._packed = np.zeros(len(names) * _round_up(8 * batch), np.uint8)
        self._inputs = DeviceBuffer(device, self._packed.nbytes)
        self.logits = DeviceBuffer(device, 4 * batch * contract.vocab_size)
        self._chosen = DeviceBuffer(device, 12 * batch)
        self._batch = batch

    @property
    def index(self) -> int:
        """Address of the greedy choice, int64 [batch]."""
        return self._chosen.address

    @property
    def value(self) -> int:
        """Address of its logit, float32 [batch]."""
        return self._chosen.address + 8 * self._batch

    def addresses(self) -> dict[str, int]:
        return {name: self._inputs.address + offset for name, offset in self._offsets.items()}

    def upload(self, values: Mapping[str, np.ndarray]) -> None:
        """One copy of all inputs."""
        for name, offset in self._offsets.items():
            value = values[name]
            self._packed[offset : offset + value.nbytes] = value.reshape(-1).view(np.uint8)
        self._device.upload(self._inputs.address, self._packed)

    def download_choice(self) -> tuple[np.ndarray, np.ndarray]:
        """Token ids int64 [batch] and their logits float32 [batch]."""
        raw = np.empty(12 * self._batch, np.uint8)
        self._device.download(self._chosen.address, raw)
        return raw[: 8 * self._batch].view(np.int64), raw[8 * self._batch :].view(np.float32)


def _round_up(nbytes: int) -> int:
    return -(-nbytes // _ALIGNMENT) * _ALIGNMENT


class BufferPool:
    """Buffers of states that are gone, with their graphs, for the next state of the same size."""

    def __init__(self, device: Device, contract: GraphContract, aliased: frozenset[str], keep: int = 2) -> None:
        self._device, self._contract, self._aliased, self._keep = device, contract, aliased, keep
        self._idle: list[Buffers] = []

    def take(self, batch: int, capacity: int) -> Buffers:
        """Zeroed buffers. Raises MemoryError when there is none left even without those that lie idle."""
        sizes = [(b.batch, b.capacity) for b in self._idle]
        wanted = (batch, capacity)
        buffers = self._idle.pop(sizes.index(wanted)) if wanted in sizes else self._allocate(batch, capacity)
        buffers.zero()
        return buffers

    def _allocate(self, batch: int, capacity: int) -> Buffers:
        arguments = (self._device, self._contract, self._aliased, batch, capacity)
        try:
            return Buffers(*arguments)
        except MemoryError:
            if not self._idle:
                raise
            self._idle.clear()
        return Buffers(*arguments)

    def give_back(self, buffers: Buffers) -> None:
        self._idle.append(buffers)
        del self._idle[: -self._keep]


class TrtStorage:
    """The tensors of one state. `side` is the current one; `lost` names those that a failed step left half-written."""

    def __init__(self, device: Device, pool: BufferPool, batch: int, capacity: int) -> None:
        """Raises MemoryError."""
        self._device, self._pool = device, pool
        self.buffers = pool.take(batch, capacity)
        self.side = 0
        self.lost: set[str] = set()
        weakref.finalize(self, pool.give_back, self.buffers)

    def check_whole(self) -> None:
        """Raise StateError after a step that failed when part of it was done."""
        if self.lost:
            raise StateError(
                "the state was lost in a step that failed half-way",
                seen=f"{len(self.lost)} tensors are of no known step",
                fix="restore a snapshot, or begin with a new state",
            )

    def mark_lost(self) -> None:
        self.lost = set(self.buffers.names)

    def read(self, name: str) -> np.ndarray:
        value = np.empty(self.buffers.shape(name), NUMPY_DTYPES[self.buffers.dtype(name)])
        self._device.download(self.buffers.addresses(self.side)[name], value)
        return value

    def write(self, name: str, value: np.ndarray) -> None:
        wanted = NUMPY_DTYPES[self.buffers.dtype(name)]
        self._device.upload(self.buffers.addresses(self.side)[name], np.ascontiguousarray(value, wanted))
        self.lost.discard(name)

    def empty_like(self, batch: int) -> TrtStorage:
        return TrtStorage(self._device, self._pool, batch, self.buffers.capacity)

    def device_tensor(self, name: str) -> DeviceTensor:
        """The tensor where it lies, for other libraries (DLPack)."""
        address = self.buffers.addresses(self.side)[name]
        return DeviceTensor(
            self, address, self.buffers.shape(name), self.buffers.dtype(name), self._device.dlpack_device
        )

    @property
    def nbytes(self) -> int:
        return self.buffers.nbytes
