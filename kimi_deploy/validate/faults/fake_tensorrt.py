"""TensorRT and CUDA as the runner sees them, on host memory: the graph runs in ONNX Runtime.

It keeps the rules whose breach goes unnoticed on a GPU until a state is wrong. Memory begins as NaN. Recording a graph
does nothing, and a graph repeats the addresses and shapes it was recorded with, whatever its context is told later. A
context records only a shape it has run before. Past and present of a state must share memory where the engine says so,
and must not elsewhere.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from copy import copy
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from kimi_deploy.contract import GraphContract
from kimi_deploy.errors import BackendError
from kimi_deploy.runtime.ort_session import open_session, read_contract
from kimi_deploy.runtime.storage import NUMPY_DTYPES
from kimi_deploy.runtime.trt_session import AXES, OnLayer, ProfileLimits

_NUMPY = NUMPY_DTYPES | {"int64": np.dtype(np.int64), "int32": np.dtype(np.int32)}

Work = Callable[[], None]


class FakeDevice:
    """Host memory with a stream that does everything at once, except while it records.

    `capture_runs` makes the mistake of running what it records; `capture_fails` cannot record at all.
    """

    stream = 0
    dlpack_device = (1, 0)

    def __init__(self, *, capture_runs: bool = False, capture_fails: bool = False, limit: int = 2**62) -> None:
        self.memory: dict[int, np.ndarray] = {}
        self.limit = limit
        self.captures = self.launches = self.downloaded = 0
        self._recording: list[Work] | None = None
        self._capture_runs, self._capture_fails = capture_runs, capture_fails

    def allocate(self, nbytes: int) -> int:
        if sum(m.nbytes for m in self.memory.values()) + nbytes > self.limit:
            raise MemoryError(f"{nbytes} bytes")
        block = np.full(nbytes, 0xFF, np.uint8)
        self.memory[block.ctypes.data] = block
        return int(block.ctypes.data)

    def free(self, address: int) -> None:
        del self.memory[address]

    def view(self, address: int, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        """Memory at an address, which must be wholly inside one allocation."""
        nbytes = int(np.prod(shape)) * dtype.itemsize
        for start, block in self.memory.items():
            if start <= address and address + nbytes <= start + block.nbytes:
                return block[address - start : address - start + nbytes].view(dtype).reshape(shape)
        raise AssertionError(f"{nbytes} bytes at {address} are not allocated")

    def order(self, work: Work) -> None:
        if self._recording is None or self._capture_runs:
            work()
        if self._recording is not None:
            self._recording.append(work)

    @property
    def recording(self) -> bool:
        return self._recording is not None

    def zero(self, address: int, nbytes: int) -> None:
        self.view(address, (nbytes,), np.dtype(np.uint8))[...] = 0

    def copy(self, target: int, source: int, nbytes: int) -> None:
        assert not self.recording, "a graph would repeat the copy"
        assert target + nbytes <= source or source + nbytes <= target, "the copy overlaps"
        block = (nbytes,), np.dtype(np.uint8)
        self.view(target, *block)[...] = self.view(source, *block)

    def upload(self, address: int, value: np.ndarray) -> None:
        assert not self.recording, "a graph would keep copying this array's first content"
        assert value.flags.c_contiguous
        self.view(address, (value.nbytes,), np.dtype(np.uint8))[...] = value.reshape(-1).view(np.uint8)

    def download(self, address: int, value: np.ndarray) -> None:
        assert not self.recording, "a wait cannot be recorded"
        assert value.flags.c_contiguous
        self.downloaded += value.nbytes
        value.reshape(-1).view(np.uint8)[...] = self.view(address, (value.nbytes,), np.dtype(np.uint8))

    def argmax(self, logits: int, rows: int, columns: int, index: int, value: int) -> None:
        def work() -> None:
            table = self.view(logits, (rows, columns), np.dtype(np.float32))
            best = table.argmax(-1)
            self.view(index, (rows,), np.dtype(np.int64))[...] = best
            self.view(value, (rows,), np.dtype(np.float32))[...] = table[np.arange(rows), best]

        self.order(work)

    def capture(self, work: Work) -> list[Work]:
        self._recording = []
        try:
            work()
            if self._capture_fails:
                raise BackendError("this stream cannot be recorded")
            self.captures += 1
            return self._recording
        finally:
            self._recording = None

    def launch(self, graph: list[Work]) -> None:
        self.launches += 1
        for work in graph:
            work()


class FakeSession:
    """An "engine" of the graph in `model`, or of the serialised `graph` with the weights beside that.

    `runs` counts executions, `contexts` lists the profiles asked for. `layers` is what its inspector says; a watched
    run reports its time in equal parts, one to each of them.
    """

    def __init__(
        self,
        model: Path,
        device: FakeDevice,
        profiles: tuple[ProfileLimits, ...],
        fingerprint: str,
        aliased: frozenset[str] = frozenset(),
        *,
        graph: bytes | None = None,
        layers: Sequence[dict[str, Any]] = (),
    ) -> None:
        ort.set_default_logger_severity(3)  # a cache that is not updated in place is what is wanted here
        self.onnx: ort.InferenceSession = open_session(model, "cpu", 1, 0, graph=graph)
        self.contract: GraphContract = read_contract(self.onnx)
        self.device, self.profiles, self.fingerprint, self.aliased = device, profiles, fingerprint, aliased
        self.runs: list[str] = []
        self.contexts: list[str] = []
        self.fail_after: int | None = None
        self.scratch_bytes = 0
        self._layers = list(layers)

    def on(self, device: FakeDevice, aliased: frozenset[str]) -> FakeSession:
        """The same engine on another device."""
        other = copy(self)
        other.device, other.aliased, other.runs, other.contexts = device, aliased, [], []
        return other

    def new_context(self, profile: ProfileLimits, on_layer: OnLayer | None = None) -> FakeContext:
        self.contexts.append(profile.name)
        return FakeContext(self, profile, on_layer)

    def layers(self, profile: ProfileLimits) -> list[dict[str, Any]]:
        return self._layers


class FakeContext:
    """What IExecutionContext does between set_input_shape and execute_async_v3."""

    def __init__(self, session: FakeSession, profile: ProfileLimits, on_layer: OnLayer | None) -> None:
        self._session, self._profile, self._on_layer = session, profile, on_layer
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._addresses: dict[str, int] = {}
        self._seen: set[tuple[tuple[str, tuple[int, ...]], ...]] = set()

    def set_shape(self, name: str, shape: tuple[int, ...]) -> None:
        spec = next(s for s in self._session.contract.inputs if s.name == name)
        for dim, size in zip(spec.dims, shape, strict=True):
            low, high = (dim, dim) if isinstance(dim, int) else self._profile.ranges[dim]
            if not low <= size <= high:
                raise BackendError(f"{name}: {dim} {size} is not in {low} to {high}")
        self._shapes[name] = tuple(shape)

    def bind(self, name: str, address: int) -> None:
        self._addresses[name] = address

    def enqueue(self) -> None:
        contract = self._session.contract
        shapes, addresses = dict(self._shapes), dict(self._addresses)
        assert shapes.keys() == {s.name for s in contract.inputs}
        assert addresses.keys() == {s.name for s in (*contract.inputs, *contract.outputs)}
        key = tuple(sorted(shapes.items()))
        if self._session.device.recording and (key not in self._seen or self._on_layer is not None):
            raise BackendError("a first run cannot be recorded, nor one that is watched")
        self._seen.add(key)
        sizes: dict[str, int] = {}
        for spec in contract.inputs:
            for dim, size in zip(spec.dims, shapes[spec.name], strict=True):
                assert isinstance(dim, int) or sizes.setdefault(dim, size) == size, f"two sizes of {dim}"
        for state in contract.states:
            shared = addresses[state.past_name] == addresses[state.present_name]
            assert shared == (state.past_name in self._session.aliased), state.past_name
        self._session.device.order(lambda: self._run(sizes, shapes, addresses))

    def _run(self, sizes: dict[str, int], shapes: dict[str, tuple[int, ...]], addresses: dict[str, int]) -> None:
        session = self._session
        if session.fail_after is not None and len(session.runs) >= session.fail_after:
            raise BackendError("the GPU has stopped")
        session.runs.append(self._profile.name)
        feeds = {
            s.name: session.device.view(addresses[s.name], shapes[s.name], _NUMPY[s.dtype]).copy()
            for s in session.contract.inputs
        }
        began = time.perf_counter()
        results = session.onnx.run([s.name for s in session.contract.outputs], feeds)
        seconds = time.perf_counter() - began
        for spec, result in zip(session.contract.outputs, results, strict=True):
            shape = tuple(d if isinstance(d, int) else sizes[d] for d in spec.dims)
            session.device.view(addresses[spec.name], shape, _NUMPY[spec.dtype])[...] = result
        if self._on_layer is not None:
            for layer in session.layers(self._profile):
                self._on_layer(layer["Name"], seconds / len(session.layers(self._profile)))


def profile(name: str, index: int, batch: int, sequence: int, capacity: int, num_logits: int) -> ProfileLimits:
    """Each axis from 1 to its size."""
    sizes = (batch, sequence, capacity, num_logits)
    return ProfileLimits(name, index, {axis: (1, size) for axis, size in zip(AXES, sizes, strict=True)})
