"""The experts of "mini-62m" on the CPU: this project's kernel beside ONNX Runtime's own, in processes of their own.

`python -m kimi_deploy.bench.experts TASK`, TASK a JSON object of Task's fields, is such a process.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kimi_deploy.bench.floors import Rates
from kimi_deploy.errors import BackendError

HIDDEN, INTERMEDIATE, EXPERTS, TOP_K, LAYERS = 512, 256, 16, 4, 7
GROUP = 64
FORMATS = {"float32": (32, "float32"), "int8": (8, "int8"), "int4": (4, "int8"), "int4, float32 inputs": (4, "float32")}
"""Bits of the experts' weights and what their products read. A layer's levels are asymmetric."""
TOKENS = (1, 4, 16, 512)
WEIGHTS = 3 * HIDDEN * INTERMEDIATE
"""Of one expert, and the multiply-adds of one token with it."""


@dataclass(frozen=True)
class Task:
    """What one process measures: the layers of a format, by our kernels or by the function bodies."""

    format: str
    kernels: str
    threads: int
    repeats: int


def run_experts_bench(
    threads: int, rounds: int, repeats: int, kernels: Path, progress: Callable[[int], None] = lambda n: None
) -> dict[str, Any]:
    """Seconds per layer of every format and number of tokens, medians over alternating processes, and their floors.

    The floor is what reading the chosen experts once, or multiplying with them, takes at the rates that plain matrix
    products reach in the same run. Raises BackendError when a process fails.
    """
    tasks = [Task(name, which, threads, repeats) for name in FORMATS for which in (str(kernels), "none")]
    times: dict[Task, list[dict[str, float]]] = {task: [] for task in tasks}
    rates: list[Rates] = []
    for _ in range(rounds):
        for task in tasks:
            times[task].append(_process(__name__, json.dumps(asdict(task))))
            progress(1)
        rates.append(Rates(**_process("kimi_deploy.bench.floors", str(threads))))
    rate = Rates(statistics.median(r.read_bytes for r in rates), statistics.median(r.multiply_adds for r in rates))
    rows = []
    for ours, theirs in zip(tasks[::2], tasks[1::2], strict=True):
        for tokens in TOKENS:
            kernel, body = (statistics.median(t[str(tokens)] for t in times[task]) for task in (ours, theirs))
            floor = floor_seconds(ours.format, tokens, rate)
            rows.append({"format": ours.format, "tokens": tokens, "kernel": kernel, "body": body, "floor": floor})
    return {"threads": threads, "rates": asdict(rate), "rows": rows}


def expert_bytes(format_name: str) -> float:
    """Bytes of one expert as it is stored."""
    bits, _ = FORMATS[format_name]
    return WEIGHTS * (4 if bits == 32 else bits / 8 + (4 + bits / 8) / GROUP)


def floor_seconds(format_name: str, tokens: int, rates: Rates) -> float:
    """The least that a layer takes; tokens choose their experts evenly and independently."""
    read = EXPERTS * (1 - (1 - TOP_K / EXPERTS) ** tokens) * expert_bytes(format_name)
    return max(read / rates.read_bytes, tokens * TOP_K * WEIGHTS / rates.multiply_adds)


def _process(module: str, argument: str) -> dict[str, float]:
    done = subprocess.run([sys.executable, "-m", module, argument], capture_output=True, text=True)
    if done.returncode:
        raise BackendError(f"measuring the experts failed: {module} {argument}", seen=done.stderr.strip()[-800:])
    return json.loads(done.stdout.splitlines()[-1])


def layers_model(format_name: str) -> bytes:
    """A serialised model of LAYERS nodes that read one input, each with weights of its own and a function body."""
    import onnx
    import onnx_ir as ir

    from kimi_deploy.ops.flavours import MICROSOFT_DOMAIN, MICROSOFT_OPSET, ONNX_OPSET
    from kimi_deploy.ops.mixture_of_experts.body import body
    from kimi_deploy.ops.quantized_mixture_of_experts.body import body as quantized_body
    from kimi_deploy.ops.registry import OPS
    from kimi_deploy.ops.spec import DOMAIN, DOMAIN_VERSION, AttributeValue

    bits, activations = FORMATS[format_name]
    attributes: dict[str, AttributeValue] = {
        "num_experts": EXPERTS,
        "intermediate": INTERMEDIATE,
        "top_k": TOP_K,
        "n_group": 1,
        "topk_group": 1,
        "renormalize": 1,
        "routed_scaling_factor": 2.446,
    }
    spec, functions = OPS["MixtureOfExperts"], body
    if bits < 32:
        attributes |= {"bits": bits, "block_size": GROUP, "symmetric": 0, "activations": activations}
        spec, functions = OPS["QuantizedMixtureOfExperts"], quantized_body
    rng = np.random.default_rng(0)
    nodes, weights, outputs = [], [], []
    for layer in range(LAYERS):
        arrays = _weights(rng, bits)
        weights += [onnx.numpy_helper.from_array(a, f"{name}.{layer}") for name, a in arrays.items()]
        inputs = ["hidden_states", *(f"{p.name}.{layer}" for p in spec.inputs[1:])]
        node = onnx.helper.make_node(spec.name, inputs, [f"y{layer}"], domain=DOMAIN)
        node.attribute.extend(onnx.helper.make_attribute(n, v) for n, v in (attributes | {"abi": spec.abi}).items())
        nodes.append(node)
        outputs.append(onnx.helper.make_tensor_value_info(f"y{layer}", 1, [1, "sequence", HIDDEN]))
    x = onnx.helper.make_tensor_value_info("hidden_states", 1, [1, "sequence", HIDDEN])
    opsets = (("", ONNX_OPSET), (MICROSOFT_DOMAIN, MICROSOFT_OPSET), (DOMAIN, DOMAIN_VERSION))
    model = onnx.helper.make_model(
        onnx.helper.make_graph(nodes, "layers", [x], outputs, weights),
        opset_imports=[onnx.helper.make_opsetid(*opset) for opset in opsets],
        ir_version=12,
    )
    model.functions.extend(ir.to_proto(f) for f in functions("ort", attributes, "float32"))
    return model.SerializeToString()


def _weights(rng: np.random.Generator, bits: int) -> dict[str, np.ndarray]:
    arrays = {
        "router_weight": rng.standard_normal((EXPERTS, HIDDEN), np.float32),
        "router_bias": np.zeros(EXPERTS, np.float32),
    }
    for name, rows, columns in (("gate_up", 2 * INTERMEDIATE, HIDDEN), ("down", HIDDEN, INTERMEDIATE)):
        if bits == 32:
            arrays[f"{name}_weight"] = rng.standard_normal((EXPERTS, rows, columns), np.float32) / columns**0.5
            continue
        groups = columns // GROUP
        arrays[f"{name}_levels"] = rng.integers(0, 256, (EXPERTS, rows, columns * bits // 8), np.uint8)
        arrays[f"{name}_scales"] = np.full((EXPERTS, rows, groups), 2.0 ** (1 - bits) / columns**0.5, np.float32)
        arrays[f"{name}_zero_points"] = rng.integers(0, 256, (EXPERTS, rows, groups * bits // 8), np.uint8)
    return arrays


def measure(task: Task) -> dict[str, float]:
    """Median seconds of a layer by number of tokens. Every call has new tokens, which choose other experts."""
    import onnxruntime as ort

    from kimi_deploy.runtime.ort_kernels import OrtKernels
    from kimi_deploy.runtime.ort_session import open_session

    session = open_session(
        Path(), "cpu", task.threads, 0, graph=layers_model(task.format), kernels=OrtKernels.find(task.kernels)
    )
    rng, result = np.random.default_rng(1), {}
    for tokens in TOKENS:
        repeats = task.repeats if tokens == TOKENS[-1] else 20 * task.repeats
        seconds = []
        binding = session.io_binding()
        for layer in range(LAYERS):
            y = ort.OrtValue.ortvalue_from_shape_and_type((1, tokens, HIDDEN), np.float32)
            binding.bind_ortvalue_output(f"y{layer}", y)
        for x in rng.standard_normal((repeats + 1, 1, tokens, HIDDEN), np.float32):
            binding.bind_cpu_input("hidden_states", x)
            began = time.perf_counter()
            session.run_with_iobinding(binding)
            seconds.append((time.perf_counter() - began) / LAYERS)
        result[str(tokens)] = statistics.median(seconds[1:])
    return result


if __name__ == "__main__":
    print(json.dumps(measure(Task(**json.loads(sys.argv[1])))))
