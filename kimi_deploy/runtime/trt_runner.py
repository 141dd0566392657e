"""TensorRT engines behind the runner's interface: states stay on the device, single-token steps are CUDA graphs.

A graph is recorded per state buffer and side, after one ordinary step of the same kind: recording orders nothing, so
that the state moves on once per step, whether it was run, recorded and launched, or only launched.

An engine reads the whole capacity of a cache that it is given. So a state is given as one of fewer slots: the power of
two that holds what the call fills in the longest row. Rows lie one behind the other with that many slots each, and are
moved apart when it doubles.
"""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np

from kimi_deploy.contract import (
    BATCH,
    CAPACITY,
    INPUT_IDS,
    LOGITS,
    LOGITS_INDICES,
    NUM_LOGITS,
    PAST_LENGTHS,
    SEQUENCE,
    SEQUENCE_LENGTHS,
)
from kimi_deploy.errors import BackendError
from kimi_deploy.runtime.base import Call, Runner
from kimi_deploy.runtime.dlpack import DeviceTensor
from kimi_deploy.runtime.state import State
from kimi_deploy.runtime.trt_device import Device, DeviceBuffer
from kimi_deploy.runtime.trt_pieces import Piece, pieces
from kimi_deploy.runtime.trt_session import (
    AXES,
    EngineContext,
    EngineSession,
    OnLayer,
    ProfileLimits,
    Sizes,
    check_state,
    choose_profile,
)
from kimi_deploy.runtime.trt_storage import BufferPool, Buffers, TrtStorage

log = logging.getLogger("kimi_deploy.tensorrt")

SMALLEST_SHOWN = 256
"""Slots of a cache that a call is shown at least: below, latent attention is no large part of a step."""


class TrtRunner(Runner):
    """Runs an engine. `session` and `device` are TensorRT and CUDA; see `open_trt_runner`."""

    def __init__(
        self, session: EngineSession, device: Device, *, graphs: bool = True, on_layer: OnLayer | None = None
    ) -> None:
        """`graphs` false runs every step without CUDA graphs, as `on_layer` does, which is told every layer's time."""
        self.contract, self.fingerprint = session.contract, session.fingerprint
        self._session, self._device = session, device
        self._pool = BufferPool(device, session.contract, session.aliased)
        self._graphs = graphs and on_layer is None
        self._on_layer = on_layer
        # a context per profile, and one per size of single-token steps: its graphs hold what it has allocated
        self._contexts: dict[tuple[str, int, int], EngineContext] = {}
        self._warm: set[tuple[str, int, int]] = set()
        self._scratch: dict[str, DeviceBuffer] = {}

    @property
    def largest_state(self) -> tuple[int | None, int | None]:
        """Of the profile that takes most rows."""
        ranges = max(self._session.profiles, key=lambda p: p.largest(BATCH)).ranges
        return ranges[BATCH][1], ranges[CAPACITY][1] if CAPACITY in ranges else None

    def _new_storage(self, batch: int, capacity: int) -> TrtStorage:
        check_state(self._session.profiles, batch, capacity)
        return TrtStorage(self._device, self._pool, batch, capacity)

    def _run(self, call: Call, state: State) -> np.ndarray:
        storage = self._storage(state)
        shape = (*call.logits_indices.shape, self.contract.vocab_size)
        if self._is_step(call):
            logits = np.empty(shape, np.float32)
            self._step(call, storage)
            self._device.download(storage.buffers.step.logits.address, logits)
            return logits
        planned = self._plan(call, storage)
        logits = np.zeros(shape, np.float32)
        for done, (piece, profile) in enumerate(planned):
            part = np.empty((*piece.call.logits_indices.shape, self.contract.vocab_size), np.float32)
            try:
                self._run_piece(piece.call, profile, storage, part)
            except Exception:
                if done or self._session.aliased:
                    storage.mark_lost()
                raise
            piece.place(part, logits)
        return logits

    def _run_greedy(self, call: Call, state: State) -> tuple[np.ndarray, np.ndarray]:
        """Of a single-token step only the chosen token and its logit come to the host."""
        if not self._is_step(call):
            return super()._run_greedy(call, state)
        storage = self._storage(state)
        self._step(call, storage)
        return storage.buffers.step.download_choice()

    def device_tensor(self, state: State, name: str) -> DeviceTensor:
        """A state tensor of this runner where it lies, under its past name, for libraries that speak DLPack."""
        return self._storage(state).device_tensor(name)

    def _storage(self, state: State) -> TrtStorage:
        storage = state.storage
        assert isinstance(storage, TrtStorage)
        storage.check_whole()
        return storage

    @staticmethod
    def _is_step(call: Call) -> bool:
        return call.input_ids.shape[1] == 1 and call.logits_indices.shape[1] == 1

    def _plan(self, call: Call, storage: TrtStorage) -> list[tuple[Piece, ProfileLimits]]:
        """The pieces of a call, each with its profile. Raises EngineError, before anything runs, when one has none."""
        batch, capacity = storage.buffers.batch, storage.buffers.capacity
        whole = Sizes(batch, call.input_ids.shape[1], capacity, call.logits_indices.shape[1])
        # the profile is chosen for the whole capacity, so that what is shown never decides whether a call runs
        usable = [p for p in self._session.profiles if p.holds(whole, (BATCH, CAPACITY))]
        widest = max(usable, key=lambda p: p.largest(SEQUENCE), default=self._session.profiles[0])
        return [
            (
                piece,
                choose_profile(
                    self._session.profiles,
                    Sizes(batch, piece.call.input_ids.shape[1], capacity, piece.call.logits_indices.shape[1]),
                ),
            )
            for piece in pieces(call, widest.largest(SEQUENCE), widest.largest(NUM_LOGITS))
        ]

    def _run_piece(self, call: Call, profile: ProfileLimits, storage: TrtStorage, logits: np.ndarray) -> None:
        context = self._context(profile, 0, 0)
        shown = self._shown(call, profile, storage)
        values = self._inputs(call)
        for name, value in values.items():
            buffer = self._grown(name, value.nbytes)
            self._device.upload(buffer.address, value)
            context.bind(name, buffer.address)
        buffer = self._grown(LOGITS, logits.nbytes)
        context.bind(LOGITS, buffer.address)
        self._set_shapes(context, values, storage.buffers, shown)
        self._bind(context, storage.buffers.addresses(storage.side))
        context.enqueue()
        self._device.download(buffer.address, logits)
        storage.side ^= 1

    def _step(self, call: Call, storage: TrtStorage) -> None:
        """One token per row: leaves logits and the greedy choice in the step's memory."""
        buffers = storage.buffers
        profile = choose_profile(self._session.profiles, Sizes(buffers.batch, 1, buffers.capacity, 1))
        buffers.step.upload(self._inputs(call))
        side, shown = storage.side, self._shown(call, profile, storage)
        try:
            graph = buffers.graphs.get((side, shown)) or self._record(profile, buffers, side, shown)
            if graph is None:
                self._order_step(profile, buffers, side, shown)
                self._warm.add((profile.name, buffers.batch, shown))
            else:
                self._device.launch(graph)
        except Exception:
            if self._session.aliased:
                storage.mark_lost()
            raise
        storage.side ^= 1

    def _shown(self, call: Call, profile: ProfileLimits, storage: TrtStorage) -> int:
        """Slots of each row of the state's caches that the engine is given; the rows are laid out so."""
        buffers = storage.buffers
        if not self.contract.has_latent:
            return buffers.capacity
        filled = int(call.past_lengths.max()) + call.input_ids.shape[1]
        shown = max(1 << (filled - 1).bit_length(), SMALLEST_SHOWN)
        sizes = Sizes(buffers.batch, call.input_ids.shape[1], shown, call.logits_indices.shape[1])
        # rows are moved by way of a second buffer
        one_buffer = buffers.batch > 1 and not self._session.aliased.isdisjoint(buffers.caches)
        if shown >= buffers.capacity or one_buffer or not profile.holds(sizes):
            shown = buffers.capacity
        storage.lay_out(shown)
        return shown

    def _record(self, profile: ProfileLimits, buffers: Buffers, side: int, shown: int) -> object | None:
        """A graph of the step, or None while there can be none."""
        # TensorRT allocates and chooses in the first run of a shape, which a graph cannot record
        if not self._graphs or (profile.name, buffers.batch, shown) not in self._warm:
            return None
        try:
            graph: object = self._device.capture(lambda: self._order_step(profile, buffers, side, shown))
        except BackendError as error:
            self._graphs = False
            log.warning("decoding without CUDA graphs: %s", error)
            return None
        buffers.graphs[side, shown] = graph
        return graph

    def _order_step(self, profile: ProfileLimits, buffers: Buffers, side: int, shown: int) -> None:
        """Everything of a single-token step that a graph repeats."""
        step = buffers.step
        context = self._context(profile, buffers.batch, shown)
        self._bind(context, step.addresses() | {LOGITS: step.logits.address} | buffers.addresses(side))
        context.enqueue()
        self._device.argmax(step.logits.address, buffers.batch, self.contract.vocab_size, step.index, step.value)

    def _context(self, profile: ProfileLimits, batch: int, capacity: int) -> EngineContext:
        """The context of a profile, or, with a batch, of its single-token steps of that size, whose shapes stay."""
        key = (profile.name, batch, capacity)
        if key not in self._contexts:
            context = self._session.new_context(profile, self._on_layer)
            if batch:
                sizes = dict(zip(AXES, Sizes(batch, 1, capacity, 1), strict=True))
                for spec in self.contract.inputs:
                    context.set_shape(spec.name, tuple(d if isinstance(d, int) else sizes[d] for d in spec.dims))
            self._contexts[key] = context
        return self._contexts[key]

    def _inputs(self, call: Call) -> dict[str, np.ndarray]:
        values = {
            INPUT_IDS: call.input_ids,
            SEQUENCE_LENGTHS: call.sequence_lengths,
            LOGITS_INDICES: call.logits_indices,
        }
        return values | ({PAST_LENGTHS: call.past_lengths} if self.contract.has_latent else {})

    def _grown(self, name: str, nbytes: int) -> DeviceBuffer:
        """Memory for an input or the logits of a prefill, kept and grown."""
        if name not in self._scratch or self._scratch[name].nbytes < nbytes:
            self._scratch.pop(name, None)
            self._scratch[name] = DeviceBuffer(self._device, nbytes)
        return self._scratch[name]

    @staticmethod
    def _set_shapes(context: EngineContext, values: dict[str, np.ndarray], buffers: Buffers, shown: int) -> None:
        for name, value in values.items():
            context.set_shape(name, value.shape)
        for name in buffers.names:
            context.set_shape(name, buffers.shape(name, shown))

    @staticmethod
    def _bind(context: EngineContext, addresses: dict[str, int]) -> None:
        for name, address in addresses.items():
            context.bind(name, address)


def open_trt_runner(folder: Path | str, *, graphs: bool = True, ordinal: int = 0) -> TrtRunner:
    """The runner of the engine in `folder` on GPU number `ordinal`. Raises as `open_trt_session` does."""
    session, device = open_trt_session(folder, ordinal=ordinal)
    return TrtRunner(session, device, graphs=graphs)


def open_trt_session(folder: Path | str, *, ordinal: int = 0) -> tuple[EngineSession, Device]:
    """The engine in `folder`, opened on GPU number `ordinal`, and that device.

    Raises ManifestError, BackendError or EngineError when the engine does not fit this machine; without a GPU a
    BackendError of one line that says what to do instead.
    """
    from kimi_deploy.engine.load import check_engine, check_gpu, read_engine
    from kimi_deploy.runtime.cuda_device import CudaDevice
    from kimi_deploy.runtime.trt_engine import TensorRtSession

    folder = Path(folder)
    manifest, backend = check_engine(folder)
    check_gpu(manifest, backend)
    # first, because TensorRT takes the GPU whose context is current
    device = CudaDevice(ordinal)
    try:
        session = TensorRtSession(read_engine(folder, manifest, backend), device)
    except MemoryError as error:
        raise BackendError(
            "the engine does not fit the GPU's memory", seen=str(error), fix="use a smaller one"
        ) from error
    return session, device
