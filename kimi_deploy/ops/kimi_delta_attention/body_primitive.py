"""KimiDeltaAttention in operators that every runtime knows: no convolution, no linear-attention operator.

Chunk form of the delta rule (Yang et al., "Parallelizing Linear Transformers with the Delta Rule over Sequence
Length", with KDA's decay per key). Inside a chunk, with G the inclusive cumulative sum of g:
    A_ij = beta_i sum_d k_id k_jd exp(G_id - G_jd) for j < i,    v' = (I + A)^-1 beta (v - (k e^G) S)
    o = (q e^G) S + tril(sum_d q_id k_jd exp(G_id - G_jd)) v',   S <- e^{G_last} S + (k e^{G_last - G})^T v'
Exponents are taken of sums of g only, all of them <= 0, so that no gate can overflow.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from kimi_deploy.ops.function_builder import FunctionBuilder
from kimi_deploy.ops.kimi_delta_attention.body_parts import DeltaInputs, DeltaSizes, Parts

CHUNK = 16
"""Steps per iteration, a power of two. The tensor of pairs costs CHUNK * head_dim per step and head."""


def _convolution(b: FunctionBuilder, x: ir.Value, weight: ir.Value, past: ir.Value) -> tuple[ir.Value, None]:
    """Windows gathered and summed: no runtime has to be good at a convolution with a group per channel."""
    history = b("Concat", b("Transpose", past, perm=[0, 2, 1]), x, axis=1)
    index = b("Add", b("Unsqueeze", b.positions(x, 1), b.ints(1)), b.positions(weight, 1))  # [sequence, width]
    windows = b("Gather", history, index, axis=1)  # [batch, sequence, width, channels]
    return b("ReduceSum", b("Mul", windows, b("Transpose", weight, perm=[1, 0])), b.ints(2), keepdims=0), None


def _delta_rule(b: FunctionBuilder, x: DeltaInputs, sizes: DeltaSizes) -> tuple[ir.Value, ir.Value]:
    """The recurrence for one step, a Scan over chunks for more."""
    x = x._replace(q=b("Mul", x.q, b.number(sizes.scale)))
    sequence, chunk = b("Shape", x.q, start=1, end=2), b.ints(CHUNK)
    missing = b("Mod", b("Sub", chunk, b("Mod", sequence, chunk)), chunk)
    pads = b("Concat", b.ints(0), missing, axis=0)
    output, present = b.branch(
        b("Squeeze", b("Equal", sequence, b.ints(1))),
        lambda inner: _step(inner, x, sizes),
        lambda inner: _chunks(inner, x, sizes, sequence, pads),
    )
    return output, present


def _step(b: FunctionBuilder, x: DeltaInputs, sizes: DeltaSizes) -> list[ir.Value]:
    """S <- diag(e^g) S;  S <- S + k beta (v - k^T S)^T;  o = q^T S.

    Written so that every shape holds for any number of steps, though the values are right for one only: TensorRT
    checks the shapes of a branch for lengths that never take it.
    """

    def by_head(value: ir.Value, size: int) -> ir.Value:
        return b("Transpose", b("Reshape", value, b.ints(0, 0, sizes.heads, size)), perm=[0, 2, 1, 3])

    q, k, v, g = (by_head(a, sizes.size) for a in (x.q, x.k, x.v, x.g))
    decay = b("Exp", b("ReduceSum", g, b.ints(2), keepdims=1))
    decayed = b("Mul", x.state, _transposed(b, decay))
    delta = b("Mul", b("Sub", v, b("MatMul", k, decayed)), by_head(x.beta, 1))
    present = b("Add", decayed, b("MatMul", _transposed(b, k), delta))
    output = b("Transpose", b("MatMul", q, present), perm=[0, 2, 1, 3])
    return [b("Reshape", output, b.ints(0, 0, sizes.heads * sizes.size)), present]


def _chunks(
    b: FunctionBuilder, x: DeltaInputs, sizes: DeltaSizes, sequence: ir.Value, pads: ir.Value
) -> list[ir.Value]:
    """A Scan over chunks of CHUNK steps, the last one filled up with steps that do nothing."""

    def chunked(value: ir.Value, size: int) -> ir.Value:
        """[chunks, batch, heads, CHUNK, size]"""
        filled = b("Pad", value, pads, b.number(0.0), b.ints(1))
        return b("Transpose", b("Reshape", filled, b.ints(0, -1, CHUNK, sizes.heads, size)), perm=[1, 0, 3, 2, 4])

    inner = b.nested(state="float32", q="float32", k="float32", v="float32", g="float32", beta="float32")
    present, output = _chunk(inner, DeltaInputs(**inner.inputs))
    present, outputs = b.outputs(
        "Scan",
        [x.state, *(chunked(a, sizes.size) for a in (x.q, x.k, x.v, x.g)), chunked(x.beta, 1)],
        2,
        body=inner.graph([present, output], "chunk"),
        num_scan_inputs=5,
    )
    flat = b("Reshape", b("Transpose", outputs, perm=[1, 0, 3, 2, 4]), b.ints(0, -1, sizes.heads * sizes.size))
    return [b("Slice", flat, b.ints(0), sequence, b.ints(1)), present]


def _chunk(b: FunctionBuilder, x: DeltaInputs) -> tuple[ir.Value, ir.Value]:
    """One chunk: q, k, v, g [batch, heads, CHUNK, size], beta [batch, heads, CHUNK, 1]; the new state and o."""
    ones = np.ones((CHUNK, CHUNK))
    # exp(g) is zero in float32 from here on, and an infinite g would make NaN of the sums below
    g = b("Max", x.g, b.number(-104.0))
    between = _sums_between(b, g)  # [batch, heads, i, j, size]
    keys = b("Mul", b("Exp", between), b("Unsqueeze", x.k, b.ints(2)))

    def pairs(rows: ir.Value, mask: np.ndarray) -> ir.Value:
        product = b("ReduceSum", b("Mul", keys, b("Unsqueeze", rows, b.ints(3))), b.ints(-1), keepdims=0)
        return b("Mul", product, b.constant(mask, "float32"))

    lower = b("Mul", pairs(x.k, np.tril(ones, -1)), x.beta)
    reach = pairs(x.q, np.tril(ones))
    growth = b("Exp", b("MatMul", b.constant(np.tril(ones), "float32"), g))
    seen = b("MatMul", b("Mul", x.k, growth), x.state)
    delta = b("MatMul", _inverse(b, lower), b("Mul", b("Sub", x.v, seen), x.beta))
    output = b("Add", b("MatMul", b("Mul", x.q, growth), x.state), b("MatMul", reach, delta))

    last = b.ints(CHUNK - 1), b.ints(CHUNK), b.ints(2)
    written = b("Squeeze", b("Slice", keys, *last), b.ints(2))
    kept = b("Mul", x.state, _transposed(b, b("Slice", growth, *last)))
    return b("Add", kept, b("MatMul", _transposed(b, written), delta)), output


def _sums_between(b: FunctionBuilder, g: ir.Value) -> ir.Value:
    """G_i - G_j = sum of g over j < t <= i, zero for i <= j: [batch, heads, i, j, size].

    Summed as it stands: as a difference of two cumulative sums, steps after a strong one would lose their digits.
    """
    i, j, t = np.arange(CHUNK)[:, None, None], np.arange(CHUNK)[None, :, None], np.arange(CHUNK)
    inside = ((j < t) & (t <= i)).reshape(CHUNK * CHUNK, CHUNK)
    shape = b("Concat", b("Shape", g, start=0, end=2), b.ints(CHUNK, CHUNK, -1), axis=0)
    return b("Reshape", b("MatMul", b.constant(inside, "float32"), g), shape)


def _inverse(b: FunctionBuilder, lower: ir.Value) -> ir.Value:
    """(I + lower)^-1 for a strictly lower triangular matrix, by 2 x 2 blocks of doubling size.

    [[P, 0], [B, Q]]^-1 = [[P^-1, 0], [-Q^-1 B P^-1, Q^-1]]: a masked matrix holds all blocks B of one level. Powers
    of `lower` would do with fewer steps, but on repeated keys they cancel binomial coefficients.
    """
    row, column = np.arange(CHUNK)[:, None], np.arange(CHUNK)[None, :]
    inverse = b.constant(np.eye(CHUNK), "float32")
    block = 1
    while block < CHUNK:
        at = (row // block % 2 == 1) & (column // block == row // block - 1)
        corner = b("Mul", lower, b.constant(at, "float32"))
        # the identity on both sides of the first level changes nothing
        update = corner if block == 1 else b("MatMul", b("MatMul", inverse, corner), inverse)
        inverse = b("Sub", inverse, update)
        block *= 2
    return inverse


def _transposed(b: FunctionBuilder, value: ir.Value) -> ir.Value:
    """The last two of four axes exchanged."""
    return b("Transpose", value, perm=[0, 1, 3, 2])


PRIMITIVE = Parts(_convolution, _delta_rule, list)
