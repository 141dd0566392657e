"""Where ONNX Runtime's time goes: by operator and by decoder layer, with the trace it came from."""

from __future__ import annotations

import json
import re
import resource
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from kimi_deploy.bench.host_glue import host_glue
from kimi_deploy.errors import UsageError
from kimi_deploy.ops.spec import DOMAIN
from kimi_deploy.runtime.base import kernels_to_dict
from kimi_deploy.runtime.ort_runner import MODEL_NAME, OrtRunner
from kimi_deploy.runtime.state import State

_WITH_A_GRAPH = {"If", "Loop", "Scan"}
"""Their time is that of the operators inside, which are counted themselves."""
_LAYER = re.compile(r"(?:model\.layers|past_key_values)\.(\d+)\.")
_INLINED = re.compile(r"_inlfunc_([A-Za-z]+?)(?:_token_(\d+))?_[a-z]")
REST = "embedding, last norm, head"


def profile_export(
    export: Path, folder: Path, prompt: int, steps: int, threads: int, kernels: str = "auto"
) -> dict[str, Any]:
    """Profile a prefill of `prompt` tokens (three times) and `steps` decode steps after it, batch 1.

    Writes profile.json, prefill-trace.json and decode-trace.json (Chrome's trace format, which Perfetto opens) to
    `folder` and returns what profile.json holds: mean seconds a call by operator and by layer, largest first, bytes by
    component, and the host glue of a decode step, which is measured without profiling. Profiling itself adds a
    microsecond or two to every operator, so small ones look larger than they are.
    Raises UsageError when `folder` is a file or cannot be made, and the errors of OrtRunner.
    """
    make_folder(folder)
    # first: sessions that still live, with threads of their own, would disturb it
    glue = host_glue(export, prompt, steps, threads, kernels)
    graph = onnx.load(export / MODEL_NAME, load_external_data=False).graph
    phases, traces = {}, []
    for phase in ("prefill", "decode"):
        runner = OrtRunner(export, threads=threads, kernels=kernels, profile=folder / phase)
        state = runner.new_state(1, prompt + steps + 1)
        ids = np.random.default_rng(0).integers(0, runner.contract.vocab_size, (1, prompt + steps + 1))
        if phase == "prefill":
            calls = 3
            for _ in range(calls + 1):
                runner.forward(ids[:, :prompt], runner.new_state(1, prompt))
        else:
            calls = steps
            runner.forward(ids[:, :prompt], state)
            for i in range(prompt, prompt + steps + 1):
                runner.forward(ids[:, i : i + 1], state)
        trace = Path(runner.end_profiling()).replace(folder / f"{phase}-trace.json")
        traces.append(str(trace))
        phases[phase] = _summary(json.loads(trace.read_text(encoding="utf-8")), calls, graph)
    report = {
        "export": str(export),
        "prompt": prompt,
        "steps": steps,
        "threads": threads,
        "kernels": kernels_to_dict(runner.kernels),
        "phases": phases,
        "host_glue_seconds": glue,
        "memory": memory_by_component(sum(f.stat().st_size for f in export.glob("weights*")), state),
        "traces": traces,
    }
    write_report(report, folder)
    return report


def make_folder(folder: Path) -> None:
    """Make the folder of a profile. Raises UsageError when it is a file or cannot be made."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError("the folder for the profile cannot be made", seen=f"{folder}: {error.strerror}") from error


def memory_by_component(weights: int, state: State) -> dict[str, int]:
    """Bytes of this process: weights, what `state` has allocated of each kind, and what else its peak held."""
    latent = sum(m.nbytes for m in state.memory() if m.kind == "latent")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {
        "weights": weights,
        "KDA state": state.nbytes - latent,
        "latent cache": latent,
        "rest of the peak (arena, libraries, profiles)": max(peak - weights - state.nbytes, 0),
        "peak resident": peak,
    }


def write_report(report: dict[str, Any], folder: Path) -> None:
    """Save the report as profile.json."""
    (folder / "profile.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def _summary(events: list[dict[str, Any]], calls: int, graph: onnx.GraphProto) -> dict[str, Any]:
    """The last `calls` runs of the trace, per call."""
    runs = sorted((e for e in events if e["name"] == "model_run"), key=lambda e: e["ts"])[-calls:]
    kernels = [
        e
        for e in events
        if e.get("cat") == "Node"
        and e["name"].endswith("_kernel_time")
        and e["ts"] >= runs[0]["ts"]
        and e["args"]["op_name"] not in _WITH_A_GRAPH
    ]
    layers = _Layers(graph, {_name(e) for e in kernels})
    operators: dict[str, list[float]] = defaultdict(lambda: [0.0, 0])
    by_layer: dict[str, list[float]] = defaultdict(lambda: [0.0, 0])
    for event in kernels:
        for table, key in ((operators, event["args"]["op_name"]), (by_layer, layers.of(_name(event)))):
            table[key][0] += event["dur"] / 1e6 / calls
            table[key][1] += 1 / calls
    return {
        "seconds": sum(run["dur"] for run in runs) / 1e6 / calls,
        "kernel_seconds": sum(seconds for seconds, _ in operators.values()),
        "operators": ordered(operators),
        "layers": ordered(by_layer),
    }


def _name(event: dict[str, Any]) -> str:
    return str(event["name"]).removesuffix("_kernel_time")


def ordered(table: dict[str, list[float]]) -> dict[str, dict[str, float]]:
    """Seconds and calls under each name, longest first."""
    ordered = sorted(table.items(), key=lambda item: -item[1][0])
    return {name: {"seconds": seconds, "calls": number} for name, (seconds, number) in ordered}


def decoder_layers(graph: onnx.GraphProto) -> dict[str, int | None]:
    """The decoder layer of each node of an export, by the node's name; None before the first and after the last.

    A node belongs to the layer of the weights and states it reads, or else to the last layer that its inputs come from.
    """
    layers: dict[str, int | None] = {}
    produced: dict[str, int | None] = {}
    for node in graph.node:
        named = [int(m.group(1)) for m in map(_LAYER.match, node.input) if m]
        past = [layer for layer in map(produced.get, node.input) if layer is not None]
        layer = max(named or past, default=None)
        if not {"lm_head.weight", "model.norm.weight"}.isdisjoint(node.input):
            layer = None
        layers[node.name] = layer
        produced.update(dict.fromkeys(node.output, layer))
    return layers


class _Layers:
    """The decoder layer of each node that ONNX Runtime names in a profile.

    ONNX Runtime names the nodes of an inlined function after the op and a number that grows with the calls.
    """

    def __init__(self, graph: onnx.GraphProto, names: set[str]) -> None:
        self._nodes = decoder_layers(graph)
        calls: dict[str, list[int | None]] = defaultdict(list)
        for node in graph.node:
            if node.domain == DOMAIN:
                calls[node.op_type].append(self._nodes[node.name])
        # the first call of an op has no number; numbers are shared by all ops
        inlined = {m.groups() for m in map(_INLINED.match, names) if m}
        self._calls: dict[tuple[str, str | None], int | None] = {}
        for op, layers in calls.items():
            order = sorted((n for o, n in inlined if o == op), key=lambda n: -1 if n is None else int(n))
            if not order:  # it ran as a kernel, under its node's own name
                continue
            self._calls.update({(op, n): layer for n, layer in zip(order, layers, strict=True)})

    def of(self, name: str) -> str:
        """The layer of a node in a profile, in words."""
        inlined = _INLINED.match(name)
        if inlined:
            layer = self._calls.get((inlined.group(1), inlined.group(2)))
        else:
            layer = self._nodes.get(name.split("/")[0])
        return REST if layer is None else f"layer {layer}"
