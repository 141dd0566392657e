"""ONNX Runtime's quantised product and lookup as functions of standard operators, for every other runtime."""

from __future__ import annotations

import onnx_ir as ir

from kimi_deploy.ops.block_quantized import dequantized, rounded
from kimi_deploy.ops.flavours import MICROSOFT_DOMAIN
from kimi_deploy.ops.function_builder import FunctionBuilder
from kimi_deploy.quantization.scheme import Scheme

MATMUL, GATHER = "MatMulNBits", "GatherBlockQuantized"


def quantized_functions(scheme: Scheme) -> list[ir.Function]:
    """Both functions for nodes of `scheme`, whose group is settled: bodies are specialised to it."""
    return [_matmul(scheme), _gather(scheme)]


def _settled(scheme: Scheme) -> int:
    assert scheme.group is not None
    return scheme.group


def _zero_points(scheme: Scheme) -> tuple[str, ...]:
    """The input that a function declares only where its nodes have it: onnx's evaluator wants equal numbers."""
    return () if scheme.symmetric else ("zero_points",)


def _matmul(scheme: Scheme) -> ir.Function:
    """A [..., in] times weights [out, in] transposed; levels come as [out, blocks, bytes of a block]."""
    group = _settled(scheme)
    b = FunctionBuilder(("A", "B", "scales", *_zero_points(scheme)))
    a, levels, scales = list(b.inputs.values())[:3]
    rows = b("Reshape", levels, b("Concat", b("Shape", levels, start=0, end=1), b.ints(-1), axis=0))
    weight = dequantized(b, rows, scales, b.inputs.get("zero_points"), scheme.bits, group)
    read = rounded(b, a, group) if scheme.activations == "int8" else a
    y = b("MatMul", read, b("Transpose", weight, perm=[1, 0]))
    integers = dict.fromkeys(("K", "N", "bits", "block_size", "accuracy_level"), ir.AttributeType.INT)
    return b.function(MICROSOFT_DOMAIN, MATMUL, {"Y": y}, integers)


def _gather(scheme: Scheme) -> ir.Function:
    """Rows `indices` (of any shape) of weights [rows, in]."""
    b = FunctionBuilder(("data", "indices", "scales", *_zero_points(scheme)))
    data, indices, scales = list(b.inputs.values())[:3]
    flat = b("Reshape", indices, b.ints(-1))
    levels, chosen_scales = (b("Gather", v, flat, axis=0) for v in (data, scales))
    zeros = b.inputs.get("zero_points")
    chosen_zeros = None if zeros is None else b("Gather", zeros, flat, axis=0)
    rows = dequantized(b, levels, chosen_scales, chosen_zeros, scheme.bits, _settled(scheme))
    shape = b("Concat", b("Shape", indices), b.ints(-1), axis=0)
    names = ("bits", "block_size", "quantize_axis", "gather_axis")
    output = b("Reshape", rows, shape)
    return b.function(MICROSOFT_DOMAIN, GATHER, {"output": output}, dict.fromkeys(names, ir.AttributeType.INT))
