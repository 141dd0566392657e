"""ONNX function body of KimiDeltaAttention: what the flavours share; the convolution and the delta rule differ."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import onnx_ir as ir

from kimi_deploy.contract import Dtype
from kimi_deploy.ops.flavours import Flavour, check_flavour
from kimi_deploy.ops.function_builder import FunctionBuilder, op_builder, op_function
from kimi_deploy.ops.kimi_delta_attention import body_fused, body_primitive
from kimi_deploy.ops.kimi_delta_attention.body_parts import DeltaInputs, DeltaSizes, Parts
from kimi_deploy.ops.kimi_delta_attention.spec import L2_NORM_EPS, SPEC
from kimi_deploy.ops.spec import AttributeValue

_PARTS: dict[Flavour, Parts] = {
    "ort": body_fused.ORT,
    "onnx": body_fused.ONNX,
    "primitive": body_primitive.PRIMITIVE,
}


def body(flavour: Flavour, attributes: Mapping[str, AttributeValue], dtype: Dtype) -> list[ir.Function]:
    """Functions of one flavour for nodes with these attributes, the op's own last.

    Padding may hold NaN: every value a padded step could spoil is replaced before use, and its decay and writing
    strength are zero, so that the state passes through it unchanged (a zero may lose its sign). Computes in float32
    whatever `dtype` is.
    Raises UsageError on an unknown flavour and ContractError on attributes that are not the op's.
    """
    SPEC.check_attributes(attributes)
    parts = _PARTS[check_flavour(flavour)]
    b = op_builder(SPEC)
    x = dict(b.inputs)
    x["rate"] = _rate(b, attributes)
    x["conv_weight"], x["norm_weight"] = (b.to_float32(x[name], dtype) for name in ("conv_weight", "norm_weight"))
    x["lengths"] = b("Unsqueeze", b("Cast", x["sequence_lengths"], to=ir.DataType.INT64.value), b.ints(1, 2))
    if not parts.unpadded_apart:
        output, present_conv, present_state = _padded(b, x, parts, attributes, dtype)
    else:
        # a call without padding, which every decode step of one sequence is, needs half the nodes
        shortest = b("ReduceMin", x["lengths"], b.ints(1, 2), keepdims=0)
        shortest = b("ReduceMin", shortest, b.ints(0), keepdims=1)
        full = b("Equal", b("Shape", x["qkv"], start=1, end=2), shortest)
        output, present_conv, present_state = b.branch(
            full,
            lambda inner: _unpadded(inner, x, parts, attributes, dtype),
            lambda inner: _padded(inner, x, parts, attributes, dtype),
        )
        # a branch gives float32
        present_conv = b.from_float32(present_conv, dtype)
    outputs = [b.from_float32(output, dtype), present_conv, present_state]
    return [*parts.helpers(), op_function(b, SPEC, outputs)]


def _padded(
    b: FunctionBuilder,
    x: Mapping[str, ir.Value],
    parts: Parts,
    attributes: Mapping[str, AttributeValue],
    dtype: Dtype,
) -> list[ir.Value]:
    """Output in float32 and both new states where rows may end early."""
    lengths, past = x["lengths"], x["past_conv_state"]
    valid = b("Less", b("Unsqueeze", b.positions(x["qkv"], 1), b.ints(1)), lengths)
    zero = b.number(0.0)

    def masked(value: ir.Value) -> ir.Value:
        return b("Where", valid, value, zero)

    history = b("Concat", b("Transpose", past, perm=[0, 2, 1]), x["qkv"], axis=1)
    # from the weight's shape, which is a constant where the state's has a dynamic batch
    width = b("Squeeze", b("Shape", x["conv_weight"], start=1, end=2))
    one = b.constant(1, "int64")
    columns = b("Range", b.constant(0, "int64"), b("Sub", width, one), one)
    newest = b("Add", lengths, b("Unsqueeze", columns, b.ints(1)))
    present_conv = b("Transpose", b("GatherND", history, newest, batch_dims=1), perm=[0, 2, 1])
    if parts.unpadded_apart:
        present_conv = b.to_float32(present_conv, dtype)

    mixed, _ = parts.convolution(b, masked(b.to_float32(x["qkv"], dtype)), x["conv_weight"], b.to_float32(past, dtype))
    output, present_state = _mix(b, x, mixed, parts, attributes, dtype, masked)
    return [output, present_conv, present_state]


def _unpadded(
    b: FunctionBuilder,
    x: Mapping[str, ir.Value],
    parts: Parts,
    attributes: Mapping[str, AttributeValue],
    dtype: Dtype,
) -> list[ir.Value]:
    """As `_padded` where every row takes every step; all in float32."""
    qkv, past = (b.to_float32(x[name], dtype) for name in ("qkv", "past_conv_state"))
    mixed, present_conv = parts.convolution(b, qkv, x["conv_weight"], past)
    assert present_conv is not None
    output, present_state = _mix(b, x, mixed, parts, attributes, dtype, lambda value: value)
    return [output, present_conv, present_state]


def _mix(
    b: FunctionBuilder,
    x: Mapping[str, ir.Value],
    mixed: ir.Value,
    parts: Parts,
    attributes: Mapping[str, AttributeValue],
    dtype: Dtype,
    masked: Callable[[ir.Value], ir.Value],
) -> tuple[ir.Value, ir.Value]:
    """What follows the convolution: output in float32 and the new recurrent state."""
    heads, size = int(attributes["num_heads"]), int(attributes["head_dim"])
    mixed = b("Mul", mixed, b("Sigmoid", mixed))
    qk, v = b.outputs("Split", [mixed, b.ints(2 * heads * size, heads * size)], 2, axis=2)
    # x / sqrt(sum x^2 + eps) is an RMS norm with weight size^-1/2 and epsilon eps / size
    unit = b.constant([size**-0.5] * size, "float32")
    qk = b("Reshape", qk, b.ints(0, 0, 2 * heads, size))
    qk = b("Reshape", b("RMSNormalization", qk, unit, axis=-1, epsilon=L2_NORM_EPS / size), b.ints(0, 0, -1))
    q, k = b.outputs("Split", [qk, b.ints(*[heads * size] * 2)], 2, axis=2)
    g = masked(_log_decay(b, x, attributes, dtype))
    beta = masked(b("Sigmoid", b.to_float32(x["beta"], dtype)))
    inputs = DeltaInputs(q, k, v, g, beta, x["past_recurrent_state"])
    o, present_state = parts.delta_rule(b, inputs, DeltaSizes(heads, size, float(attributes["scale"])))
    by_head = b("Reshape", o, b.ints(0, 0, heads, size))
    normed = b("RMSNormalization", by_head, x["norm_weight"], axis=-1, epsilon=float(attributes["norm_eps"]))
    gate = b("Sigmoid", b.to_float32(x["output_gate"], dtype))
    return masked(b("Mul", b("Reshape", normed, b.ints(0, 0, heads * size)), gate)), present_state


def _rate(b: FunctionBuilder, attributes: Mapping[str, AttributeValue]) -> ir.Value:
    """-exp(A_log) of each channel [heads*size]: a constant, as A_log is."""
    heads, size = int(attributes["num_heads"]), int(attributes["head_dim"])
    rate = b("Expand", b("Unsqueeze", b("Neg", b("Exp", b.inputs["A_log"])), b.ints(1)), b.ints(heads, size))
    return b("Reshape", rate, b.ints(heads * size))


def _log_decay(
    b: FunctionBuilder, x: Mapping[str, ir.Value], attributes: Mapping[str, AttributeValue], dtype: Dtype
) -> ir.Value:
    """g <= 0 [batch, sequence, heads*size], the log of the decay, from either gate."""
    a, rate = b("Add", b.to_float32(x["decay"], dtype), x["dt_bias"]), x["rate"]
    if attributes["gate"] == "bounded":
        # lower_bound sigmoid(-rate a), written out: ONNX Runtime's Sigmoid has an absolute error of 8e-8, and a slow
        # decay lives on values of 1e-4
        bound = b.number(float(attributes["gate_lower_bound"]))
        return b("Div", bound, b("Add", b("Exp", b("Mul", a, rate)), b.number(1.0)))
    return b("Mul", _softplus(b, a), rate)


def _softplus(b: FunctionBuilder, a: ir.Value) -> ir.Value:
    """max(a, 0) + log1p(exp(-|a|)), to the last bits for very negative a too.

    log(1 + u) alone keeps 6e-8 of absolute error, and a slow decay lives on u of 1e-4. With w = 1 + u rounded,
    u - (w - 1) is what rounding lost. The Softplus operator is as exact in ONNX Runtime, but takes four times as long.
    """
    one = b.number(1.0)
    u = b("Exp", b("Neg", b("Abs", a)))
    w = b("Add", u, one)
    lost = b("Sub", u, b("Sub", w, one))
    return b("Add", b("Relu", a), b("Add", b("Log", w), lost))
