"""ONNX function body of QuantizedMixtureOfExperts: the float op's router, and experts that stay quantised."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import onnx_ir as ir

from kimi_deploy.contract import Dtype
from kimi_deploy.ops.block_quantized import dequantized, rounded
from kimi_deploy.ops.flavours import (
    FLOAT32_ACTIVATIONS,
    INT8_ACTIVATIONS,
    MICROSOFT_DOMAIN,
    Flavour,
    check_flavour,
)
from kimi_deploy.ops.function_builder import FunctionBuilder, op_builder, op_function
from kimi_deploy.ops.mixture_of_experts.body import route
from kimi_deploy.ops.mixture_of_experts.body_experts import Sizes, spread, swiglu
from kimi_deploy.ops.quantized_mixture_of_experts.spec import SPEC
from kimi_deploy.ops.spec import AttributeValue


class Format(NamedTuple):
    """How the experts are stored and what their products read."""

    bits: int
    block_size: int
    activations: str
    zero_points: bool

    @property
    def accuracy_level(self) -> int:
        return INT8_ACTIVATIONS if self.activations == "int8" else FLOAT32_ACTIVATIONS


class Weights(NamedTuple):
    """One product's operands for all experts: levels, scales, and zero points or None."""

    levels: ir.Value
    scales: ir.Value
    zero_points: ir.Value | None


def body(flavour: Flavour, attributes: Mapping[str, AttributeValue], dtype: Dtype) -> list[ir.Function]:
    """Functions of one flavour for nodes with these attributes, the op's own last.

    Raises UsageError on an unknown flavour and ContractError on attributes that are not the op's.
    """
    SPEC.check_attributes(attributes)
    flavour = check_flavour(flavour)
    sizes = Sizes(*(int(attributes[name]) for name in ("num_experts", "top_k", "intermediate")))
    b = op_builder(SPEC)
    form = Format(
        int(attributes["bits"]),
        int(attributes["block_size"]),
        str(attributes["activations"]),
        not attributes["symmetric"],
    )
    gate_up, down = (
        Weights(
            b.inputs[f"{name}_levels"],
            b.inputs[f"{name}_scales"],
            b.inputs[f"{name}_zero_points"] if form.zero_points else None,
        )
        for name in ("gate_up", "down")
    )
    x = b.to_float32(b.inputs["hidden_states"], dtype)
    weights = spread(b, *route(b, attributes, sizes, dtype), sizes.experts, 0.0)
    # ONNX Runtime's kernel rounds the inputs of 8-bit experts whatever it is told
    if flavour == "ort" and not (form.bits == 8 and form.activations == "float32"):
        output, helpers = _kernel(b, x, weights, gate_up, down, sizes, form), [_helper(form)]
    else:
        output, helpers = _every_expert(b, x, weights, gate_up, down, form), []
    return [*helpers, op_function(b, SPEC, [b.from_float32(output, dtype)])]


def _kernel(
    b: FunctionBuilder,
    x: ir.Value,
    weights: ir.Value,
    gate_up: Weights,
    down: Weights,
    sizes: Sizes,
    form: Format,
) -> ir.Value:
    """com.microsoft::QMoE; weights [tokens, experts] both choose the experts and weigh them.

    An expert whose weight underflowed to zero may lose its place to another of weight zero, which changes nothing.
    """
    return b(
        "QMoE",
        *(x, weights, gate_up.levels, gate_up.scales, None, down.levels, down.scales, None),
        *(None, None, None, gate_up.zero_points, down.zero_points, None, weights),
        domain=MICROSOFT_DOMAIN,
        k=sizes.top_k,
        activation_type="swiglu",
        swiglu_fusion=1,
        activation_alpha=1.0,
        activation_beta=0.0,
        normalize_routing_weights=0,
        expert_weight_bits=form.bits,
        block_size=form.block_size,
        accuracy_level=form.accuracy_level,
    )


_KERNEL_INPUTS = (
    "input",
    "router_probs",
    *(f"fc{n}_{x}" for n in (1, 2, 3) for x in ("experts_weights", "scales", "experts_bias")),
    *(f"fc{n}_zero_points" for n in (1, 2, 3)),
    "router_weights",
)


def _helper(form: Format) -> ir.Function:
    """ONNX Runtime's QMoE for runtimes that do not have it, as `_kernel` calls it."""
    b = FunctionBuilder(_KERNEL_INPUTS)
    gate_up, down = (
        Weights(
            b.inputs[f"fc{n}_experts_weights"],
            b.inputs[f"fc{n}_scales"],
            b.inputs[f"fc{n}_zero_points"] if form.zero_points else None,
        )
        for n in (1, 2)
    )
    output = _every_expert(b, b.inputs["input"], b.inputs["router_weights"], gate_up, down, form)
    attributes = {
        "k": ir.AttributeType.INT,
        "activation_type": ir.AttributeType.STRING,
        "swiglu_fusion": ir.AttributeType.INT,
        "activation_alpha": ir.AttributeType.FLOAT,
        "activation_beta": ir.AttributeType.FLOAT,
        "normalize_routing_weights": ir.AttributeType.INT,
        "expert_weight_bits": ir.AttributeType.INT,
        "block_size": ir.AttributeType.INT,
        "accuracy_level": ir.AttributeType.INT,
    }
    return b.function(MICROSOFT_DOMAIN, "QMoE", {"output": output}, attributes)


def _every_expert(
    b: FunctionBuilder, x: ir.Value, weights: ir.Value, gate_up: Weights, down: Weights, form: Format
) -> ir.Value:
    """A Scan over experts, float32 like x; weights [tokens, experts], zero where not chosen.

    One expert at a time is made float, so that nothing is as large as all of them.
    """
    hidden = b("Shape", x, start=2, end=3)
    rows = b("Reshape", x, b("Concat", b.ints(-1), hidden, axis=0))
    zero = b("ConstantOfShape", b("Shape", rows), value=ir.tensor([0.0], dtype=ir.DataType.FLOAT))
    read = rounded(b, rows, form.block_size) if form.activations == "int8" else rows
    by_expert = b("Unsqueeze", b("Transpose", weights, perm=[1, 0]), b.ints(2))  # [experts, tokens, 1]
    scanned = [v for w in (gate_up, down) for v in w if v is not None]
    kinds = ["levels", "scales", "zero_points"][: 2 + form.zero_points]
    names = {f"{w}_{k}": "float32" if k == "scales" else "uint8" for w in ("gate_up", "down") for k in kinds}
    inner = b.nested(sum="float32", **names, weight="float32")  # type: ignore[arg-type]
    values = inner.inputs
    made = [
        dequantized(
            inner,
            values[f"{w}_levels"],
            values[f"{w}_scales"],
            values.get(f"{w}_zero_points"),
            form.bits,
            form.block_size,
        )
        for w in ("gate_up", "down")
    ]
    act = swiglu(inner, inner("MatMul", read, inner("Transpose", made[0], perm=[1, 0])), "float32")
    act = inner("Squeeze", act, inner.ints(2))
    if form.activations == "int8":
        act = rounded(inner, act, form.block_size)
    y = inner("Mul", inner("MatMul", act, inner("Transpose", made[1], perm=[1, 0])), values["weight"])
    # an expert that was not chosen must not matter even where it overflows
    y = inner("Where", inner("Greater", values["weight"], inner.number(0.0)), y, inner.number(0.0))
    added = inner("Add", values["sum"], y)
    body_graph = inner.graph([added], "expert")
    total = b("Scan", zero, *scanned, by_expert, body=body_graph, num_scan_inputs=len(scanned) + 1)
    return b("Reshape", total, b("Shape", x))
