"""Known faults of running an engine, planted in the runner and the device below it; the engine's graph is right.

The engine's place is taken by ONNX Runtime with the graph that TensorRT would be given (`fake_tensorrt`): what a fault
does to states, buffers and recorded graphs is what it would do on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kimi_deploy.contract import LOGITS, PAST_LENGTHS, SEQUENCE_LENGTHS, GraphContract
from kimi_deploy.engine.network import read_graph
from kimi_deploy.errors import StateError
from kimi_deploy.runtime.base import Call
from kimi_deploy.runtime.ort_runner import MODEL_NAME
from kimi_deploy.runtime.state import State
from kimi_deploy.runtime.trt_runner import TrtRunner
from kimi_deploy.runtime.trt_session import ProfileLimits
from kimi_deploy.runtime.trt_storage import BufferPool, Buffers, TrtStorage
from kimi_deploy.validate.faults.catalogue import Planted
from kimi_deploy.validate.faults.fake_tensorrt import FakeDevice, FakeSession, profile

# every prompt of the self-test in one piece, so that a fault of later calls shows in the checks that make them; a
# prompt of one token is a step
PROFILES = (profile("prefill", 0, 4, 128, 256, 128), profile("decode", 1, 4, 1, 256, 1))


class Engine:
    """The graph of an export as TensorRT gets it, loaded once and run by as many runners as there are faults."""

    def __init__(self, folder: Path, fingerprint: str, *, bodies: bool = True) -> None:
        """`bodies` puts in those that `build-engine` does; False takes the graph in `folder` as it is."""
        graph = read_graph(folder / MODEL_NAME, frozenset()).proto if bodies else None
        self._session = FakeSession(folder / MODEL_NAME, FakeDevice(), PROFILES, fingerprint, graph=graph)

    def run_by(
        self, runner: type[TrtRunner] = TrtRunner, device: FakeDevice | None = None, *, aliased: bool = False
    ) -> TrtRunner:
        """A runner of this engine on memory of its own; `aliased` states are written over their past."""
        states = self._session.contract.states
        names = frozenset(s.past_name for s in states if s.kind != "latent") if aliased else frozenset()
        session = self._session.on(device or FakeDevice(), names)
        return runner(session, session.device)


@dataclass(frozen=True)
class EngineFault:
    """`plant` makes a runner with the fault; `planted` is where it is and what must find it."""

    name: str
    planted: Planted
    plant: Callable[[Engine], TrtRunner]


class _NotSwapped(TrtRunner):
    """A step's new states are never taken over."""

    def _step(self, call: Call, storage: TrtStorage) -> None:
        super()._step(call, storage)
        storage.side ^= 1


class _OneGraph(TrtRunner):
    """The graph of one side is launched for the other too: it reads and writes the addresses it was recorded with."""

    def _record(self, profile: ProfileLimits, buffers: Buffers, side: int, shown: int) -> object | None:
        graph = super()._record(profile, buffers, side, shown)
        if graph is not None:
            buffers.graphs |= {(0, shown): graph, (1, shown): graph}
        return graph


class _OldInputs(TrtRunner):
    """A launched graph finds the inputs it was recorded with."""

    def _step(self, call: Call, storage: TrtStorage) -> None:
        step = storage.buffers.step
        if any(side == storage.side for side, _ in storage.buffers.graphs):
            step.upload = lambda values: None  # type: ignore[method-assign]
        super()._step(call, storage)
        vars(step).pop("upload", None)


class _OldAddresses(TrtRunner):
    """A prefill is bound to the buffers that its state began with, whichever side is current."""

    def _run_piece(self, call: Call, profile: ProfileLimits, storage: TrtStorage, logits: np.ndarray) -> None:
        side, storage.side = storage.side, 0
        super()._run_piece(call, profile, storage, logits)
        storage.side = side ^ 1


class _OtherLogits(TrtRunner):
    """A step's logits are read where the prefill profile writes its own."""

    def _run(self, call: Call, state: State) -> np.ndarray:
        logits = super()._run(call, state)
        if self._is_step(call) and LOGITS in self._scratch:
            self._device.download(self._scratch[LOGITS].address, logits)
        return logits


class _LateLength(TrtRunner):
    """A step writes the cache's slot of the token before: its own keeps what was there."""

    def _inputs(self, call: Call) -> dict[str, np.ndarray]:
        values = super()._inputs(call)
        if self._is_step(call) and PAST_LENGTHS in values:
            values[PAST_LENGTHS] = np.maximum(values[PAST_LENGTHS] - 1, 0)
        return values


class _UsedMemory(TrtRunner):
    """Buffers of a sequence that is over begin the next one as they are."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._pool = _UncleanPool(self._device, self.contract, self._session.aliased)


class _UncleanPool(BufferPool):
    def take(self, batch: int, capacity: int) -> Buffers:
        used = next((b for b in self._idle if (b.batch, b.capacity) == (batch, capacity)), None)
        if used is None:
            return super().take(batch, capacity)
        self._idle.remove(used)
        return used


class _WrongRestore(TrtRunner):
    """A snapshot is written to the side that the next step does not read."""

    def _new_storage(self, batch: int, capacity: int) -> TrtStorage:
        return _OtherSide(self._device, self._pool, batch, capacity)


class _OtherSide(TrtStorage):
    def write(self, name: str, value: np.ndarray) -> None:
        self.side ^= 1
        super().write(name, value)
        self.side ^= 1


class _BusyRow(TrtRunner):
    """A row without a valid step takes one."""

    def _inputs(self, call: Call) -> dict[str, np.ndarray]:
        values = super()._inputs(call)
        return values | {SEQUENCE_LENGTHS: np.maximum(values[SEQUENCE_LENGTHS], 1)}


class _NoEnd(TrtRunner):
    """A token beyond the capacity is taken, and written over the last one."""

    def forward(self, input_ids: np.ndarray, state: State, *arguments: Any, **options: Any) -> np.ndarray:
        with suppress(StateError):
            return super().forward(input_ids, state, *arguments, **options)
        state.lengths -= input_ids.shape[1]
        return super().forward(input_ids, state, *arguments, **options)


class _WrongChoice(FakeDevice):
    """The greedy choice is one index too far."""

    def argmax(self, logits: int, rows: int, columns: int, index: int, value: int) -> None:
        super().argmax(logits, rows, columns, index, value)
        found = self.view(index, (rows,), np.dtype(np.int64))
        self.order(lambda: np.copyto(found, (found + 1) % columns))


def engine_faults(contract: GraphContract) -> tuple[EngineFault, ...]:
    """Every fault of running an engine with that contract, and where it must show in one of its states."""
    states = contract.states
    first = f"{states[0].layer}.{states[0].kind}"
    # a convolution's window forgets in a few tokens what it began with
    lasting = next(f"{s.layer}.{s.kind}" for s in states if s.kind == "recurrent_state")
    latent = next(f"{s.layer}.{s.kind}" for s in states if s.kind == "latent")

    def runner(kind: type[TrtRunner]) -> Callable[[Engine], TrtRunner]:
        return lambda engine: engine.run_by(kind)

    def fault(name: str, where: str, check: str, tensor: str, plant: Callable[[Engine], TrtRunner]) -> EngineFault:
        return EngineFault(name, Planted(where, check, (tensor,)), plant)

    return (
        fault("states not swapped", "steps", "prefill", first, runner(_NotSwapped)),
        fault(
            "recording runs the step",
            "CUDA graphs, states in place",
            "split-prefill",
            first,
            lambda engine: engine.run_by(device=FakeDevice(capture_runs=True), aliased=True),
        ),
        fault("graph with old addresses", "CUDA graphs", "decode-steps", first, runner(_OneGraph)),
        fault("graph with old inputs", "CUDA graphs", "decode-steps", first, runner(_OldInputs)),
        fault("prefill with old addresses", "prefill", "padding", first, runner(_OldAddresses)),
        fault("logits of the other profile", "steps", "prefill", "logits", runner(_OtherLogits)),
        fault("cache one slot behind", "past_lengths of steps", "split-prefill", latent, runner(_LateLength)),
        fault("state of the last sequence", "buffers", "split-prefill", lasting, runner(_UsedMemory)),
        fault("restored beside the state", "snapshots", "resume", lasting, runner(_WrongRestore)),
        fault("waiting row goes on", "sequence_lengths", "padding", first, runner(_BusyRow)),
        fault("token beyond the cache", "capacity", "full-cache", "refusal", runner(_NoEnd)),
        fault("wrong greedy choice", "argmax", "greedy", "choice", lambda engine: engine.run_by(device=_WrongChoice())),
    )
