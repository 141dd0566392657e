"""An engine folder behind the runner's interface, through TensorRT's Python API."""

from __future__ import annotations

import json
from types import ModuleType
from typing import Any

from kimi_deploy.contract import GraphContract
from kimi_deploy.engine.load import Engine, contract_of
from kimi_deploy.errors import BackendError, EngineError
from kimi_deploy.runtime.trt_device import Device, DeviceBuffer
from kimi_deploy.runtime.trt_session import OnLayer, ProfileLimits, limits_of


class TensorRtSession:
    """An opened engine on `device`."""

    def __init__(self, opened: Engine, device: Device) -> None:
        """Raises EngineError when the engine is not what its manifest says, and MemoryError."""
        self._opened = opened
        self._device = device
        self.contract: GraphContract = contract_of(opened.manifest)
        self.fingerprint = str(opened.manifest.source["checkpoint"])
        table = opened.manifest.details["profiles"]
        self._engines = {name: opened.plans[details["plan"]] for name, details in table.items()}
        for engine in self._engines.values():
            self._check_tensors(engine)
        self.profiles = tuple(self._limits(name, details["index"]) for name, details in table.items())
        # both plans are built from one recipe
        self.aliased = self._aliased_states(next(iter(self._engines.values())))
        self._check_aliases()
        sizes = [engine.device_memory_size_v2 for engine in self._engines.values()]
        # one for all contexts, at an address that never changes: graphs keep it
        self._scratch = DeviceBuffer(device, max(sizes))
        self.scratch_bytes = self._scratch.nbytes

    def _check_tensors(self, engine: Any) -> None:
        trt = self._opened.backend.module
        seen = {engine.get_tensor_name(i) for i in range(engine.num_io_tensors)}
        wanted = {t.name for t in (*self.contract.inputs, *self.contract.outputs)}
        if seen != wanted:
            raise EngineError(
                "the engine's inputs and outputs are not those of its manifest",
                seen=str(sorted(seen - wanted)),
                expected=str(sorted(wanted - seen)),
                fix="build the engine again",
            )
        host = [n for n in sorted(seen) if engine.get_tensor_location(n) != trt.TensorLocation.DEVICE]
        if host:
            raise EngineError("the engine wants tensors in host memory", seen=str(host), fix="build the engine again")

    def _limits(self, name: str, index: int) -> ProfileLimits:
        engine = self._engines[name]
        shapes = {t.name: engine.get_tensor_profile_shape(t.name, index) for t in self.contract.inputs}
        return limits_of(name, index, self.contract, {k: [tuple(s) for s in v] for k, v in shapes.items()})

    def _aliased_states(self, engine: Any) -> frozenset[str]:
        """What the engine says. A TensorRT without the question has no aliases."""
        ask = getattr(engine, "get_aliased_input_tensor", None)
        found = set()
        for state in self.contract.states if ask else ():
            source = ask(state.present_name)  # type: ignore[misc]
            if source and source != state.past_name:
                raise EngineError(
                    "the engine writes a state over a tensor of another", seen=f"{state.present_name} over {source}"
                )
            if source:
                found.add(state.past_name)
        return frozenset(found)

    def _check_aliases(self) -> None:
        """Raise EngineError when the recipe asked for states in place and the engine does not say that they are.

        Bound to two buffers, states that a plugin writes in place would stay in the old one.
        """
        recipe = self._opened.manifest.details["recipe"]
        wanted = (
            {s.past_name for s in self.contract.states if s.kind != "latent"} if recipe["in_place_state"] else set()
        )
        if not wanted <= self.aliased:
            raise EngineError(
                "the engine was built with in_place_state, but does not name the states that share memory",
                seen=f"{len(self.aliased)} aliased states",
                expected=f"{len(wanted)}: those of every KDA layer",
                fix="build it without in_place_state",
            )

    def new_context(self, profile: ProfileLimits, on_layer: OnLayer | None = None) -> TensorRtContext:
        trt = self._opened.backend.module
        engine = self._engines[profile.name]
        context = engine.create_execution_context(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
        if context is None:
            raise self._failure("cannot make an execution context")
        context.set_device_memory(self._scratch.address, self._scratch.nbytes)
        if not context.set_optimization_profile_async(profile.index, self._device.stream):
            raise self._failure(f"does not take profile {profile.name}")
        profiler = None
        if on_layer is not None:
            # TensorRT does not keep it alive
            context.profiler = profiler = make_profiler(trt, on_layer)
        return TensorRtContext(self, context, self._device.stream, profiler)

    def layers(self, profile: ProfileLimits) -> list[dict[str, Any]]:
        kind = self._opened.backend.module.LayerInformationFormat.JSON
        inspector = self._engines[profile.name].create_engine_inspector()
        found = json.loads(inspector.get_engine_information(kind))["Layers"]
        # of a plan built with layer_names_only the names alone
        return [layer if isinstance(layer, dict) else {"Name": layer} for layer in found]

    def _failure(self, what: str) -> BackendError:
        backend = self._opened.backend
        seen = "; ".join(backend.logger.errors[-4:])[:2000] or "no message"
        return BackendError(f"{backend.name} {backend.version} {what}", seen=seen, fix="check the GPU's free memory")


class TensorRtContext:
    """One IExecutionContext."""

    def __init__(self, session: TensorRtSession, context: Any, stream: int, profiler: Any) -> None:
        self._session, self._context, self._stream, self._profiler = session, context, stream, profiler

    def set_shape(self, name: str, shape: tuple[int, ...]) -> None:
        if not self._context.set_input_shape(name, shape):
            raise self._session._failure(f"does not take shape {shape} for {name}")

    def bind(self, name: str, address: int) -> None:
        if not self._context.set_tensor_address(name, address):
            raise self._session._failure(f"does not take an address for {name}")

    def enqueue(self) -> None:
        if not self._context.execute_async_v3(self._stream):
            raise self._session._failure("failed in a step")


def make_profiler(module: ModuleType, on_layer: OnLayer) -> Any:
    """An IProfiler that passes every layer's time on, in seconds."""

    class Profiler(module.IProfiler):  # type: ignore[name-defined]
        def __init__(self) -> None:
            module.IProfiler.__init__(self)

        def report_layer_time(self, layer_name: str, ms: float) -> None:
            on_layer(layer_name, ms / 1e3)

    return Profiler()
