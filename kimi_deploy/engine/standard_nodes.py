"""Makes LinearAttention and CausalConvWithState nodes of any exporter ones that TensorRT's parser imports as they mean.

TensorRT-RTX 1.7.1's parser has importers for both, which give a plugin the inputs up to the last one that is given: one
absent before it fails the parse. And they drop attributes of com.microsoft's operators that change the result. The
full TensorRT's published parsers have no such importers. What holds in every parser since 10.1 is the attribute
plugin_namespace: a node that has it is given to the registered plugin of its name, before any importer (since 10.15)
or for want of one (before); its inputs are given as they are, and one that is absent is refused there too.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

import onnx_ir as ir

from kimi_deploy.errors import ContractError
from kimi_deploy.ops.flavours import MICROSOFT_DOMAIN
from kimi_deploy.ops.plugins import PLUGINS
from kimi_deploy.ops.standard import CAUSAL_CONV_WITH_STATE, LINEAR_ATTENTION, STANDARD_OPS

DOMAINS = ("", MICROSOFT_DOMAIN)

# attributes of com.microsoft's operators at the values that change nothing; the kernels have no other
_NEUTRAL: dict[str, dict[str, int]] = {
    LINEAR_ATTENTION.name: {"state_window": 0},
    CAUSAL_CONV_WITH_STATE.name: {
        "ndim": 1,
        "dilation": 1,
        "state_window": 0,
        "state_update_capacity": 0,
        "state_channels_last": -1,
        "state_length": 0,
        "input_channel_offset": 0,
        "input_channels": 0,
    },
}

_MIN_OPSET = 15  # Shape of a part, CastLike


def prepare_standard_nodes(model: ir.Model) -> int:
    """Rewrite the nodes of both operators, of ai.onnx and com.microsoft, in `model`; returns how many there are.

    An absent input before a given one becomes zeros: past_state, bias, and for the rule delta a log decay of 0, which
    is the rule gated_delta. channels_last becomes transposes around the node. Results are the same by the operators'
    definitions. Raises ContractError, before anything is changed, for an attribute that has no such form.
    """
    nodes = list(_standard_nodes(model))
    for node in nodes:
        _refuse_unknown(model, node)
    for node in nodes:
        if node.op_type == LINEAR_ATTENTION.name:
            _prepare_attention(node)
        else:
            _prepare_convolution(node)
    return len(nodes)


def ask_for_plugins(model: ir.Model) -> dict[str, int]:
    """Write onto the nodes of both operators which plugin runs them; returns how many layers each then has.

    The attributes are TensorRT's own: afterwards the model is for its parser only, and no longer valid ONNX. A node
    in a function counts once per call.
    """
    for node in _standard_nodes(model):
        plugin = PLUGINS[node.op_type]
        node.attributes["plugin_namespace"] = ir.AttrString("plugin_namespace", plugin.namespace)
        node.attributes["plugin_version"] = ir.AttrString("plugin_version", plugin.version)
    layers: Counter[str] = Counter()

    def count(graph: ir.Graph | ir.Function) -> None:
        for node in ir.traversal.RecursiveGraphIterator(graph):
            if _is_standard(node):
                layers[node.op_type] += 1
            elif node.op_identifier() in model.functions:
                count(model.functions[node.op_identifier()])

    count(model.graph)
    return dict(layers)


def _is_standard(node: ir.Node) -> bool:
    return node.op_type in STANDARD_OPS and node.domain in DOMAINS


def _standard_nodes(model: ir.Model) -> Iterator[ir.Node]:
    graphs: list[ir.Graph | ir.Function] = [model.graph, *model.functions.values()]
    for graph in graphs:
        for node in ir.traversal.RecursiveGraphIterator(graph):
            if _is_standard(node):
                yield node


def _refuse_unknown(model: ir.Model, node: ir.Node) -> None:
    for name, neutral in _NEUTRAL[node.op_type].items():
        value = _attribute(node, name, neutral)
        if value != neutral:
            raise ContractError(
                f"node {node.name or '?'} ({node.op_type}): the plugin has no {name}, and TensorRT's parser drops it",
                seen=f"{name} = {value}",
                expected=f"{name} = {neutral}",
            )
    opset = model.opset_imports.get("", _MIN_OPSET)
    if opset < _MIN_OPSET:
        raise ContractError(
            f"the graph's opset cannot say what {node.op_type} needs",
            seen=str(opset),
            expected=f"{_MIN_OPSET} or later",
        )


def _prepare_attention(node: ir.Node) -> None:
    past, decay, beta = (_input(node, name) for name in ("past_state", "decay", "beta"))
    query, value = node.inputs[0], node.inputs[2]
    if beta is not None and decay is None:
        size = [_size(node, query, 0), _size(node, query, 1), _heads(node, "kv_num_heads")]
        _set_input(node, "decay", _zeros(node, size, query))
        node.attributes["update_rule"] = ir.AttrString("update_rule", "gated_delta")
    if past is None and (decay is not None or beta is not None):
        heads = _heads(node, "kv_num_heads")
        key_size = _added(node, "Div", [_size(node, query, 2), _heads(node, "q_num_heads")])
        value_size = _added(node, "Div", [_size(node, value, 2), heads])
        _set_input(node, "past_state", _zeros(node, [_size(node, query, 0), heads, key_size, value_size], query))


def _prepare_convolution(node: ir.Node) -> None:
    data, weight = node.inputs[0], node.inputs[1]
    if _attribute(node, "channels_last", 0):
        del node.attributes["channels_last"]
        swapped = ir.AttrInt64s("perm", [0, 2, 1])
        for name in ("input", "past_state"):
            if (array := _input(node, name)) is not None:
                _set_input(node, name, _added(node, "Transpose", [array], [swapped]))
        for output in node.outputs:
            last = ir.Node("", "Transpose", [], [swapped], num_outputs=1)
            back = last.outputs[0]
            # whatever reads the output reads the transposed one, which takes its name, type and shape
            back.name, back.type, back.shape = output.name, output.type, output.shape
            output.name, output.shape = f"{output.name}.channels_first", None
            output.replace_all_uses_with(back, replace_graph_outputs=True)
            last.resize_inputs(1)
            last.replace_input_with(0, output)
            assert node.graph is not None
            node.graph.insert_after(node, last)
    if _input(node, "bias") is None and _input(node, "past_state") is not None:
        _set_input(node, "bias", _zeros(node, [_size(node, weight, 0)], data))


def _attribute(node: ir.Node, name: str, default: int) -> int:
    attribute = node.attributes.get(name)
    return default if attribute is None else attribute.as_int()


def _input(node: ir.Node, name: str) -> ir.Value | None:
    index = [p.name for p in STANDARD_OPS[node.op_type].inputs].index(name)
    return node.inputs[index] if index < len(node.inputs) else None


def _set_input(node: ir.Node, name: str, value: ir.Value) -> None:
    index = [p.name for p in STANDARD_OPS[node.op_type].inputs].index(name)
    if index >= len(node.inputs):
        node.resize_inputs(index + 1)
    node.replace_input_with(index, value)


def _zeros(node: ir.Node, size: Sequence[ir.Value], like: ir.Value | None) -> ir.Value:
    """Zeros of the type of `like`; each of `size` is a tensor of one int64."""
    shape = size[0] if len(size) == 1 else _added(node, "Concat", size, [ir.AttrInt64("axis", 0)])
    return _added(node, "CastLike", [_added(node, "ConstantOfShape", [shape]), like])


def _size(node: ir.Node, value: ir.Value | None, axis: int) -> ir.Value:
    return _added(node, "Shape", [value], [ir.AttrInt64("start", axis), ir.AttrInt64("end", axis + 1)])


def _heads(node: ir.Node, name: str) -> ir.Value:
    return _added(node, "Constant", [], [ir.AttrInt64s("value_ints", [_attribute(node, name, 0)])])


def _added(
    node: ir.Node, op_type: str, inputs: Sequence[ir.Value | None], attributes: Sequence[ir.Attr] = ()
) -> ir.Value:
    """The output of a new node before `node`."""
    new = ir.Node("", op_type, inputs, attributes, num_outputs=1)
    assert node.graph is not None
    node.graph.insert_before(node, new)
    return new.outputs[0]
