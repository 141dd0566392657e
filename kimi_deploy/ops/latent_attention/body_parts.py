"""What the flavours of LatentAttention's body do differently: writing the cache and attending over it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from kimi_deploy.ops.function_builder import FunctionBuilder
from kimi_deploy.ops.latent_attention.body_tiled import attend_past_in_tiles, past_is_long
from kimi_deploy.ops.latent_attention.operands import MASKED, Operands, Sizes


@dataclass(frozen=True)
class Parts:
    """What a flavour brings to the body.

    `write(b, past, rows, position, start)`: `past` with rows [batch, sequence, latent] at `position`, a run of
    consecutive slots from `start` [batch].
    `attend(b, operands)`: [batch, heads, sequence, value] of dtype `compute`.
    `helpers`: functions that `attend` calls.
    `float32`: whether everything is cast to float32 first, for kernels that exist in it alone.
    """

    write: Callable[[FunctionBuilder, ir.Value, ir.Value, ir.Value, ir.Value], ir.Value]
    attend: Callable[[FunctionBuilder, Operands], ir.Value]
    helpers: Sequence[Callable[[Sizes], ir.Function]] = ()
    float32: bool = False


def scatter_in_place(
    b: FunctionBuilder, past: ir.Value, rows: ir.Value, position: ir.Value, start: ir.Value
) -> ir.Value:
    """TensorScatter: ONNX Runtime writes into the bound buffer when past and present are the same one."""
    return b("TensorScatter", past, rows, start, axis=1)


def scatter_copy(b: FunctionBuilder, past: ir.Value, rows: ir.Value, position: ir.Value, start: ir.Value) -> ir.Value:
    """ScatterND: TensorRT-RTX takes TensorScatter only with a rank-4 cache that is a network input itself."""
    row = b("Expand", b("Unsqueeze", b.positions(past, 0), b.ints(1, 2)), b("Shape", position))
    return b("ScatterND", past, b("Concat", row, position, axis=2), rows)


def attend_in_the_cheapest_form(b: FunctionBuilder, x: Operands) -> ir.Value:
    """Expanded for long prefill, in tiles where the cache is longer still; else absorbed, and without the copy that
    cutting the cache costs where it is full."""

    def expanded(inner: FunctionBuilder) -> list[ir.Value]:
        tiled = past_is_long(inner, x)
        whole = inner.branch(tiled, lambda i: [attend_past_in_tiles(i, x)], lambda i: [_expanded(i, _cut(i, x))])
        return list(whole)

    def absorbed(inner: FunctionBuilder) -> list[ir.Value]:
        fits = inner("Squeeze", inner("Equal", x.total, inner("Shape", x.cache, start=1, end=2)))
        whole = inner.branch(fits, lambda i: [_absorbed(i, x)], lambda i: [_absorbed(i, _cut(i, x))])
        return list(whole)

    if x.sizes.expand_from is None:
        return absorbed(b)[0]
    long = b("GreaterOrEqual", b("Shape", x.query, start=2, end=3), b.ints(x.sizes.expand_from))
    return b.branch(b("Squeeze", long), expanded, absorbed)[0]


def attend_capacity(b: FunctionBuilder, x: Operands) -> ir.Value:
    """Absorbed, over the whole capacity: shapes depend on no value, as an engine wants it."""
    return _absorbed(b, x)


def attend_operator(b: FunctionBuilder, x: Operands) -> ir.Value:
    """Absorbed, as the standard Attention operator with one key-value head and an explicit mask."""
    x = _cut(b, x)
    cache = b("Unsqueeze", b.convert(x.cache, x.stored, x.compute), b.ints(1))
    attended = b(
        "Attention",
        _absorbed_query(b, x),
        cache,
        cache,
        _seen(b, x),
        scale=1.0,
        softmax_precision=ir.DataType.FLOAT.value,
    )
    return _values(b, attended, x)


def _cut(b: FunctionBuilder, x: Operands) -> Operands:
    """With the cache up to the longest row's valid tokens."""
    return x._replace(cache=b("Slice", x.cache, b.ints(0), x.total, b.ints(1)))


def _seen(b: FunctionBuilder, x: Operands) -> ir.Value:
    """bool [batch, 1, sequence, length]: a step sees its own slot and those before."""
    return b("Unsqueeze", b("LessOrEqual", b.positions(x.cache, 1), x.position), b.ints(1))


def _bias(b: FunctionBuilder, x: Operands) -> ir.Value:
    """`_seen` as float32 to add to the scores."""
    return b("Where", _seen(b, x), b.number(0.0), b.number(MASKED))


def _absorbed_query(b: FunctionBuilder, x: Operands) -> ir.Value:
    """[batch, heads, sequence, rank + rope]: the key weight applied to the query instead of the cache."""
    nope, rope = b.outputs("Split", [x.query, b.ints(x.sizes.nope, x.sizes.rope)], 2, axis=3)
    return b("Concat", b("MatMul", nope, x.key_weight), rope, axis=3)


def _values(b: FunctionBuilder, attended: ir.Value, x: Operands) -> ir.Value:
    """The value weight applied to attended latents [batch, heads, sequence, rank + rope].

    The cache served as the value as it is: its last columns are cut from this small result, not from the cache.
    """
    latents = b("Slice", attended, b.ints(0), b.ints(x.sizes.rank), b.ints(3))
    return b("MatMul", latents, b("Transpose", x.value_weight, perm=[0, 2, 1]))


def _absorbed(b: FunctionBuilder, x: Operands) -> ir.Value:
    """One matrix for the keys and values of all heads: heads and steps are rows of one product. Softmax in float32."""
    cache = b.convert(x.cache, x.stored, x.compute)
    query = _absorbed_query(b, x)
    rows = b("Reshape", query, b.ints(0, -1, x.sizes.rank + x.sizes.rope))
    scores = b("MatMul", rows, b("Transpose", cache, perm=[0, 2, 1]))
    by_head = b("Concat", b("Shape", query, start=0, end=3), b.ints(-1), axis=0)
    masked = b("Add", b("Reshape", b.to_float32(scores, x.compute), by_head), _bias(b, x))
    weights = b("Reshape", b("Softmax", masked, axis=-1), b("Shape", scores))
    attended = b("MatMul", b.from_float32(weights, x.compute), cache)
    return _values(b, b("Reshape", attended, b("Shape", query)), x)


def _expanded(b: FunctionBuilder, x: Operands) -> ir.Value:
    """Keys and values of every head made from the cache."""
    cache = b("Unsqueeze", b.convert(x.cache, x.stored, x.compute), b.ints(1))
    latents, shared = b.outputs("Split", [cache, b.ints(x.sizes.rank, x.sizes.rope)], 2, axis=3)
    keys = b("MatMul", latents, b("Transpose", x.key_weight, perm=[0, 2, 1]))  # [batch, heads, length, nope]
    values = b("MatMul", latents, b("Transpose", x.value_weight, perm=[0, 2, 1]))
    shared = b("Expand", shared, b("Concat", b("Shape", keys, start=0, end=3), b.ints(x.sizes.rope), axis=0))
    keys = b("Transpose", b("Concat", keys, shared, axis=3), perm=[0, 1, 3, 2])
    scores = b("Add", b.to_float32(b("MatMul", x.query, keys), x.compute), _bias(b, x))
    return b("MatMul", b.from_float32(b("Softmax", scores, axis=-1), x.compute), values)
