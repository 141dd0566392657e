"""ONNX function body of KimiDeltaAttention: what the flavours share; the convolution and the delta rule differ."""

from __future__ import annotations

from collections.abc import Mapping

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
    heads, size = int(attributes["num_heads"]), int(attributes["head_dim"])
    b = op_builder(SPEC)
    x = b.inputs
    lengths = b("Unsqueeze", b("Cast", x["sequence_lengths"], to=ir.DataType.INT64.value), b.ints(1, 2))
    valid = b("Less", b("Unsqueeze", b.positions(x["qkv"], 1), b.ints(1)), lengths)
    zero = b.number(0.0)

    def masked(value: ir.Value) -> ir.Value:
        return b("Where", valid, value, zero)

    def by_head(value: ir.Value) -> ir.Value:
        return b("Reshape", value, b.ints(0, 0, heads, size))

    def flat(value: ir.Value) -> ir.Value:
        return b("Reshape", value, b.ints(0, 0, heads * size))

    past = x["past_conv_state"]
    history = b("Concat", b("Transpose", past, perm=[0, 2, 1]), x["qkv"], axis=1)
    # from the weight's shape, which is a constant where the state's has a dynamic batch
    width = b("Squeeze", b("Shape", x["conv_weight"], start=1, end=2))
    one = b.constant(1, "int64")
    columns = b("Range", b.constant(0, "int64"), b("Sub", width, one), one)
    newest = b("Add", lengths, b("Unsqueeze", columns, b.ints(1)))
    present_conv = b("Transpose", b("GatherND", history, newest, batch_dims=1), perm=[0, 2, 1])

    qkv = masked(b.to_float32(x["qkv"], dtype))
    mixed = parts.convolution(b, qkv, b.to_float32(x["conv_weight"], dtype), b.to_float32(past, dtype))
    mixed = b("Mul", mixed, b("Sigmoid", mixed))
    qk, v = b.outputs("Split", [mixed, b.ints(2 * heads * size, heads * size)], 2, axis=2)
    # x / sqrt(sum x^2 + eps) is an RMS norm with weight size^-1/2 and epsilon eps / size
    unit = b.constant([size**-0.5] * size, "float32")
    qk = b("Reshape", qk, b.ints(0, 0, 2 * heads, size))
    qk = b("Reshape", b("RMSNormalization", qk, unit, axis=-1, epsilon=L2_NORM_EPS / size), b.ints(0, 0, -1))
    q, k = b.outputs("Split", [qk, b.ints(*[heads * size] * 2)], 2, axis=2)
    g = masked(_log_decay(b, attributes, dtype))
    beta = masked(b("Sigmoid", b.to_float32(x["beta"], dtype)))
    inputs = DeltaInputs(q, k, v, g, beta, x["past_recurrent_state"])
    o, present_state = parts.delta_rule(b, inputs, DeltaSizes(heads, size, float(attributes["scale"])))
    weight = b.to_float32(x["norm_weight"], dtype)
    normed = flat(b("RMSNormalization", by_head(o), weight, axis=-1, epsilon=float(attributes["norm_eps"])))
    gate = b("Sigmoid", b.to_float32(x["output_gate"], dtype))
    output = b.from_float32(masked(b("Mul", normed, gate)), dtype)
    return [*parts.helpers(), op_function(b, SPEC, [output, present_conv, present_state])]


def _log_decay(b: FunctionBuilder, attributes: Mapping[str, AttributeValue], dtype: Dtype) -> ir.Value:
    """g <= 0 [batch, sequence, heads*size], the log of the decay, from either gate."""
    heads, size = int(attributes["num_heads"]), int(attributes["head_dim"])
    a = b("Add", b.to_float32(b.inputs["decay"], dtype), b.inputs["dt_bias"])
    rate = b("Expand", b("Unsqueeze", b("Neg", b("Exp", b.inputs["A_log"])), b.ints(1)), b.ints(heads, size))
    rate = b("Reshape", rate, b.ints(heads * size))
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
