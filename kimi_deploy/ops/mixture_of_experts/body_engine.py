"""The experts of MixtureOfExperts for engines: forms that TensorRT fuses into few kernels.

A TensorRT-RTX plan holds every kernel as source text, about 130 kB each, once per layer and profile.
"""

from __future__ import annotations

import onnx_ir as ir

from kimi_deploy.ops.function_builder import FunctionBuilder
from kimi_deploy.ops.mixture_of_experts.body_experts import Routed, Sizes, every_expert, few_tokens, spread

BATCHED_ROWS = 1 << 15
"""Gate and up rows of all experts up to which many tokens go through all experts in one batch of products: 0.27 GB of
float32 for 2,048 tokens. Above, a loop over experts keeps memory to one expert's."""


def fusible(b: FunctionBuilder, r: Routed, sizes: Sizes) -> ir.Value:
    """Float32, of x's shape. Few tokens: their chosen experts alone are read. Many: all experts."""
    few = few_tokens(sizes)
    # one reshape before and one after the branches, where it fuses with other work; inside them each is a copy
    shape = b("Shape", r.x)
    rows = b("Reshape", r.x, b("Concat", b.ints(1, -1), b("Shape", r.x, start=2, end=3), axis=0))
    r = r._replace(x=rows)

    def dense(inner: FunctionBuilder) -> list[ir.Value]:
        if 2 * sizes.intermediate * sizes.experts <= BATCHED_ROWS:
            return [_all_at_once(inner, r, sizes)]
        by_expert = spread(inner, r.chosen, r.weights, sizes.experts, 0.0)
        return [inner("Squeeze", every_expert(inner, r.x, r.gate_up, r.down, by_expert, r.dtype), inner.ints(0))]

    if not few:
        return b("Reshape", dense(b)[0], shape)
    output = b.branch(
        b("Squeeze", b("LessOrEqual", b("Shape", r.chosen, start=0, end=1), b.ints(few))),
        lambda inner: [_chosen_in_place(inner, r)],
        dense,
    )[0]
    return b("Reshape", output, shape)


def _chosen_in_place(b: FunctionBuilder, r: Routed) -> ir.Value:
    """[tokens, hidden]. Products written as multiply and sum: TensorRT-RTX fuses the gathering into them, so that no
    expert is copied.
    """
    rows = b("Transpose", b("Unsqueeze", b.to_float32(r.x, r.dtype), b.ints(2)), perm=[1, 0, 2, 3])
    gate_up = b.to_float32(b("Gather", r.gate_up, r.chosen, axis=0), r.dtype)  # [tokens, top_k, 2*intermediate, hidden]
    h = b("ReduceSum", b("Mul", gate_up, rows), b.ints(3), keepdims=0)
    act = b("Mul", _swiglu(b, h), b("Unsqueeze", r.weights, b.ints(2)))
    down = b.to_float32(b("Gather", r.down, r.chosen, axis=0), r.dtype)  # [tokens, top_k, hidden, intermediate]
    return b("ReduceSum", b("Mul", down, b("Unsqueeze", act, b.ints(2))), b.ints(1, 3), keepdims=0)


def _all_at_once(b: FunctionBuilder, r: Routed, sizes: Sizes) -> ir.Value:
    """[tokens, hidden]. Every token through every expert: two batched products."""
    # a comparison fuses with what follows, where a scatter is three kernels
    hit = b("Equal", b("Unsqueeze", r.chosen, b.ints(2)), b.constant(range(sizes.experts), "int64"))
    shares = b("Where", hit, b("Unsqueeze", r.weights, b.ints(2)), b.number(0.0))
    weights = b("Transpose", b("ReduceSum", shares, b.ints(1), keepdims=0), perm=[1, 0])
    weights = b("Unsqueeze", weights, b.ints(2))  # [experts, tokens, 1]
    h = b("MatMul", r.x, b("Transpose", r.gate_up, perm=[0, 2, 1]))
    act = b("Mul", _swiglu(b, b.to_float32(h, r.dtype)), weights)
    # an expert that was not chosen must not matter even where it overflows
    act = b("Where", b("Greater", weights, b.number(0.0)), act, b.number(0.0))
    y = b("MatMul", b.from_float32(act, r.dtype), b("Transpose", r.down, perm=[0, 2, 1]))
    return b("ReduceSum", b.to_float32(y, r.dtype), b.ints(0), keepdims=0)


def _swiglu(b: FunctionBuilder, h: ir.Value) -> ir.Value:
    """silu(gate) * up of float32 h [outer, inner, 2*intermediate], gate and up interleaved along the last axis."""
    gate, up = b.outputs("Split", [b("Reshape", h, b.ints(0, 0, -1, 2)), b.ints(1, 1)], 2, axis=3)
    return b("Squeeze", b("Mul", b("Mul", gate, b("Sigmoid", gate)), up), b.ints(3))
