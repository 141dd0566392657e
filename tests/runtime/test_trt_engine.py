"""What is asked of TensorRT's engine and context, and what an engine that is not its manifest's is refused for."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from kimi_deploy.contract import GraphContract
from kimi_deploy.engine.backend import load
from kimi_deploy.engine.load import Engine
from kimi_deploy.errors import BackendError, EngineError
from kimi_deploy.manifest import Manifest
from kimi_deploy.runtime.trt_engine import TensorRtSession, make_profiler
from kimi_deploy.runtime.trt_session import Sizes, choose_profile
from kimi_deploy.validate.faults.fake_tensorrt import FakeDevice
from tests.capabilities import needs_tensorrt_rtx
from tests.runtime.hand_made_graph import hand_made_contract

CONTRACT = hand_made_contract()
IN_PLACE = {s.present_name: s.past_name for s in CONTRACT.states if s.kind != "latent"}
TRT = SimpleNamespace(
    TensorLocation=SimpleNamespace(DEVICE=0, HOST=1),
    ExecutionContextAllocationStrategy=SimpleNamespace(USER_MANAGED="user managed"),
    LayerInformationFormat=SimpleNamespace(JSON="json"),
    IProfiler=object,
)


class CudaEngine:
    """ICudaEngine with one profile per entry of `sequences`, its largest sequence."""

    def __init__(
        self, sequences: list[int], aliases: dict[str, str], contract: GraphContract = CONTRACT, **options: Any
    ) -> None:
        self.names = [t.name for t in (*contract.inputs, *contract.outputs)]
        self.num_io_tensors = len(self.names)
        self.device_memory_size_v2 = 1000 * len(sequences)
        self.sequences, self.aliases = sequences, aliases
        self.host: str = options.get("host", "")
        self.refuse: str = options.get("refuse", "")
        self.information: str = options.get("information", "")
        self.contexts: list[Context] = []

    def get_tensor_name(self, index: int) -> str:
        return self.names[index]

    def get_tensor_location(self, name: str) -> int:
        return TRT.TensorLocation.HOST if name == self.host else TRT.TensorLocation.DEVICE

    def get_tensor_profile_shape(self, name: str, index: int) -> list[tuple[int, ...]]:
        spec = next(t for t in CONTRACT.inputs if t.name == name)
        largest = {"batch": 4, "sequence": self.sequences[index], "capacity": 64, "num_logits": 2}
        return [
            tuple(d if isinstance(d, int) else (1 if bound == 0 else largest[d]) for d in spec.dims)
            for bound in range(3)
        ]

    def get_aliased_input_tensor(self, name: str) -> str | None:
        return self.aliases.get(name)

    def create_engine_inspector(self) -> Any:
        return SimpleNamespace(get_engine_information=lambda kind: self.information if kind == "json" else "")

    def create_execution_context(self, strategy: str) -> Any:
        assert strategy == "user managed"
        self.contexts.append(Context(self.refuse))
        return None if self.refuse == "context" else self.contexts[-1]


class Context:
    """IExecutionContext; notes what it is told."""

    profiler: Any = None

    def __init__(self, refuse: str) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self._refuse = refuse

    def set_device_memory(self, address: int, nbytes: int) -> None:
        self.calls.append(("memory", address, nbytes))

    def _answer(self, *call: Any) -> bool:
        self.calls.append(call)
        return call[0] != self._refuse

    def set_optimization_profile_async(self, index: int, stream: int) -> bool:
        return self._answer("profile", index, stream)

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        return self._answer("shape", name, shape)

    def set_tensor_address(self, name: str, address: int) -> bool:
        return self._answer("address", name, address)

    def execute_async_v3(self, stream: int) -> bool:
        return self._answer("execute", stream)


def opened(plans: dict[str, CudaEngine], profiles: dict[str, tuple[str, int]], in_place: bool = False) -> Engine:
    details = {
        "contract": json.loads(CONTRACT.to_json()),
        "profiles": {name: {"plan": plan, "index": index} for name, (plan, index) in profiles.items()},
        "recipe": {"in_place_state": in_place},
    }
    logger = SimpleNamespace(errors=["no room"])
    backend: Any = SimpleNamespace(module=TRT, name="tensorrt", version="11.0", logger=logger)
    return Engine(Manifest("engine", {"checkpoint": "f" * 64}, {}, details), backend, None, plans)


BOTH = {"prefill": ("engine.plan", 0), "decode": ("engine.plan", 1)}


def session(engine: CudaEngine, in_place: bool = False) -> tuple[TensorRtSession, FakeDevice]:
    device = FakeDevice()
    return TensorRtSession(opened({"engine.plan": engine}, BOTH, in_place), device), device


def test_profiles_are_those_of_the_engine_and_contexts_share_one_scratch_memory() -> None:
    engine = CudaEngine([16, 1], {})
    seen, device = session(engine)
    assert [(p.name, p.ranges["sequence"], p.ranges["capacity"]) for p in seen.profiles] == [
        ("prefill", (1, 16), (1, 64)),
        ("decode", (1, 1), (1, 64)),
    ]
    assert choose_profile(seen.profiles, Sizes(4, 1, 64, 1)).name == "decode"
    assert choose_profile(seen.profiles, Sizes(4, 2, 64, 1)).name == "prefill"
    (scratch,) = device.memory
    for index, profile in enumerate(seen.profiles):
        context = seen.new_context(profile)
        context.set_shape("input_ids", (1, 1))
        context.bind("logits", 64)
        context.enqueue()
        assert engine.contexts[index].calls == [
            ("memory", scratch, 2000),
            ("profile", index, device.stream),
            ("shape", "input_ids", (1, 1)),
            ("address", "logits", 64),
            ("execute", device.stream),
        ]


def test_a_watched_context_passes_each_layers_time_on_in_seconds() -> None:
    engine = CudaEngine([16, 1], {})
    seen, _ = session(engine)
    told: list[tuple[str, float]] = []
    seen.new_context(seen.profiles[0])
    assert engine.contexts[0].profiler is None
    context = seen.new_context(seen.profiles[0], lambda *layer: told.append(layer))
    engine.contexts[1].profiler.report_layer_time("node_linear", 2.0)
    assert told == [("node_linear", 0.002)]
    # TensorRT keeps no reference of its own
    assert context._profiler is engine.contexts[1].profiler


@needs_tensorrt_rtx
def test_the_profiler_is_one_of_tensorrts_own_kind() -> None:
    told: list[tuple[str, float]] = []
    module = load("tensorrt-rtx").module
    profiler = make_profiler(module, lambda *layer: told.append(layer))
    assert isinstance(profiler, module.IProfiler)
    module.IProfiler.report_layer_time(profiler, "a layer", 1.5)
    assert told == [("a layer", 0.0015)]
    # the names that only a GPU's run would miss
    assert {"profiler", "enqueue_emits_profile"} <= set(dir(module.IExecutionContext))
    assert "get_engine_information" in dir(module.EngineInspector)
    assert "create_engine_inspector" in dir(module.ICudaEngine)
    assert "JSON" in module.LayerInformationFormat.__members__


def test_the_inspector_names_layers_in_detail_or_by_name_alone() -> None:
    information = '{"Layers": ["node_a", {"Name": "node_b", "LayerType": "kgen"}], "Bindings": []}'
    seen, _ = session(CudaEngine([16, 1], {}, information=information))
    assert seen.layers(seen.profiles[1]) == [{"Name": "node_a"}, {"Name": "node_b", "LayerType": "kgen"}]


def test_two_plans_are_one_session() -> None:
    prefill, decode = CudaEngine([16], {}), CudaEngine([1], {})
    plans = {"engine.plan": prefill, "decode.plan": decode}
    profiles = {"prefill": ("engine.plan", 0), "decode": ("decode.plan", 0)}
    seen = TensorRtSession(opened(plans, profiles), FakeDevice())
    seen.new_context(choose_profile(seen.profiles, Sizes(1, 1, 8, 1)))
    assert (len(prefill.contexts), len(decode.contexts)) == (0, 1)


def test_aliased_states_are_what_the_engine_says() -> None:
    assert session(CudaEngine([16, 1], IN_PLACE), in_place=True)[0].aliased == set(IN_PLACE.values())
    assert session(CudaEngine([16, 1], {}))[0].aliased == frozenset()


def test_states_in_place_that_the_engine_does_not_name_are_refused() -> None:
    with pytest.raises(EngineError, match="does not name the states"):
        session(CudaEngine([16, 1], {}), in_place=True)


def test_a_state_over_another_tensor_is_refused() -> None:
    first, second = IN_PLACE
    with pytest.raises(EngineError, match="over a tensor of another"):
        session(CudaEngine([16, 1], {first: IN_PLACE[second]}))


def test_an_engine_of_other_tensors_is_refused() -> None:
    other = replace(CONTRACT, states=CONTRACT.states[1:])
    with pytest.raises(EngineError, match=r"(?s)not those of its manifest.*conv_state"):
        session(CudaEngine([16, 1], {}, other))
    with pytest.raises(EngineError, match=r"(?s)host memory.*past_lengths"):
        session(CudaEngine([16, 1], {}, host="past_lengths"))


@pytest.mark.parametrize("refuse", ["context", "profile", "shape", "address", "execute"])
def test_whatever_tensorrt_refuses_is_an_error_with_its_message(refuse: str) -> None:
    seen, _ = session(CudaEngine([16, 1], {}, refuse=refuse))

    def step() -> None:
        context = seen.new_context(seen.profiles[0])
        context.set_shape("input_ids", (1, 1))
        context.bind("logits", 64)
        context.enqueue()

    with pytest.raises(BackendError, match=r"(?s)tensorrt 11\.0.*no room"):
        step()
