"""What is done to the traced graph: readable dimensions, weights as MatMul wants them, nodes that name their plugin."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common

from kimi_deploy.contract import GraphContract
from kimi_deploy.errors import ExportError
from kimi_deploy.ops.registry import OPS
from kimi_deploy.ops.spec import DOMAIN

TRANSPOSED = "kimi_deploy.transposed"
"""Metadata key of an initializer that holds its parameter transposed."""


def name_dimensions(model: ir.Model, contract: GraphContract) -> None:
    """Give every symbolic dimension the contract's name instead of the tracer's (s23 -> batch)."""
    names: dict[str, str] = {}
    for value, spec in zip(model.graph.inputs, contract.inputs, strict=True):
        assert value.shape is not None
        for traced, wanted in zip(value.shape, spec.dims, strict=True):
            if isinstance(wanted, str) and isinstance(traced, ir.SymbolicDim) and traced.value is not None:
                names[traced.value] = wanted
    for node in ir.traversal.RecursiveGraphIterator(model.graph):
        for value in node.outputs:
            _rename(value, names)
    for value in (*model.graph.inputs, *model.graph.outputs):
        _rename(value, names)


def _rename(value: ir.Value, names: dict[str, str]) -> None:
    if value.shape is None:
        return
    value.shape = ir.Shape(
        [names.get(d.value or "", d.value) if isinstance(d, ir.SymbolicDim) else d for d in value.shape]
    )


def transpose_weights(model: ir.Model, keep: Collection[str] = ()) -> None:
    """Store a weight that is only ever read transposed as MatMul reads it, and drop the Transpose.

    A runtime then neither transposes at load (a second copy in memory) nor at run time. A weight with another reader
    (a tied embedding) keeps its Transpose, and so do those of the names `keep`.
    """
    for value in [v for name, v in model.graph.initializers.items() if name not in keep]:
        readers = [use.node for use in value.uses()]
        if not readers or any(n.op_type != "Transpose" or n.domain for n in readers):
            continue
        assert value.shape is not None
        if len(value.shape) != 2:
            continue
        value.shape = ir.Shape(list(reversed(list(value.shape))))
        value.metadata_props[TRANSPOSED] = "1"
        for node in readers:
            ir.convenience.replace_all_uses_with(node.outputs[0], value)
            model.graph.remove(node, safe=True)


def mark_plugin_nodes(model: ir.Model) -> dict[str, str]:
    """Put the plugin namespace and the ABI hash on every custom node; returns {op: abi} of the ops in the graph.

    TensorRT takes a plugin instead of a local function only when the node itself names the namespace.
    """
    found: dict[str, str] = {}
    for node in model.graph:
        if node.domain != DOMAIN:
            continue
        spec = OPS[node.op_type]
        spec.check_attributes({k: a.value for k, a in node.attributes.items() if a.value is not None})
        node.attributes["plugin_namespace"] = ir.AttrString("plugin_namespace", DOMAIN)
        node.attributes["abi"] = ir.AttrString("abi", spec.abi)
        found[spec.name] = spec.abi
    return found


def replace_sequences(model: ir.Model) -> None:
    """Split where the tracer wrote SplitToSequence and SequenceAt: TensorRT has no sequences.

    Raises ExportError for a sequence that anything but SequenceAt with a constant index reads.
    """
    for node in list(model.graph):
        if (node.domain, node.op_type) != ("", "SplitToSequence"):
            continue
        axis = node.attributes["axis"].as_int()
        parts: dict[int, ir.Value] = {}
        readers = [use.node for use in node.outputs[0].uses()]
        for reader in readers:
            position = reader.inputs[1] if reader.op_type == "SequenceAt" else None
            constant = ir.convenience.get_const_tensor(position) if position is not None else None
            if constant is None:
                raise ExportError("the traced graph reads a sequence in an unknown way", seen=str(reader))
            parts[int(constant.numpy())] = reader.outputs[0]
        shapes = [parts[i].shape if i in parts else None for i in range(len(parts))]
        sizes = [shape[axis] for shape in shapes if shape is not None]
        if len(sizes) != len(parts) or not all(isinstance(size, int) for size in sizes):
            raise ExportError("the traced graph splits into parts of unknown size", seen=str(node))
        lengths = ir.Value(
            name=f"{node.outputs[0].name}_sizes",
            const_value=ir.Tensor(np.array(sizes, np.int64)),
            shape=ir.Shape([len(sizes)]),
            type=ir.TensorType(ir.DataType.INT64),
        )
        model.graph.register_initializer(lengths)
        split = ir.node("Split", [node.inputs[0], lengths], attributes={"axis": axis}, num_outputs=len(sizes))
        split.name = node.name
        model.graph.insert_before(node, split)
        for part, old in parts.items():
            new = split.outputs[part]
            new.name, new.shape, new.type = old.name, old.shape, old.type
            ir.convenience.replace_all_uses_with(old, new)
        for reader in (*readers, node):
            model.graph.remove(reader, safe=True)


def tidy(model: ir.Model) -> None:
    """Share equal constants and expressions, remove what nothing reads, and what the tracer noted of its own sources.

    Those notes hold absolute paths: they would tell where an export was made, and differ from machine to machine.
    """
    passes = ir.passes.Sequential(
        common.IdentityEliminationPass(),
        common.CommonSubexpressionEliminationPass(),
        common.RemoveUnusedNodesPass(),
        common.TopologicalSortPass(),
    )
    passes(model)
    for node in ir.traversal.RecursiveGraphIterator(model.graph):
        node.metadata_props.clear()


def check_every_parameter_is_read(model: ir.Model, names: set[str]) -> None:
    """Raise ExportError unless each of the parameters `names` is an initializer that some node reads."""
    initializers = {n for n, v in model.graph.initializers.items() if v.uses()}
    lost = sorted(names - initializers)
    if lost:
        raise ExportError(
            "parameters are missing from the graph",
            seen=f"{len(lost)} of {len(names)}: {lost[:10]}",
            expected="every parameter read by a node",
            fix="report this configuration",
        )
