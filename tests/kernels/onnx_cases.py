"""The cases by which the onnx package tests a backend's LinearAttention and CausalConvWithState."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper
from onnx.backend.test.case import node as node_cases
from onnx.backend.test.case.node import causal_conv_with_state, linear_attention

CLASSES = {
    "LinearAttention": linear_attention.LinearAttention,
    "CausalConvWithState": causal_conv_with_state.CausalConvWithState,
}


@dataclass(frozen=True)
class OnnxCase:
    """One node with its inputs and expected outputs by the schema's port names; absent inputs are left out."""

    name: str
    model: onnx.ModelProto
    attributes: dict[str, Any]
    inputs: dict[str, np.ndarray]
    outputs: dict[str, np.ndarray]
    rtol: float
    atol: float


def onnx_cases(op_type: str) -> list[OnnxCase]:
    """Every case of the installed onnx whose model is the one node (the others are its function body, expanded)."""
    schema = onnx.defs.get_schema(op_type)
    cases = []
    # importing an op's module makes its cases; collect_testcases would make those of every op, in 12 seconds
    for case in node_cases._NodeTestCases:
        node = case.model.graph.node[0]
        if node.op_type != op_type or len(case.model.graph.node) != 1:
            continue
        ((given, expected),) = case.data_sets
        ports = [schema.inputs[i].name for i, name in enumerate(node.input) if name]
        attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        cases.append(
            OnnxCase(
                name=case.name.removeprefix("test_"),
                model=case.model,
                attributes={k: v.decode() if isinstance(v, bytes) else v for k, v in attributes.items()},
                inputs=dict(zip(ports, map(_array, given), strict=True)),
                outputs=dict(zip((o.name for o in schema.outputs), map(_array, expected), strict=True)),
                rtol=case.rtol,
                atol=case.atol,
            )
        )
    return cases


def exported_names(op_type: str) -> set[str]:
    """Names of the cases that the op's class in the onnx package makes."""
    prefix = {"LinearAttention": "linear_attention", "CausalConvWithState": "causal_conv_with_state"}[op_type]
    return {f"{prefix}_{name.removeprefix('export_')}" for name in dir(CLASSES[op_type]) if name.startswith("export_")}


def _array(tensor: np.ndarray | onnx.TensorProto) -> np.ndarray:
    return numpy_helper.to_array(tensor) if isinstance(tensor, onnx.TensorProto) else np.asarray(tensor)
