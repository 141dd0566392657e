"""Weight-only quantisation of a traced graph: other nodes, other initializers, other pieces of work.

The graph is the same for every body flavour: MatMulNBits and GatherBlockQuantized nodes (domain com.microsoft) with a
function of standard operators beside them, and `kimi::QuantizedMixtureOfExperts` with its bodies.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import onnx_ir as ir

from kimi_deploy.checkpoint import Checkpoint
from kimi_deploy.checkpoint.parameter_part import ParameterPart
from kimi_deploy.errors import ExportError
from kimi_deploy.onnx.passes import TRANSPOSED
from kimi_deploy.onnx.quantized_functions import GATHER, MATMUL, quantized_functions
from kimi_deploy.onnx.weights import Initializer, Piece, Region, WeightPlan, row_parts
from kimi_deploy.ops.flavours import FLOAT32_ACTIVATIONS, INT8_ACTIVATIONS, MICROSOFT_DOMAIN, MICROSOFT_OPSET
from kimi_deploy.ops.quantized_mixture_of_experts.spec import SPEC
from kimi_deploy.ops.spec import DOMAIN
from kimi_deploy.quantization.blocks import pack, quantize
from kimi_deploy.quantization.scheme import Scheme
from kimi_deploy.quantization.selection import Role, quantized_parameters
from kimi_deploy.quantization.storage import stored_parts

WORKING_COPIES = 4
"""Float32 copies of a part that quantising it may hold at a time."""


def quantize_graph(model: ir.Model, checkpoint: Checkpoint, scheme: Scheme) -> None:
    """Exchange the nodes that read the parameters of `scheme`, whose group is settled.

    New initializers are named after the parameter: NAME_levels, NAME_scales and, unless symmetric, NAME_zero_points.
    Raises ExportError when a parameter has a reader that has no quantised form.
    """
    roles = quantized_parameters(checkpoint.config, scheme)
    shapes = {r.weight.name: r.weight.shape for r in checkpoint.resolve()}
    made: dict[str, list[ir.Value | None]] = {}
    for name, role in roles.items():
        made[name] = [_register(model, i) for i in stored_initializers(name, shapes[name], role, scheme)]
        if scheme.symmetric:
            made[name].append(None)
    for name, role in roles.items():
        value = model.graph.initializers[name]
        for node in [use.node for use in value.uses()]:
            if role == "experts":
                if name.endswith("gate_up_proj"):
                    _replace_experts(model, node, made, scheme)
                continue
            write = _product if role == "product" else _lookup
            _exchange(model, node, write(node, value, made[name], shapes[name], scheme))
    for name in roles:
        if model.graph.initializers[name].uses():
            raise ExportError(
                "a quantised parameter is still read as it was", seen=name, fix="report this configuration"
            )
        del model.graph.initializers[name]
    model.graph.opset_imports[MICROSOFT_DOMAIN] = MICROSOFT_OPSET
    for function in quantized_functions(scheme):
        model.functions[function.identifier()] = function


def _register(model: ir.Model, initializer: Initializer) -> ir.Value:
    value = ir.Value(name=initializer.name, shape=ir.Shape(initializer.shape), type=ir.TensorType(initializer.dtype))
    # replaced by the file's tensor when the weights are laid out
    value.const_value = ir.LazyTensor(
        partial(_no_value, initializer.name), dtype=initializer.dtype, shape=ir.Shape(initializer.shape)
    )
    model.graph.register_initializer(value)
    return value


def _no_value(name: str) -> ir.TensorProtocol:
    raise ExportError(f"{name} was read before it was written")


def _exchange(model: ir.Model, old: ir.Node, new: ir.Node) -> None:
    new.name = old.name
    result = new.outputs[0]
    result.name, result.shape, result.type = old.outputs[0].name, old.outputs[0].shape, old.outputs[0].type
    model.graph.insert_before(old, new)
    ir.convenience.replace_all_uses_with(old.outputs[0], result, replace_graph_outputs=True)
    model.graph.remove(old, safe=True)


def accuracy_level(scheme: Scheme) -> int:
    """What tells ONNX Runtime's kernels whether they may round their input to int8."""
    return INT8_ACTIVATIONS if scheme.activations == "int8" else FLOAT32_ACTIVATIONS


def _product(
    node: ir.Node, weight: ir.Value, operands: Sequence[ir.Value | None], shape: tuple[int, ...], scheme: Scheme
) -> ir.Node:
    if (
        (node.domain, node.op_type) != ("", "MatMul")
        or node.inputs[1] is not weight
        or TRANSPOSED not in weight.metadata_props
    ):
        raise ExportError("a quantised parameter has an unknown reader", seen=f"{weight.name}: {node.op_type}")
    attributes = {
        "K": shape[1],
        "N": shape[0],
        "bits": scheme.bits,
        "block_size": scheme.group,
        "accuracy_level": accuracy_level(scheme),
    }
    inputs = [node.inputs[0], *operands]
    return ir.node(MATMUL, inputs[: 3 if scheme.symmetric else 4], attributes=attributes, domain=MICROSOFT_DOMAIN)


def _lookup(
    node: ir.Node, weight: ir.Value, operands: Sequence[ir.Value | None], shape: tuple[int, ...], scheme: Scheme
) -> ir.Node:
    if (node.domain, node.op_type) != ("", "Gather") or node.inputs[0] is not weight:
        raise ExportError("a quantised parameter has an unknown reader", seen=f"{weight.name}: {node.op_type}")
    levels, *others = operands
    attributes = {"bits": scheme.bits, "block_size": scheme.group, "quantize_axis": 1, "gather_axis": 0}
    inputs = [levels, node.inputs[1], *others]
    return ir.node(GATHER, inputs[: 3 if scheme.symmetric else 4], attributes=attributes, domain=MICROSOFT_DOMAIN)


def _replace_experts(model: ir.Model, node: ir.Node, made: dict[str, list[ir.Value | None]], scheme: Scheme) -> None:
    if (node.domain, node.op_type) != (DOMAIN, "MixtureOfExperts"):
        raise ExportError("quantised experts have an unknown reader", seen=node.op_type)
    hidden, router, bias, *experts = node.inputs
    gate_up, down = (made[str(value.name)] for value in experts if value is not None)
    inputs = [hidden, router, bias, *gate_up[:2], *down[:2], gate_up[2], down[2]]
    attributes = {k: a.value for k, a in node.attributes.items()} | {
        "bits": scheme.bits,
        "block_size": scheme.group,
        "symmetric": int(scheme.symmetric),
        "activations": scheme.activations,
    }
    new = ir.node(SPEC.name, inputs[: 7 if scheme.symmetric else 9], attributes=attributes, domain=DOMAIN)
    _exchange(model, node, new)


def stored_initializers(name: str, shape: tuple[int, ...], role: Role, scheme: Scheme) -> list[Initializer]:
    """What the graph stores for the parameter `name` of `shape` [..., in]."""
    return [
        Initializer(
            f"{name}_{part.name}", ir.DataType.FLOAT if part.name == "scales" else ir.DataType.UINT8, part.shape
        )
        for part in stored_parts(shape, role, scheme)
    ]


def quantize_weights(plan: WeightPlan, checkpoint: Checkpoint, scheme: Scheme) -> None:
    """Make `plan` store every parameter of `scheme` quantised; one expert, or some rows of a matrix, at a time."""
    weights = {r.weight.name: r.weight for r in checkpoint.resolve()}
    for name, role in quantized_parameters(checkpoint.config, scheme).items():
        initializers = stored_initializers(name, weights[name].shape, role, scheme)
        pieces = [_piece(part, initializers, scheme) for part in row_parts(checkpoint, weights[name], "float32")]
        plan.replace(name, initializers, pieces)


def _piece(part: ParameterPart, initializers: Sequence[Initializer], scheme: Scheme) -> Piece:
    rows = part.weight.shape[0]
    regions = []
    for initializer in initializers:
        row = initializer.nbytes // initializer.shape[0]
        regions.append(Region(initializer.name, part.start * row, rows * row))
    produce: Callable[[], Sequence[np.ndarray]] = partial(_produce, part, scheme)
    return Piece(part.spans, tuple(regions), produce, WORKING_COPIES * math.prod(part.weight.shape) * 4)


def _produce(part: ParameterPart, scheme: Scheme) -> list[np.ndarray]:
    assert scheme.group is not None
    made = quantize(part.load("float32"), scheme.bits, scheme.group, symmetric=scheme.symmetric, method=scheme.method)
    arrays = [pack(made.levels, scheme.bits), made.scales]
    if not scheme.symmetric:
        arrays.append(pack(made.zero_points, scheme.bits))
    return [np.ascontiguousarray(a) for a in arrays]
