"""What this machine can do at best: the rates that bound a decode step and a prefill, measured in the same run.

A process of its own, as every runtime has: `python -m kimi_deploy.bench.floors THREADS` prints one line of JSON.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort

from kimi_deploy.config import KimiLinearConfig
from kimi_deploy.onnx.read import read_graph
from kimi_deploy.weights import weight_table

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
SIZE, TOKENS, WEIGHTS = 1536, 512, 24
"""24 float32 matrices of 1536 x 1536: 226 MB, more than any last cache of a processor for which this matters."""


@dataclass(frozen=True)
class Rates:
    """Bytes of weights read per second by products with one row, and multiply-adds per second with 512 rows."""

    read_bytes: float
    multiply_adds: float


def measure_rates(threads: int, repeats: int = 7) -> Rates:
    """Rates of a chain of ONNX Runtime's float32 matrix products, medians."""
    chain = _chain(threads)
    seconds = {}
    for rows in (1, TOKENS):
        x = np.random.default_rng(0).standard_normal((rows, SIZE), np.float32)
        times = []
        for _ in range(repeats + 1):
            began = time.perf_counter()
            chain.run(None, {"x0": x})
            times.append(time.perf_counter() - began)
        seconds[rows] = statistics.median(times[1:])
    elements = WEIGHTS * SIZE * SIZE
    return Rates(4 * elements / seconds[1], TOKENS * elements / seconds[TOKENS])


def _chain(threads: int) -> ort.InferenceSession:
    rng = np.random.default_rng(0)
    weights = [
        onnx.numpy_helper.from_array(rng.standard_normal((SIZE, SIZE), np.float32) / SIZE**0.5, f"w{i}")
        for i in range(WEIGHTS)
    ]
    nodes = [onnx.helper.make_node("MatMul", [f"x{i}", f"w{i}"], [f"x{i + 1}"]) for i in range(WEIGHTS)]
    ends = [
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["rows", SIZE])
        for name in ("x0", f"x{WEIGHTS}")
    ]
    graph = onnx.helper.make_graph(nodes, "chain", ends[:1], ends[1:], weights)
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 21)], ir_version=10)
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


@dataclass(frozen=True)
class Work:
    """What a model's weights demand: bytes as they are stored, multiply-adds per token.

    A token meets `chosen` of the experts, a share. Decode multiplies with the head too, a prefill only its last token.
    """

    dense_bytes: float
    expert_bytes: float
    chosen: float
    prefill_multiply_adds: float
    decode_multiply_adds: float

    def decode_bytes(self, batch: int) -> float:
        """Bytes read by a step of `batch` sequences, whose tokens choose their experts evenly and independently."""
        return self.dense_bytes + self.expert_bytes * (1 - (1 - self.chosen) ** batch)


def model_work(export: Path) -> Work:
    """Work on the weights of an export as they are stored, also in 16 or fewer bits.

    Of an embedding that is not also the head a token reads its own row, which is left out. So are attention's products
    over the context, the delta rule and the states read: under 2 % of a prefill of 512 tokens of "mini-62m".
    Raises ContractError when the graph cannot be read.
    """
    config = KimiLinearConfig.from_folder(export)
    chosen = config.num_experts_per_token / config.num_experts if config.num_experts else 1.0
    dense, experts = 0.0, 0.0
    graph = read_graph(export).graph
    for stored in graph.initializer:
        if stored.name == EMBEDDING and not config.tie_word_embeddings:
            continue
        length = next((int(entry.value) for entry in stored.external_data if entry.key == "length"), None)
        size = len(stored.raw_data) if length is None else length
        if ".experts." in stored.name:
            experts += size
        else:
            dense += size
    shapes = {w.name: float(np.prod(w.shape)) for w in weight_table(config) if len(w.shape) > 1}
    multiplied = sum(
        size * (chosen if ".experts." in name else 1.0)
        for name, size in shapes.items()
        if name not in (EMBEDDING, HEAD)
    )
    return Work(dense, experts, chosen, multiplied, multiplied + shapes.get(HEAD, shapes[EMBEDDING]))


def main() -> None:
    """Print the rates of this machine with the given number of threads."""
    rates = measure_rates(int(sys.argv[1]))
    print(json.dumps({"read_bytes": rates.read_bytes, "multiply_adds": rates.multiply_adds}))


if __name__ == "__main__":
    main()
