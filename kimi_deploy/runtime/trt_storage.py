"""A state in device memory: two buffers for a state that the engine reads and writes apart, one for an aliased one."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any

import numpy as np

from kimi_deploy.contract import (
    CAPACITY,
    INPUT_IDS,
    LOGITS_INDICES,
    PAST_LENGTHS,
    SEQUENCE_LENGTHS,
    GraphContract,
    StateTensor,
)
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
        self._device, self.batch, self.capacity = device, batch, capacity
        self._states: dict[str, StateTensor] = {s.past_name: s for s in contract.states}
        self._buffers: dict[str, list[DeviceBuffer]] = {}
        for name, state in self._states.items():
            nbytes = int(np.prod(self.shape(name))) * NUMPY_DTYPES[state.dtype].itemsize
            self._buffers[name] = [DeviceBuffer(device, nbytes) for _ in range(1 if name in aliased else 2)]
        self.step = StepMemory(device, contract, batch)
        self.graphs: dict[tuple[int, int], Any] = {}
        """By the side that is read, and the slots of the cache that the step is shown."""

    @property
    def caches(self) -> dict[str, list[DeviceBuffer]]:
        """The buffers of the states that have a slot per token."""
        return {name: self._buffers[name] for name, state in self._states.items() if CAPACITY in state.dims}

    @property
    def names(self) -> tuple[str, ...]:
        """Past names of the states."""
        return tuple(self._states)

    def shape(self, name: str, capacity: int | None = None) -> tuple[int, ...]:
        """Of a state tensor, or of one with `capacity` slots a row."""
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

    def move_rows(self, side: int, slots: int, wanted: int) -> None:
        """Of every cache on `side`: from rows of `slots` slots to rows of `wanted`, which are zero behind the first.

        By way of the other side, which a step writes before it is read.
        """
        for buffers in self.caches.values():
            here, other = buffers[side], buffers[side ^ 1]
            slot = here.nbytes // (self.batch * self.capacity)
            whole = self.batch * wanted * slot
            self._device.zero(other.address, whole)
            for row in range(self.batch):
                source, target = here.address + row * slots * slot, other.address + row * wanted * slot
                self._device.copy(target, source, min(slots, wanted) * slot)
            self._device.copy(here.address, other.address, whole)

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
    """The tensors of one state. `side` is the current one; `lost` names those that a failed step left half-written.

    Rows of a cache have `slots` slots each, one row behind the other from the beginning of its buffer: as many as the
    last step was shown, and none before the first. With one row that is so for any number of slots.
    """

    def __init__(self, device: Device, pool: BufferPool, batch: int, capacity: int) -> None:
        """Raises MemoryError."""
        self._device, self._pool = device, pool
        self.buffers = pool.take(batch, capacity)
        self.side = 0
        self.slots = capacity if batch == 1 else 0
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

    def lay_out(self, slots: int) -> None:
        """Give every row of a cache so many slots, which hold what it has stored; the last token's is among them."""
        if slots == self.slots or self.buffers.batch == 1:
            return
        try:
            if self.slots:
                self.buffers.move_rows(self.side, self.slots, slots)
        except Exception:
            self.mark_lost()
            raise
        self.slots = slots

    def read(self, name: str) -> np.ndarray:
        shape, dtype = self.buffers.shape(name), NUMPY_DTYPES[self.buffers.dtype(name)]
        if name not in self.buffers.caches or self.slots == self.buffers.capacity:
            value = np.empty(shape, dtype)
            self._device.download(self.buffers.addresses(self.side)[name], value)
            return value
        value = np.zeros(shape, dtype)
        if self.slots:
            stored = np.empty(self.buffers.shape(name, self.slots), dtype)
            self._device.download(self.buffers.addresses(self.side)[name], stored)
            value[:, : self.slots] = stored
        return value

    def write(self, name: str, value: np.ndarray) -> None:
        if name in self.buffers.caches:
            self.lay_out(self.buffers.capacity)
        wanted = NUMPY_DTYPES[self.buffers.dtype(name)]
        self._device.upload(self.buffers.addresses(self.side)[name], np.ascontiguousarray(value, wanted))
        self.lost.discard(name)

    def empty_like(self, batch: int) -> TrtStorage:
        return TrtStorage(self._device, self._pool, batch, self.buffers.capacity)

    def device_tensor(self, name: str) -> DeviceTensor:
        """The tensor where it lies, for other libraries (DLPack): until the next step."""
        self.lay_out(self.buffers.capacity)
        address = self.buffers.addresses(self.side)[name]
        return DeviceTensor(
            self, address, self.buffers.shape(name), self.buffers.dtype(name), self._device.dlpack_device
        )

    @property
    def nbytes(self) -> int:
        return self.buffers.nbytes
