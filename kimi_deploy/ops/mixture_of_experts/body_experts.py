"""The experts of MixtureOfExperts: ONNX Runtime's fused kernel, or plain products."""

from __future__ import annotations

from typing import NamedTuple

import onnx_ir as ir

from kimi_deploy.contract import Dtype
from kimi_deploy.ops.flavours import MICROSOFT_DOMAIN
from kimi_deploy.ops.function_builder import FunctionBuilder

UNCHOSEN = -1e30
"""Log weight of an expert that was not chosen: its softmax is exactly zero."""
SMALLEST_NORMAL = 1.1754944e-38
"""Floor under a weight's logarithm: one that underflowed to zero must still beat UNCHOSEN."""
CACHED_BYTES = 16 << 20
"""Weights of one token's experts that a processor's last cache is taken to hold."""
BLOCKS = 4
"""Blocks of rows that an expert is gathered in, so that several threads share the copy."""
GATE_UP_AT_ONCE, DOWN_AT_ONCE = 2, 4
"""Experts whose weights go through the caches together: fewer starve the threads, more spill into memory."""


class Sizes(NamedTuple):
    """The op's attributes that the experts need."""

    experts: int
    top_k: int
    intermediate: int


class Routed(NamedTuple):
    """Operands of the experts.

    x [batch, sequence, hidden], gate_up [experts, 2*intermediate, hidden] with gate and up rows interleaved and down
    [experts, hidden, intermediate] of dtype `dtype`; chosen int64 and their final weights float32 [tokens, top_k].
    """

    x: ir.Value
    gate_up: ir.Value
    down: ir.Value
    chosen: ir.Value
    weights: ir.Value
    dtype: Dtype


def fused(b: FunctionBuilder, r: Routed, sizes: Sizes) -> ir.Value:
    """ONNX Runtime's MoE; for a single token with small experts, gathered products. Returns float32 like x.

    The kernel gives each thread a fixed range of experts, so that a token's few are shared out unevenly. Weights that
    do not stay in a cache are cheaper to read once than to gather.
    """
    r = r._replace(
        x=b.to_float32(r.x, r.dtype),
        gate_up=b.to_float32(r.gate_up, r.dtype),
        down=b.to_float32(r.down, r.dtype),
        dtype="float32",
    )
    hidden = b("Shape", r.gate_up, start=2, end=3)  # a constant, as the weights are; so is all that follows from it
    small = b("LessOrEqual", hidden, b.ints(CACHED_BYTES // (4 * 3 * sizes.top_k * sizes.intermediate)))
    whole_blocks = b("Equal", b("Mod", hidden, b.ints(BLOCKS)), b.ints(0))
    # how many choices make a single token, or a number that never occurs
    choices = sizes.top_k if 2 * sizes.intermediate % BLOCKS == 0 else -1
    single = b("Squeeze", b("Where", b("And", small, whole_blocks), b.ints(choices), b.ints(-1)))
    return b.branch(
        b("Equal", b("Size", r.chosen), single),
        lambda inner: [_few_at_once(inner, r, sizes)],
        lambda inner: [_kernel(inner, r, sizes)],
    )[0]


def _few_at_once(b: FunctionBuilder, r: Routed, sizes: Sizes) -> ir.Value:
    """A single token's experts, each few gathered and used before the next.

    Gathering reads, writes and reads again. Few experts at a time go through the same small buffers, which stay in
    the processor's caches, so that only the first reading is of memory. A decode step of "mini-62m" on two threads
    takes 6.8 ms so, 7.6 with all experts gathered at once.
    """
    column = b("Reshape", r.x, b.ints(-1, 1))
    # zero, but not a constant: a runtime that folds constants would keep a reshaped copy of every expert
    zero = b("Sub", b("Size", r.chosen), b.constant(sizes.top_k, "int64"))
    count, width = sizes.experts * BLOCKS, sizes.intermediate
    gate_up = b("Reshape", r.gate_up, b("Add", b.ints(count, 2 * width // BLOCKS, -1), zero))
    down = b("Reshape", r.down, b("Add", b.ints(count, -1, width), zero))
    first = b("Mul", b("Reshape", r.chosen, b.ints(-1, 1)), b.constant(BLOCKS, "int64"))
    numbers = b("Add", first, b.ints(*range(BLOCKS)))
    h = [b("MatMul", b("Gather", gate_up, n, axis=0), column) for n in _runs(b, numbers, sizes.top_k, GATE_UP_AT_ONCE)]
    act = swiglu(b, b("Reshape", b("Concat", *h, axis=0), b.ints(sizes.top_k, -1, 1)), "float32")
    y = [
        b("MatMul", b("Gather", down, n, axis=0), b("Unsqueeze", a, b.ints(1)))
        for n, a in zip(
            _runs(b, numbers, sizes.top_k, DOWN_AT_ONCE), _runs(b, act, sizes.top_k, DOWN_AT_ONCE), strict=True
        )
    ]
    summed = b("Reshape", b("Concat", *y, axis=0) if len(y) > 1 else y[0], b.ints(sizes.top_k, -1))
    # one token: its weights are a row, and the weighted sum a product
    return b("Unsqueeze", b("MatMul", r.weights, summed), b.ints(0))


def _runs(b: FunctionBuilder, value: ir.Value, size: int, at_once: int) -> list[ir.Value]:
    """Runs of `at_once` of the `size` entries of the first axis; the last may be shorter."""
    runs = [min(at_once, size - start) for start in range(0, size, at_once)]
    return [value] if len(runs) == 1 else list(b.outputs("Split", [value, b.ints(*runs)], len(runs), axis=0))


def _kernel(b: FunctionBuilder, r: Routed, sizes: Sizes) -> ir.Value:
    """com.microsoft::MoE weighs by a softmax over its router input.

    The softmax of the logarithms of the chosen weights, with all others at minus infinity, is each weight over their
    sum; the sum is multiplied in afterwards.
    """
    logs = b("Log", b("Max", r.weights, b.number(SMALLEST_NORMAL)))
    mean = b(
        "MoE",
        r.x,
        spread(b, r.chosen, logs, sizes.experts, UNCHOSEN),
        r.gate_up,
        None,
        r.down,
        domain=MICROSOFT_DOMAIN,
        k=sizes.top_k,
        activation_type="swiglu",
        swiglu_fusion=1,
        activation_alpha=1.0,
        activation_beta=0.0,
        normalize_routing_weights=1,
    )
    total = b("ReduceSum", r.weights, b.ints(-1), keepdims=1)
    by_token = b("Concat", b("Shape", r.x, start=0, end=2), b.ints(1), axis=0)
    return b("Mul", mean, b("Reshape", total, by_token))


def fused_helpers() -> list[ir.Function]:
    """ONNX Runtime's MoE for runtimes that do not have it, as `fused` calls it: bias-free interleaved SwiGLU."""
    b = FunctionBuilder(("input", "router_probs", "fc1_experts_weights", "fc1_experts_bias", "fc2_experts_weights"))
    x, router, gate_up, _, down = b.inputs.values()
    output = every_expert(b, x, gate_up, down, b("Softmax", router, axis=-1), "float32")
    attributes = {
        "k": ir.AttributeType.INT,
        "activation_type": ir.AttributeType.STRING,
        "swiglu_fusion": ir.AttributeType.INT,
        "activation_alpha": ir.AttributeType.FLOAT,
        "activation_beta": ir.AttributeType.FLOAT,
        "normalize_routing_weights": ir.AttributeType.INT,
    }
    return [b.function(MICROSOFT_DOMAIN, "MoE", {"output": output}, attributes)]


def plain(b: FunctionBuilder, r: Routed, sizes: Sizes) -> ir.Value:
    """Products only, float32 like x.

    Few tokens: a Scan over tokens that gathers each one's experts. Many: a Scan over experts, every token through
    every expert.
    """
    few = few_tokens(sizes)

    def dense(inner: FunctionBuilder) -> list[ir.Value]:
        by_expert = spread(inner, r.chosen, r.weights, sizes.experts, 0.0)
        return [every_expert(inner, r.x, r.gate_up, r.down, by_expert, r.dtype)]

    if not few:
        return dense(b)[0]
    return b.branch(
        b("Squeeze", b("LessOrEqual", b("Shape", r.chosen, start=0, end=1), b.ints(few))),
        lambda inner: [_chosen_experts(inner, r)],
        dense,
    )[0]


def few_tokens(sizes: Sizes) -> int:
    """Tokens up to which the chosen experts are gathered.

    The bound is where gathering, which reads, writes and reads again, moves more than all experts weigh.
    """
    return sizes.experts // (3 * sizes.top_k) or int(sizes.top_k < sizes.experts)


def spread(b: FunctionBuilder, chosen: ir.Value, values: ir.Value, experts: int, other: float) -> ir.Value:
    """[tokens, experts] with `values` [tokens, top_k] at the chosen experts and `other` elsewhere."""
    shape = b("Concat", b("Shape", chosen, start=0, end=1), b.ints(experts), axis=0)
    fill = b("ConstantOfShape", shape, value=ir.tensor([other], dtype=ir.DataType.FLOAT))
    return b("ScatterElements", fill, chosen, values, axis=1)


def _one_token(b: FunctionBuilder, r: Routed, column: ir.Value, chosen: ir.Value, weights: ir.Value) -> ir.Value:
    """Output [hidden, 1] for one token's column [hidden, 1], chosen [top_k] and weights of top_k elements."""
    h = b("MatMul", b("Gather", r.gate_up, chosen, axis=0), column)  # [top_k, 2*intermediate, 1]
    act = b.from_float32(swiglu(b, h, r.dtype), r.dtype)
    y = b.to_float32(b("MatMul", b("Gather", r.down, chosen, axis=0), act), r.dtype)
    return b("ReduceSum", b("Mul", y, b("Reshape", weights, b.ints(-1, 1, 1))), b.ints(0), keepdims=0)


def _chosen_experts(b: FunctionBuilder, r: Routed) -> ir.Value:
    """A Scan over tokens: only the chosen experts' weights are read."""
    hidden = b("Shape", r.x, start=2, end=3)
    columns = b("Reshape", r.x, b("Concat", b.ints(-1), hidden, b.ints(1), axis=0))
    inner = b.nested(state="float32", column=r.dtype, chosen="int64", weights="float32")
    state, column, chosen, weights = inner.inputs.values()
    row = _one_token(inner, r, column, chosen, weights)
    # TensorRT does not import a Scan without a state
    body = inner.graph([inner("Identity", state), row], "token")
    _, rows = b.outputs("Scan", [b.number(0.0), columns, r.chosen, r.weights], 2, body=body, num_scan_inputs=3)
    return b("Reshape", rows, b("Shape", r.x))


def every_expert(
    b: FunctionBuilder, x: ir.Value, gate_up: ir.Value, down: ir.Value, weights: ir.Value, dtype: Dtype
) -> ir.Value:
    """A Scan over experts; weights [tokens, experts], zero where not chosen. Nothing is as large as all experts."""
    hidden = b("Shape", x, start=2, end=3)
    rows = b("Reshape", x, b("Concat", b.ints(-1), hidden, axis=0))
    zero = b("ConstantOfShape", b("Shape", rows), value=ir.tensor([0.0], dtype=ir.DataType.FLOAT))
    by_expert = b("Unsqueeze", b("Transpose", weights, perm=[1, 0]), b.ints(2))  # [experts, tokens, 1]
    inner = b.nested(sum="float32", gate_up=dtype, down=dtype, weight="float32")
    total, gate_up_one, down_one, weight = inner.inputs.values()
    act = swiglu(inner, inner("MatMul", rows, inner("Transpose", gate_up_one, perm=[1, 0])), dtype)
    act = inner("Mul", inner("Squeeze", act, inner.ints(2)), weight)
    # an expert that was not chosen must not matter even where it overflows
    act = inner("Where", inner("Greater", weight, inner.number(0.0)), act, inner.number(0.0))
    y = inner("MatMul", inner.from_float32(act, dtype), inner("Transpose", down_one, perm=[1, 0]))
    added = inner("Add", total, inner.to_float32(y, dtype))
    total = b("Scan", zero, gate_up, down, by_expert, body=inner.graph([added], "expert"), num_scan_inputs=3)
    return b("Reshape", total, b("Shape", x))


def swiglu(b: FunctionBuilder, h: ir.Value, dtype: Dtype) -> ir.Value:
    """silu(gate) * up in float32 [rows, intermediate, 1]; h [rows, 2*intermediate, ...], gate and up interleaved."""
    gate, up = b.outputs("Split", [b("Reshape", b.to_float32(h, dtype), b.ints(0, -1, 2)), b.ints(1, 1)], 2, axis=2)
    return b("Mul", b("Mul", gate, b("Sigmoid", gate)), up)
