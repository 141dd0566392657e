"""ONNX function body of MixtureOfExperts: the router, shared by the flavours; the experts differ."""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir

from kimi_deploy.contract import Dtype
from kimi_deploy.ops.flavours import Flavour, check_flavour
from kimi_deploy.ops.function_builder import FunctionBuilder, op_builder, op_function
from kimi_deploy.ops.mixture_of_experts.body_engine import fusible
from kimi_deploy.ops.mixture_of_experts.body_experts import Routed, Sizes, fused, fused_helpers, plain
from kimi_deploy.ops.mixture_of_experts.spec import RENORMALIZE_EPS, SPEC
from kimi_deploy.ops.spec import AttributeValue


def body(flavour: Flavour, attributes: Mapping[str, AttributeValue], dtype: Dtype) -> list[ir.Function]:
    """Functions of one flavour for nodes with these attributes, the op's own last.

    The router is float32 whatever `dtype` is. Raises UsageError on an unknown flavour and ContractError on attributes
    that are not the op's.
    """
    SPEC.check_attributes(attributes)
    flavour = check_flavour(flavour)
    sizes = Sizes(*(int(attributes[name]) for name in ("num_experts", "top_k", "intermediate")))
    b = op_builder(SPEC)
    x, gate_up, down = (b.inputs[name] for name in ("hidden_states", "gate_up_weight", "down_weight"))
    routed = Routed(x, gate_up, down, *route(b, attributes, sizes, dtype), dtype)
    experts = {"ort": fused, "onnx": plain, "primitive": fusible}[flavour]
    output = experts(b, routed, sizes)
    helpers = fused_helpers() if flavour == "ort" else []
    return [*helpers, op_function(b, SPEC, [b.from_float32(output, dtype)])]


def route(
    b: FunctionBuilder, attributes: Mapping[str, AttributeValue], sizes: Sizes, dtype: Dtype
) -> tuple[ir.Value, ir.Value]:
    """Indices and final weights [tokens, top_k] of the chosen experts, of a builder with the op's router inputs."""
    groups, kept = int(attributes["n_group"]), int(attributes["topk_group"])
    weight = b("Transpose", b.to_float32(b.inputs["router_weight"], dtype), perm=[1, 0])
    logits = b("MatMul", b.to_float32(b.inputs["hidden_states"], dtype), weight)
    # the sigmoid written out: ONNX Runtime's has an absolute error of 8e-8, too much where all scores are small
    odds = b("Exp", b("Neg", b("Reshape", logits, b.ints(-1, sizes.experts))))
    scores = b("Reciprocal", b("Add", odds, b.number(1.0)))
    biased = b("Add", scores, b.inputs["router_bias"])
    if kept < groups:
        biased = _keep_groups(b, biased, groups, sizes.experts // groups, kept)
    _, chosen = b.outputs("TopK", [biased, b.ints(sizes.top_k)], 2, axis=-1)
    weights = b("GatherElements", scores, chosen, axis=1)
    if attributes["renormalize"]:
        total = b("ReduceSum", weights, b.ints(-1), keepdims=1)
        weights = b("Div", weights, b("Add", total, b.number(RENORMALIZE_EPS)))
    return chosen, b("Mul", weights, b.number(float(attributes["routed_scaling_factor"])))


def _keep_groups(b: FunctionBuilder, biased: ir.Value, groups: int, size: int, kept: int) -> ir.Value:
    """Biased scores with minus infinity outside the `kept` groups with the best sums of their two best scores."""
    grouped = b("Reshape", biased, b.ints(-1, groups, size))
    best, _ = b.outputs("TopK", [grouped, b.ints(min(2, size))], 2, axis=-1)
    _, winners = b.outputs("TopK", [b("ReduceSum", best, b.ints(-1), keepdims=0), b.ints(kept)], 2, axis=-1)
    # [tokens, groups, 1]: does any winner have this group's number
    numbers = b.constant([[g] for g in range(groups)], "int64")
    hits = b("Cast", b("Equal", b("Unsqueeze", winners, b.ints(1)), numbers), to=ir.DataType.FLOAT.value)
    keep = b("Greater", b("ReduceMax", hits, b.ints(-1), keepdims=1), b.number(0.0))
    return b("Reshape", b("Where", keep, grouped, b.number(float("-inf"))), b.ints(-1, groups * size))
