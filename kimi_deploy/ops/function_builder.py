"""Writes the nodes of an ONNX function: unique names, constants shared by value, nested graphs for If and Scan."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import count
from typing import Literal

import numpy as np
import onnx_ir as ir

from kimi_deploy.contract import Dtype
from kimi_deploy.ops.flavours import MICROSOFT_DOMAIN, MICROSOFT_OPSET, ONNX_OPSET
from kimi_deploy.ops.onnx_schema import PLUGIN_ATTRIBUTES
from kimi_deploy.ops.spec import DOMAIN, OpSpec

_ATTRIBUTE_TYPES = {
    "int": ir.AttributeType.INT,
    "float": ir.AttributeType.FLOAT,
    "string": ir.AttributeType.STRING,
}
GraphDtype = Dtype | Literal["int64", "uint8"]
_IR_DTYPES: dict[GraphDtype, ir.DataType] = {
    "int64": ir.DataType.INT64,
    "uint8": ir.DataType.UINT8,
    "float32": ir.DataType.FLOAT,
    "float16": ir.DataType.FLOAT16,
    "bfloat16": ir.DataType.BFLOAT16,
}


class FunctionBuilder:
    """Collects nodes of one function or nested graph; calling it adds a node and returns its output.

    A nested builder shares its parent's names, so that no name of an inner graph hides an outer one.
    """

    def __init__(self, inputs: Sequence[str]) -> None:
        self._names = count()
        self.inputs = {name: ir.Value(name=name) for name in inputs}
        self._nodes: list[ir.Node] = []
        self._constants: dict[tuple[str, tuple[int, ...], bytes], ir.Value] = {}

    def outputs(
        self, op_type: str, inputs: Sequence[ir.Value | None], number: int, *, domain: str = "", **attributes: object
    ) -> Sequence[ir.Value]:
        """Add a node with `number` outputs. An input of None is an absent optional one."""
        name = f"{op_type.lower()}_{next(self._names)}"
        values = [ir.Value(name=f"{name}_{i}" if i else name) for i in range(number)]
        node = ir.Node(
            domain,
            op_type,
            inputs,
            attributes=ir.convenience.convert_attributes(attributes),  # type: ignore[arg-type]
            outputs=values,
            name=name,
        )
        self._nodes.append(node)
        return values

    def __call__(self, op_type: str, *inputs: ir.Value | None, domain: str = "", **attributes: object) -> ir.Value:
        """Add a node with one output and return it."""
        return self.outputs(op_type, inputs, 1, domain=domain, **attributes)[0]

    def constant(self, value: object, dtype: str) -> ir.Value:
        """A constant of a numpy dtype name; equal constants of a builder are one node."""
        array = np.asarray(value, dtype=dtype)
        key = (dtype, array.shape, array.tobytes())
        if key not in self._constants:
            self._constants[key] = self("Constant", value=ir.tensor(array))
        return self._constants[key]

    def ints(self, *values: int) -> ir.Value:
        """A 1-D int64 constant: shapes, axes, indices."""
        return self.constant(values, "int64")

    def number(self, value: float) -> ir.Value:
        """A float32 scalar constant."""
        return self.constant(value, "float32")

    def positions(self, value: ir.Value, axis: int) -> ir.Value:
        """0, 1, ... up to the size of an axis of `value`, int64."""
        size = self("Squeeze", self("Shape", value, start=axis, end=axis + 1))
        return self("Range", self.constant(0, "int64"), size, self.constant(1, "int64"))

    def convert(self, value: ir.Value, dtype: Dtype, wanted: Dtype) -> ir.Value:
        """`value`, which has `dtype`, in the `wanted` one; no node where they are the same."""
        return value if dtype == wanted else self("Cast", value, to=_IR_DTYPES[wanted].value)

    def to_float32(self, value: ir.Value, dtype: Dtype) -> ir.Value:
        """`value`, which has `dtype`, in float32."""
        return self.convert(value, dtype, "float32")

    def from_float32(self, value: ir.Value, dtype: Dtype) -> ir.Value:
        """The float32 `value` in `dtype`."""
        return self.convert(value, "float32", dtype)

    def nested(self, **inputs: GraphDtype) -> FunctionBuilder:
        """A builder for a graph inside this one, with inputs of these dtypes."""
        inner = FunctionBuilder(tuple(inputs))
        inner._names = self._names
        for name, dtype in inputs.items():
            inner.inputs[name].name = f"{name}_{next(self._names)}"
            inner.inputs[name].dtype = _IR_DTYPES[dtype]
        return inner

    def graph(self, outputs: Sequence[ir.Value], name: str) -> ir.Graph:
        """The nested graph of the collected nodes; its outputs are float32."""
        for value in outputs:
            value.dtype = ir.DataType.FLOAT
        return ir.Graph(list(self.inputs.values()), outputs, nodes=self._nodes, name=name)

    def branch(
        self,
        condition: ir.Value,
        then: Callable[[FunctionBuilder], Sequence[ir.Value]],
        otherwise: Callable[[FunctionBuilder], Sequence[ir.Value]],
    ) -> Sequence[ir.Value]:
        """An If node; each callable writes one branch into the builder it gets and returns its float32 outputs."""
        graphs = []
        for name, write in (("then", then), ("else", otherwise)):
            inner = self.nested()
            graphs.append(inner.graph(write(inner), name))
        return self.outputs("If", [condition], len(graphs[0].outputs), then_branch=graphs[0], else_branch=graphs[1])

    def function(
        self,
        domain: str,
        name: str,
        outputs: Mapping[str, ir.Value],
        attributes: Mapping[str, ir.AttributeType],
    ) -> ir.Function:
        """The finished function; `outputs` gives the computed values their port names."""
        for port, value in outputs.items():
            value.name = port
        graph = ir.Graph(
            list(self.inputs.values()),
            list(outputs.values()),
            nodes=self._nodes,
            name=name,
        )
        versions = {"": ONNX_OPSET, MICROSOFT_DOMAIN: MICROSOFT_OPSET}
        used = {node.domain for node in ir.traversal.RecursiveGraphIterator(graph)}
        graph.opset_imports.update({d: version for d, version in versions.items() if d in used})
        declared = [ir.Attr(attribute, kind, None) for attribute, kind in attributes.items()]
        return ir.Function(domain, name, graph=graph, attributes=declared)


def op_builder(spec: OpSpec) -> FunctionBuilder:
    """A builder whose inputs are the op's ports."""
    return FunctionBuilder([port.name for port in spec.inputs])


def op_function(builder: FunctionBuilder, spec: OpSpec, outputs: Sequence[ir.Value]) -> ir.Function:
    """The op's own function: ports and attributes as the spec has them, plus those a plugin wants on the node."""
    attributes = {a.name: _ATTRIBUTE_TYPES[a.type] for a in spec.attributes}
    attributes |= dict.fromkeys(PLUGIN_ATTRIBUTES, ir.AttributeType.STRING)
    named = {port.name: value for port, value in zip(spec.outputs, outputs, strict=True)}
    return builder.function(DOMAIN, spec.name, named, attributes)
