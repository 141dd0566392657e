"""An exported graph, read back and checked: structure and interface."""

from __future__ import annotations

from pathlib import Path

import onnx
import onnx_ir as ir

from kimi_deploy.contract import METADATA_KEY, GraphContract, TensorSpec
from kimi_deploy.errors import ExportError
from kimi_deploy.ops.onnx_schema import register_schemas

ONNX_DTYPES = {
    "float32": ir.DataType.FLOAT,
    "float16": ir.DataType.FLOAT16,
    "bfloat16": ir.DataType.BFLOAT16,
    "int64": ir.DataType.INT64,
    "int32": ir.DataType.INT32,
}


def check_graph(path: Path, contract: GraphContract) -> ir.Model:
    """Read the graph `path` back from disk and prove its structure; the weights' values are not read.

    ONNX's full checker with strict shape inference passes; inputs and outputs have the contract's names, dtypes and
    axes in order; the metadata holds the contract. Raises ExportError naming the first difference.
    """
    register_schemas()
    try:
        onnx.checker.check_model(str(path), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ExportError("the ONNX checker refuses the graph", seen=str(error)[:2000]) from error
    model = ir.load(path)
    check_interface(model, contract)
    return model


def check_interface(model: ir.Model, contract: GraphContract) -> None:
    """Names, dtypes and axes of inputs and outputs, and the contract in the metadata."""
    for kind, values, specs in (
        ("inputs", model.graph.inputs, contract.inputs),
        ("outputs", model.graph.outputs, contract.outputs),
    ):
        seen = [_spec(v) for v in values]
        wanted = [TensorSpec(s.name, ONNX_DTYPES[s.dtype].name, s.dims) for s in specs]
        if seen != wanted:
            different = [(a, b) for a, b in zip(seen, wanted, strict=False) if a != b][:3]
            raise ExportError(
                f"the graph's {kind} differ from the contract",
                seen=str(different or seen),
                expected=str([b for _, b in different] or wanted),
            )
    text = model.metadata_props.get(METADATA_KEY)
    if text is None or GraphContract.from_json(text) != contract:
        raise ExportError("the graph's metadata does not hold its contract", seen=str(text)[:200])


def _spec(value: ir.Value) -> TensorSpec:
    assert value.shape is not None
    dims = tuple(d if isinstance(d, int) else str(d.value) for d in value.shape)
    return TensorSpec(str(value.name), value.dtype.name if value.dtype else "?", dims)
