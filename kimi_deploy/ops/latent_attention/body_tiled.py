"""Attention of a long prefill over a cache that is longer still: ONNX Runtime's tiled kernel, which keeps no scores.

com.microsoft::MultiHeadAttention attends tile by tile when it is given neither mask nor cache. Every step sees all that
was cached before the call, so that part needs no mask; what the steps see of each other has one, and is small.
"""

from __future__ import annotations

import onnx_ir as ir

from kimi_deploy.ops.flavours import MICROSOFT_DOMAIN
from kimi_deploy.ops.function_builder import FunctionBuilder
from kimi_deploy.ops.latent_attention.operands import MASKED, Operands, Sizes

KERNEL = "MultiHeadAttention"


def past_is_long(b: FunctionBuilder, x: Operands) -> ir.Value:
    """bool scalar: every row has cached the same number of tokens, at least as many as it is given now."""
    shortest = b("ReduceMin", x.past, keepdims=0)
    same = b("Equal", shortest, b("ReduceMax", x.past, keepdims=0))
    steps = b("Squeeze", b("Shape", x.query, start=2, end=3))
    return b("And", same, b("GreaterOrEqual", shortest, steps))


def attend_past_in_tiles(b: FunctionBuilder, x: Operands) -> ir.Value:
    """[batch, heads, sequence, value], float32, where `past_is_long` holds.

    Two softmaxes over parts of one row are joined by the sums of their exponentials, and the kernel returns none. So
    the past gets one row more, whose score is the largest one of the step's own part and whose value is the weight it
    got: p = E / (past + E), E being the exponential of that score. With own = sum of exponentials over E (at least 1)
    and own_values = their sum with the values, the whole is

        (past_values + p own_values) / (1 - p + p own)

    where the denominator is never below 1 - p + p = 1, and a p that underflows leaves the past alone, as it should.
    """
    sizes = x.sizes
    past = b("ReduceMin", x.past, keepdims=1)
    end = b("Add", past, b("Shape", x.query, start=2, end=3))
    own_cache = b("Slice", x.cache, past, end, b.ints(1))
    largest, own, own_values = _own_part(b, x, own_cache)

    # the added row is all zeros, but for a last column that only it has
    rows = b("Pad", b("Slice", x.cache, b.ints(0), past, b.ints(1)), b.ints(0, 0, 0, 0, 1, 0))
    flag = b("Cast", b("Equal", b.positions(rows, 1), past), to=ir.DataType.FLOAT.value)
    keys, values = _heads(b, x, rows, b("Reshape", flag, b.ints(1, -1, 1, 1)))
    query = b("Transpose", b("Concat", x.query, largest, axis=3), perm=[0, 2, 1, 3])
    query = b("Reshape", query, b.ints(0, 0, sizes.heads * (sizes.nope + sizes.rope + 1)))
    keys, values = (
        b("Reshape", part, b.ints(0, 0, sizes.heads * (size + 1)))
        for part, size in ((keys, sizes.nope + sizes.rope), (values, sizes.value))
    )
    attended = b(KERNEL, query, keys, values, domain=MICROSOFT_DOMAIN, num_heads=sizes.heads, scale=1.0)
    attended = b("Reshape", attended, b.ints(0, 0, sizes.heads, sizes.value + 1))
    past_values, p = b.outputs(
        "Split", [b("Transpose", attended, perm=[0, 2, 1, 3]), b.ints(sizes.value, 1)], 2, axis=3
    )
    one = b.number(1.0)
    whole = b("Add", one, b("Mul", p, b("Sub", own, one)))
    return b("Div", b("Add", past_values, b("Mul", p, own_values)), whole)


def _own_part(b: FunctionBuilder, x: Operands, cache: ir.Value) -> tuple[ir.Value, ir.Value, ir.Value]:
    """Of what the steps see of each other: largest score, sum of exponentials over its own, and that with values."""
    keys, values = (b("Transpose", part, perm=[0, 2, 1, 3]) for part in _heads(b, x, cache))
    step = b.positions(x.query, 2)
    seen = b("LessOrEqual", step, b("Unsqueeze", step, b.ints(1)))
    scores = b("MatMul", x.query, b("Transpose", keys, perm=[0, 1, 3, 2]))
    scores = b("Where", seen, scores, b.number(MASKED))
    largest = b("ReduceMax", scores, b.ints(-1), keepdims=1)
    weights = b("Exp", b("Sub", scores, largest))
    return largest, b("ReduceSum", weights, b.ints(-1), keepdims=1), b("MatMul", weights, values)


def _heads(
    b: FunctionBuilder, x: Operands, cache: ir.Value, column: ir.Value | None = None
) -> tuple[ir.Value, ir.Value]:
    """Keys and values [batch, length, heads, ...] of all heads, with `column` [1, length, 1, 1] as their last."""
    sizes = x.sizes
    latents, shared = b.outputs(
        "Split", [b.convert(cache, x.stored, x.compute), b.ints(sizes.rank, sizes.rope)], 2, axis=2
    )
    keys, values = (
        b(
            "Reshape",
            b("MatMul", latents, b("Transpose", b("Reshape", weight, b.ints(-1, sizes.rank)), perm=[1, 0])),
            b.ints(0, 0, sizes.heads, size),
        )
        for weight, size in ((x.key_weight, sizes.nope), (x.value_weight, sizes.value))
    )
    rows = b("Shape", keys, start=0, end=3)
    shared = b("Expand", b("Unsqueeze", shared, b.ints(2)), b("Concat", rows, b.ints(sizes.rope), axis=0))
    if column is None:
        return b("Concat", keys, shared, axis=3), values
    column = b("Expand", column, b("Concat", rows, b.ints(1), axis=0))
    return b("Concat", keys, shared, column, axis=3), b("Concat", values, column, axis=3)


def kernel_helper(sizes: Sizes) -> ir.Function:
    """ONNX Runtime's MultiHeadAttention for runtimes that do not have it, as it is called here: scale 1, no mask."""
    b = FunctionBuilder(("query", "key", "value"))
    query, keys, values = b.inputs.values()
    query, keys, values = (
        b("Transpose", b("Reshape", part, b.ints(0, 0, sizes.heads, -1)), perm=[0, 2, 1, 3])
        for part in (query, keys, values)
    )
    scores = b("MatMul", query, b("Transpose", keys, perm=[0, 1, 3, 2]))
    output = b("Transpose", b("MatMul", b("Softmax", scores, axis=-1), values), perm=[0, 2, 1, 3])
    attributes = {"num_heads": ir.AttributeType.INT, "scale": ir.AttributeType.FLOAT}
    return b.function(MICROSOFT_DOMAIN, KERNEL, {"output": b("Reshape", output, b.ints(0, 0, -1))}, attributes)
