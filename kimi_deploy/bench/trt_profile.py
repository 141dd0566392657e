"""Where an engine's time goes: by TensorRT's layers and by decoder layer, with a trace of them."""

from __future__ import annotations

import json
import re
import resource
import time
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from kimi_deploy.bench.profile import REST, decoder_layers, make_folder, ordered, write_report
from kimi_deploy.runtime.ort_runner import MODEL_NAME
from kimi_deploy.runtime.state import State
from kimi_deploy.runtime.trt_device import Device
from kimi_deploy.runtime.trt_runner import TrtRunner
from kimi_deploy.runtime.trt_session import EngineSession

UNNAMED = "layers that TensorRT does not name after a node of the export"
_PREFILLS = 3
_WORDS = re.compile(r"[\w.:/]+")
_RANGE = re.compile(r"([\w:/]+)\.\.\.([\w:/]+)")


@dataclass
class _Run:
    """A call of the runner: seconds since the profile began, seconds it took, and every layer with its seconds."""

    start: float
    seconds: float = 0.0
    layers: list[tuple[str, float]] = field(default_factory=list)


def profile_engine(
    engine: Path, export: Path, session: EngineSession, device: Device, folder: Path, prompt: int, steps: int
) -> dict[str, Any]:
    """As `profile_export`, of the `session` opened from the folder `engine`, which was made of `export`.

    TensorRT times its layers run by run, without CUDA graphs and with a wait after each run: layers are what they are,
    the calls around them are slower than in use. It says how long a layer took, not when it began; in the trace the
    layers of a run stand one after the other from the run's begin. An operator is what TensorRT's inspector calls the
    layer's type, or, in an engine that was not built with --profiling-verbosity detailed, the layer itself. What
    TensorRT has fused of several decoder layers is listed under the first and the last of them.
    Raises UsageError when `folder` is a file or cannot be made, and the errors of TrtRunner.
    """
    make_folder(folder)
    began = time.perf_counter()
    runs: list[_Run] = []
    runner = TrtRunner(session, device, on_layer=lambda name, seconds: runs[-1].layers.append((name, seconds)))
    ids = np.random.default_rng(0).integers(0, runner.contract.vocab_size, (1, prompt + steps + 1))

    def call(tokens: np.ndarray, state: State) -> None:
        start = time.perf_counter()
        runs.append(_Run(start - began))
        runner.forward(tokens, state)
        runs[-1].seconds = time.perf_counter() - start

    for _ in range(_PREFILLS + 1):
        state = runner.new_state(1, prompt + steps + 1)
        call(ids[:, :prompt], state)
    for i in range(prompt, prompt + steps + 1):
        call(ids[:, i : i + 1], state)
    names = _Names(session, export)
    phases, traces = {}, []
    # the first call of each kind allocates and chooses
    for phase, timed in (("prefill", runs[1 : _PREFILLS + 1]), ("decode", runs[_PREFILLS + 2 :])):
        phases[phase] = _summary(timed, names)
        trace = folder / f"{phase}-trace.json"
        trace.write_text(json.dumps(_trace(timed, names)) + "\n", encoding="utf-8")
        traces.append(str(trace))
    latent = sum(m.nbytes for m in state.memory() if m.kind == "latent")
    report = {
        "engine": str(engine),
        "prompt": prompt,
        "steps": steps,
        "phases": phases,
        "memory": {
            "plan": sum(f.stat().st_size for f in engine.glob("*.plan")),
            "KDA state": state.nbytes - latent,
            "latent cache": latent,
            "scratch of the contexts": session.scratch_bytes,
            "peak resident (host)": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        },
        "traces": traces,
    }
    write_report(report, folder)
    return report


class _Names:
    """What TensorRT's names of layers say: the operator, and the decoder layers of the export's nodes in them."""

    def __init__(self, session: EngineSession, export: Path) -> None:
        self._nodes = decoder_layers(onnx.load(export / MODEL_NAME, load_external_data=False).graph)
        self._order = list(self._nodes)
        self._found = {layer["Name"]: layer for profile in session.profiles for layer in session.layers(profile)}

    def operator(self, name: str) -> str:
        return str(self._found.get(name, {}).get("LayerType", name))

    def layer(self, name: str) -> str:
        """The decoder layer in words; of a fused layer the first and the last one."""
        known = [
            word for word in _WORDS.findall(self._found.get(name, {}).get("Metadata") or name) if word in self._nodes
        ]
        for ends in [] if known else _RANGE.findall(name):
            if all(end in self._nodes for end in ends):
                first, last = sorted(map(self._order.index, ends))
                known += self._order[first : last + 1]
        if not known:
            return UNNAMED
        layers = sorted({layer for layer in map(self._nodes.get, known) if layer is not None})
        if not layers:
            return REST
        return f"layer {layers[0]}" if len(layers) == 1 else f"layers {layers[0]} to {layers[-1]}"


def _summary(runs: list[_Run], names: _Names) -> dict[str, Any]:
    """The runs, per call."""
    operators: dict[str, list[float]] = defaultdict(lambda: [0.0, 0])
    layers: dict[str, list[float]] = defaultdict(lambda: [0.0, 0])
    for name, seconds in (layer for run in runs for layer in run.layers):
        for table, key in ((operators, names.operator(name)), (layers, names.layer(name))):
            table[key][0] += seconds / len(runs)
            table[key][1] += 1 / len(runs)
    return {
        "seconds": sum(run.seconds for run in runs) / len(runs),
        "kernel_seconds": sum(seconds for seconds, _ in operators.values()),
        "operators": ordered(operators),
        "layers": ordered(layers),
    }


def _trace(runs: list[_Run], names: _Names) -> dict[str, Any]:
    """The runs in Chrome's trace format. Its times are microseconds; readers keep whole nanoseconds."""

    def event(name: str, start: int, end: int, arguments: dict[str, str]) -> dict[str, Any]:
        times = {"ts": start / 1e3, "dur": (end - start) / 1e3}
        return {"name": name, "ph": "X", "pid": 1, "tid": 1, **times, "args": arguments}

    events: list[dict[str, Any]] = [{"name": "process_name", "ph": "M", "pid": 1, "tid": 1, "args": {"name": "engine"}}]
    for run in runs:
        starts = [run.start]
        for _, seconds in run.layers:
            starts.append(starts[-1] + seconds)
        # two clocks: the layers' own times may add up to a little more than the run's
        edges = [round(1e9 * at) for at in (*starts, max(run.start + run.seconds, starts[-1]))]
        events.append(event("model_run", edges[0], edges[-1], {}))
        for (name, _), start, end in zip(run.layers, edges, edges[1:], strict=False):
            told = {"operator": names.operator(name), "decoder layer": names.layer(name)}
            events.append(event(name, start, end, told))
    return {"traceEvents": events, "displayTimeUnit": "ms"}
