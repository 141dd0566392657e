"""ONNX's own linear-attention operators (opset 27), written as OpSpecs, so that they get plugins as our ops do.

They are not our contract: names, shapes and defaults are those of `onnx.defs`, and no ABI hash stands on their nodes.
LinearAttention is wider than the standard as com.microsoft's operator of that name is: fewer query and key heads than
states, which Qwen's gated delta nets have.
"""

from __future__ import annotations

from dataclasses import dataclass

from kimi_deploy.ops.spec import Attribute, AttributeValue, OpSpec, Port

UPDATE_RULES = ("linear", "gated", "delta", "gated_delta")
ACTIVATIONS = ("none", "silu", "swish")


@dataclass(frozen=True)
class OptionalAttribute(Attribute):
    """An attribute that a node may leave out; `default` is what the operator's schema says it is then."""

    default: AttributeValue = 0


_STATE_DIMS = ("batch", "kv_num_heads", "query_size//q_num_heads", "value_size//kv_num_heads")
_CONV_STATE_DIMS = ("batch", "channels", "kernel_size-1")

LINEAR_ATTENTION = OpSpec(
    name="LinearAttention",
    doc="ONNX's LinearAttention: S_t = exp(g_t) S_(t-1) + beta_t k_t (v_t - exp(g_t) S_(t-1)^T k_t), o_t = scale q_t^T "
    "S_t, or that rule without decay, without beta or without both.",
    inputs=(
        Port("query", ("batch", "sequence", "query_size"), "T", "q_num_heads heads packed"),
        Port("key", ("batch", "sequence", "key_size"), "T", "kv_num_heads heads packed, or a divisor of them"),
        Port("value", ("batch", "sequence", "value_size"), "T", "kv_num_heads heads packed"),
        Port("past_state", _STATE_DIMS, "S", "[key, value]; absent means zeros", optional=True),
        Port(
            "decay",
            ("batch", "sequence", "decay_size"),
            "T",
            "log decay, of a state head (decay_size = kv_num_heads) or of each of its keys",
            optional=True,
        ),
        Port("beta", ("batch", "sequence", "beta_size"), "T", "of a head (kv_num_heads) or of all (1)", optional=True),
    ),
    outputs=(
        Port(
            "output",
            ("batch", "sequence", "max(q_num_heads, kv_num_heads)*(value_size//kv_num_heads)"),
            "T",
            "heads packed",
        ),
        Port("present_state", _STATE_DIMS, "S", "[key, value]"),
    ),
    attributes=(
        Attribute("q_num_heads", "int", "query heads, a multiple of kv_num_heads or a divisor of it"),
        Attribute("kv_num_heads", "int", "key and value heads"),
        OptionalAttribute("update_rule", "string", "which terms the rule has", UPDATE_RULES, default="gated_delta"),
        OptionalAttribute("scale", "float", "of the output; 0 means 1 / sqrt(key size of a head)", default=0.0),
        OptionalAttribute("chunk_size", "int", "a hint that changes no result", default=64),
    ),
)

CAUSAL_CONV_WITH_STATE = OpSpec(
    name="CausalConvWithState",
    doc="ONNX's CausalConvWithState: depthwise causal convolution over the last axis; the last columns are its state.",
    inputs=(
        Port("input", ("batch", "channels", "length"), "T", "channels first"),
        Port("weight", ("channels", "1", "kernel_size"), "T", "newest step last"),
        Port("bias", ("channels",), "T", "absent means zeros", optional=True),
        Port("past_state", _CONV_STATE_DIMS, "T", "newest last; absent means zeros", optional=True),
    ),
    outputs=(
        Port("output", ("batch", "channels", "length"), "T", "as input"),
        Port("present_state", _CONV_STATE_DIMS, "T", "newest last"),
    ),
    attributes=(
        # not in ONNX's schema: TensorRT-RTX's parser writes how many axes are convolved over
        OptionalAttribute("ndim", "int", "axes convolved over: 1", default=1),
        OptionalAttribute("activation", "string", "after the convolution", ACTIVATIONS, default="none"),
    ),
)

STANDARD_OPS: dict[str, OpSpec] = {spec.name: spec for spec in (LINEAR_ATTENTION, CAUSAL_CONV_WITH_STATE)}
"""By ONNX name."""
