"""A graph of every kind of node that Tokenwise takes, at any sizes, and what it computes in float64."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx
from onnx import NodeProto, helper, numpy_helper

from kimi_deploy.ops.flavours import (
    FLOAT32_ACTIVATIONS,
    INT8_ACTIVATIONS,
    MICROSOFT_DOMAIN,
    MICROSOFT_OPSET,
    ONNX_OPSET,
)
from kimi_deploy.ops.spec import DOMAIN, DOMAIN_VERSION

EPSILON = 1e-5


@dataclass(frozen=True)
class Case:
    """Sizes of a block: a sum, a norm, a gated MLP in blocks of weights, and float32 gates beside it."""

    bits: int = 4
    block: int = 32
    zero_points: bool = True
    int8: bool = True
    hidden: int = 96
    intermediate: int = 64
    gates: int = 37


class Weights:
    def __init__(self, case: Case, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self.norm = rng.uniform(0.5, 1.5, case.hidden).astype(np.float32)
        self.gate_norm = rng.uniform(0.5, 1.5, case.gates - 5).astype(np.float32)
        self.gates = (rng.standard_normal((case.hidden, case.gates)) / case.hidden**0.5).astype(np.float32)
        self.wide = (rng.standard_normal((5, 21)) / 5**0.5).astype(np.float32)
        self.up = _levels(rng, case, 2 * case.intermediate, case.hidden)
        self.down = _levels(rng, case, case.hidden, case.intermediate)


def _levels(rng: np.random.Generator, case: Case, rows: int, columns: int) -> tuple[np.ndarray, ...]:
    """Packed levels, scales and zero points as MatMulNBits has them."""
    blocks = columns // case.block
    levels = rng.integers(0, 256, (rows, blocks, case.block * case.bits // 8), np.uint8)
    scales = (rng.uniform(0.5, 1.5, (rows, blocks)) * 2.0 ** (1 - case.bits) / columns**0.5).astype(np.float32)
    zeros = rng.integers(0, 256, (rows, -(-blocks * case.bits // 8)), np.uint8)
    return (levels, scales, zeros) if case.zero_points else (levels, scales)


def model(case: Case, weights: Weights) -> onnx.ModelProto:
    """x, y [batch, sequence, hidden] to `out`, and to `c` and `g` from the gates; `n` is also an output."""
    initializers: dict[str, np.ndarray] = {
        "norm": weights.norm,
        "gate_norm": weights.gate_norm,
        "gates": weights.gates,
        "wide": weights.wide,
        "halves": np.array([case.intermediate, case.intermediate]),
        "parts": np.array([case.gates - 5, 5]),
    }

    def product(x: str, name: str, arrays: tuple[np.ndarray, ...], rows: int, columns: int) -> NodeProto:
        names = [f"{name}_{part}" for part in ("levels", "scales", "zeros")][: len(arrays)]
        initializers.update(zip(names, arrays, strict=True))
        level = INT8_ACTIVATIONS if case.int8 else FLOAT32_ACTIVATIONS
        return helper.make_node(
            "MatMulNBits", [x, *names], [name], f"node_{name}", domain=MICROSOFT_DOMAIN, K=columns, N=rows,
            bits=case.bits, block_size=case.block, accuracy_level=level,
        )  # fmt: skip

    nodes = [
        helper.make_node("Add", ["x", "y"], ["s"]),
        helper.make_node("RMSNormalization", ["s", "norm"], ["n"], axis=-1, epsilon=EPSILON),
        product("n", "up", weights.up, 2 * case.intermediate, case.hidden),
        helper.make_node("Split", ["up", "halves"], ["gate", "value"], axis=-1),
        helper.make_node("Sigmoid", ["gate"], ["sigmoid"]),
        helper.make_node("Mul", ["gate", "sigmoid"], ["silu"]),
        helper.make_node("Mul", ["silu", "value"], ["h"]),
        product("h", "down", weights.down, case.hidden, case.intermediate),
        helper.make_node("Add", ["s", "down"], ["out"]),
        helper.make_node("MatMul", ["n", "gates"], ["f"], "node_f"),
        helper.make_node("Split", ["f", "parts"], ["f1", "f2"], axis=-1),
        helper.make_node("RMSNormalization", ["f1", "gate_norm"], ["fn"], axis=-1, epsilon=EPSILON),
        helper.make_node("Concat", ["fn", "f2"], ["c"], axis=-1),
        helper.make_node("MatMul", ["f2", "wide"], ["g"], "node_g"),
    ]
    shapes = {"x": case.hidden, "y": case.hidden}
    results = {"out": case.hidden, "n": case.hidden, "c": case.gates, "f2": 5, "g": 21}

    def infos(columns: dict[str, int]) -> list[onnx.ValueInfoProto]:
        return [helper.make_tensor_value_info(n, 1, ["batch", "sequence", size]) for n, size in columns.items()]

    stored = [numpy_helper.from_array(a, name) for name, a in initializers.items()]
    opsets = (("", ONNX_OPSET), (MICROSOFT_DOMAIN, MICROSOFT_OPSET), (DOMAIN, DOMAIN_VERSION))
    return helper.make_model(
        helper.make_graph(nodes, "block", infos(shapes), infos(results), stored),
        opset_imports=[helper.make_opsetid(*opset) for opset in opsets],
        ir_version=12,
    )


def reference(case: Case, w: Weights, x: np.ndarray, y: np.ndarray) -> dict[str, np.ndarray]:
    """The outputs in float64."""
    s = x.astype(np.float64) + y
    n = _norm(s, w.norm)
    up = _product(case, n, w.up)
    gate, value = np.split(up, 2, axis=-1)
    h = gate / (1 + np.exp(-gate)) * value
    f = n @ w.gates.astype(np.float64)
    f1, f2 = f[..., :-5], f[..., -5:]
    c = np.concatenate([_norm(f1, w.gate_norm), f2], axis=-1)
    return {"out": s + _product(case, h, w.down), "n": n, "c": c, "f2": f2, "g": f2 @ w.wide.astype(np.float64)}


def _norm(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + EPSILON) * weight


def _unpacked(packed: np.ndarray, bits: int) -> np.ndarray:
    if bits == 8:
        return packed.astype(np.float64)
    return np.stack([packed & 15, packed >> 4], -1).reshape(len(packed), -1).astype(np.float64)


def _product(case: Case, x: np.ndarray, arrays: tuple[np.ndarray, ...]) -> np.ndarray:
    levels, scales = arrays[:2]
    rows, blocks = scales.shape
    zeros = (
        _unpacked(arrays[2], case.bits)[:, :blocks]
        if case.zero_points
        else np.full((rows, blocks), 2.0 ** (case.bits - 1))
    )
    values = _unpacked(levels.reshape(rows, -1), case.bits).reshape(rows, blocks, case.block)
    weights = ((values - zeros[..., None]) * scales[..., None]).reshape(rows, -1)
    if case.int8:
        in_blocks = x.reshape(*x.shape[:-1], blocks, case.block)
        step = np.abs(in_blocks).max(-1, keepdims=True) / 127
        x = (np.rint(in_blocks / np.where(step > 0, step, 1)) * step).reshape(x.shape)
    return x @ weights.T
