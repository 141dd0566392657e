"""ONNX nodes for weights quantised by blocks, in standard operators: for the bodies that any runtime can run."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from kimi_deploy.ops.function_builder import FunctionBuilder


def unpacked(b: FunctionBuilder, packed: ir.Value, bits: int, count: ir.Value) -> ir.Value:
    """uint8 [rows, count] of packed rows [rows, bytes]; `count` is int64 [1]."""
    if bits == 8:
        return packed
    low = b("BitwiseAnd", packed, b.constant(15, "uint8"))
    high = b("BitShift", packed, b.constant(4, "uint8"), direction="RIGHT")
    pairs = b("Concat", b("Unsqueeze", low, b.ints(2)), b("Unsqueeze", high, b.ints(2)), axis=2)
    # an odd count leaves half a byte over
    return b("Slice", b("Reshape", pairs, b.ints(0, -1)), b.ints(0), count, b.ints(1))


def dequantized(
    b: FunctionBuilder, levels: ir.Value, scales: ir.Value, zero_points: ir.Value | None, bits: int, block_size: int
) -> ir.Value:
    """float32 [rows, in] of packed levels [rows, in*bits/8], scales [rows, in/block_size] and packed zero points."""
    blocks = b("Shape", scales, start=1, end=2)
    values = unpacked(b, levels, bits, b("Mul", blocks, b.ints(block_size)))
    if zero_points is None:
        middle = ir.tensor(np.array([1 << (bits - 1)], np.uint8))
        zeros = b("ConstantOfShape", b("Shape", scales), value=middle)
    else:
        zeros = unpacked(b, zero_points, bits, blocks)
    return b("DequantizeLinear", values, scales, zeros, axis=1, block_size=block_size)


def rounded(b: FunctionBuilder, x: ir.Value, block_size: int) -> ir.Value:
    """float32 x [..., in] with every block rounded to 127 steps of its largest magnitude, as the contract says."""
    blocks = b("Reshape", x, b.ints(-1, block_size))
    scale = b("Div", b("ReduceMax", b("Abs", blocks), b.ints(1), keepdims=1), b.number(127.0))
    inverse = b("Where", b("Greater", scale, b.number(0.0)), b("Reciprocal", scale), b.number(0.0))
    return b("Reshape", b("Mul", b("Round", b("Mul", blocks, inverse)), scale), b("Shape", x))
