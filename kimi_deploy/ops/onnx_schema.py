"""ONNX schemas of the custom ops, made from the OpSpecs, so that checker, shape inference and exporter know them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import onnx
from onnx import defs, helper

from kimi_deploy.errors import ContractError
from kimi_deploy.ops.registry import OPS
from kimi_deploy.ops.spec import DOMAIN, DOMAIN_VERSION, OpSpec, Port, evaluate_dim

PLUGIN_ATTRIBUTES = ("plugin_namespace", "abi")
"""Optional strings on every node: where TensorRT finds the plugin, and the ABI the node was written with."""

_TYPES = {"T": "T", "float32": "tensor(float)", "int32": "tensor(int32)", "uint8": "tensor(uint8)"}
_ATTRIBUTES = {
    "int": defs.OpSchema.AttrType.INT,
    "float": defs.OpSchema.AttrType.FLOAT,
    "string": defs.OpSchema.AttrType.STRING,
}


def register_schemas() -> None:
    """Register every op's schema with onnx; calling it again changes nothing."""
    for spec in OPS.values():
        if not defs.has(spec.name, DOMAIN):
            defs.register_schema(schema(spec))


def schema(spec: OpSpec) -> defs.OpSchema:
    """The op as an onnx OpSchema: ports, type constraint T, required attributes, types and shapes of the outputs."""
    plugin = [
        defs.OpSchema.Attribute(name, defs.OpSchema.AttrType.STRING, "for the TensorRT plugin", required=False)
        for name in PLUGIN_ATTRIBUTES
    ]
    result = defs.OpSchema(
        spec.name,
        DOMAIN,
        DOMAIN_VERSION,
        spec.doc,
        inputs=[_parameter(p) for p in spec.inputs],
        outputs=[_parameter(p) for p in spec.outputs],
        type_constraints=[("T", ["tensor(float)", "tensor(float16)", "tensor(bfloat16)"], "the model's dtype")],
        attributes=[
            *(defs.OpSchema.Attribute(a.name, _ATTRIBUTES[a.type], a.doc, required=True) for a in spec.attributes),
            *plugin,
        ],
    )
    result.set_type_and_shape_inference_function(lambda context: _infer(spec, context))
    return result


def _parameter(port: Port) -> defs.OpSchema.FormalParameter:
    options = defs.OpSchema.FormalParameterOption
    return defs.OpSchema.FormalParameter(
        port.name,
        _TYPES[port.dtype],
        port.doc,
        param_option=options.Optional if port.optional else options.Single,
    )


def _infer(spec: OpSpec, context: onnx.shape_inference.InferenceContext) -> None:
    """Types of the outputs, and every dimension that the attributes and the inputs' dimensions determine.

    Raises ContractError, through onnx's shape inference, when a known rank or size contradicts the spec.
    """
    symbols: dict[str, int] = {}
    for attribute in spec.attributes:
        value = context.get_attribute(attribute.name) if attribute.type == "int" else None
        if value is not None:
            symbols[attribute.name] = value.i
    dims: list[tuple[str, str, onnx.TensorShapeProto.Dimension]] = []
    element = 0
    for port, kind in _known_inputs(spec, context):
        if port.dtype == "T" and not element:
            element = kind.elem_type
        if not kind.HasField("shape"):
            continue
        if len(kind.shape.dim) != len(port.dims):
            raise ContractError(
                f"{spec.name}: input {port.name} has the wrong rank",
                seen=str(len(kind.shape.dim)),
                expected=f"{port.dims}",
            )
        dims += ((port.name, name, dim) for name, dim in zip(port.dims, kind.shape.dim, strict=True))
    named: dict[str, onnx.TensorShapeProto.Dimension] = {}
    for _, name, dim in dims:
        if dim.HasField("dim_value") and name.isidentifier():
            symbols.setdefault(name, dim.dim_value)
        elif dim.HasField("dim_param"):
            named.setdefault(name, dim)
    for port_name, name, dim in dims:
        wanted = _evaluate(name, symbols)
        if dim.HasField("dim_value") and wanted not in (None, dim.dim_value):
            raise ContractError(
                f"{spec.name}: input {port_name} has the wrong size",
                seen=str(dim.dim_value),
                expected=f"{name} = {wanted}",
            )
    fixed = {"float32": onnx.TensorProto.FLOAT, "int32": onnx.TensorProto.INT32}
    for index, port in enumerate(spec.outputs):
        result = helper.make_tensor_type_proto(fixed.get(port.dtype, element), None)
        for name in port.dims:
            dim, size = result.tensor_type.shape.dim.add(), _evaluate(name, symbols)
            if size is not None:
                dim.dim_value = size
            elif name in named:
                dim.CopyFrom(named[name])
        context.set_output_type(index, result)


def _known_inputs(
    spec: OpSpec, context: onnx.shape_inference.InferenceContext
) -> Iterator[tuple[Port, onnx.TypeProto.Tensor]]:
    """The connected inputs whose tensor type is known."""
    for index, port in enumerate(spec.inputs[: context.get_num_inputs()]):
        kind = context.get_input_type(index) if context.has_input(index) else None
        if kind is not None and kind.HasField("tensor_type"):
            yield port, kind.tensor_type


def _evaluate(expression: str, symbols: Mapping[str, int]) -> int | None:
    """The dimension's size, or None where a symbol is not known."""
    try:
        return evaluate_dim(expression, symbols)
    except ContractError:
        return None
