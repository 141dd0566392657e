"""A TensorRT network from an export: bodies exchanged, plugins taken, every parser error with its node."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir

from kimi_deploy.contract import METADATA_KEY, GraphContract
from kimi_deploy.engine.backend import Backend
from kimi_deploy.engine.plugin_registry import registered_plugins
from kimi_deploy.errors import EngineError
from kimi_deploy.onnx.bodies import set_bodies
from kimi_deploy.ops.plugins import IN_PLACE_FIELD
from kimi_deploy.ops.spec import DOMAIN

PLUGIN_NAMESPACE = "plugin_namespace"
PARSED_OPSET = 25
"""Of ai.onnx, the newest that a parser of the full TensorRT says it has (11.5); no node of these graphs is newer."""


@dataclass(frozen=True)
class Graph:
    """A graph ready for TensorRT's parser: its protobuf (weights stay outside), contract, and nodes per custom op."""

    proto: bytes
    contract: GraphContract
    custom_nodes: dict[str, int]


def read_graph(path: Path, plugin_ops: frozenset[str], *, in_place_state: bool = False) -> Graph:
    """Load `path` without its weights and give every custom op the body that TensorRT parses.

    Nodes of `plugin_ops` keep the attribute that makes TensorRT take a plugin; others lose it, so that a plugin that
    happens to be registered cannot be taken instead of the body. `in_place_state` is written onto them, for plugins
    whose state outputs are to be their state inputs. Raises EngineError for a graph without contract.
    """
    model = ir.load(path)
    text = model.metadata_props.get(METADATA_KEY)
    if text is None:
        raise EngineError(
            "the graph does not say what its inputs and outputs are",
            seen=f"{path} without metadata {METADATA_KEY!r}",
            fix="give a folder written by `kimi-deploy export`",
        )
    contract = GraphContract.from_json(text)
    set_bodies(model, "primitive", contract.dtype)
    parts: list[ir.Graph | ir.Function] = [model.graph, *model.functions.values()]
    for part in parts:
        part.opset_imports[""] = PARSED_OPSET
    nodes = [n for n in model.graph if n.domain == DOMAIN]
    for node in nodes:
        if node.op_type not in plugin_ops:
            node.attributes.pop(PLUGIN_NAMESPACE, None)
        elif in_place_state:
            node.attributes[IN_PLACE_FIELD] = ir.AttrInt64(IN_PLACE_FIELD, 1)
    return Graph(ir.to_proto(model).SerializeToString(), contract, dict(Counter(n.op_type for n in nodes)))


def parse(backend: Backend, builder: Any, proto: bytes, path: Path) -> tuple[Any, Any]:
    """The strongly typed network of a model, and the parser that owns its weights: keep it until the build is done.

    `proto` is the serialised model, `path` the file whose folder holds its external weights. Raises EngineError listing
    what the parser refused, and the ContractError of a plugin that refused its node.
    """
    trt = backend.module
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, backend.logger)
    creators = registered_plugins(backend)
    for creator in creators.values():
        creator.refusals.clear()
    if parser.parse(proto, path=str(path)):
        return network, parser
    raise_refusals(backend)
    # a plugin of the C++ library says why in the log only
    said = [message for message in backend.logger.errors if message.startswith("plugin ")]
    if said:
        raise EngineError(said[0])
    errors = [parser.get_error(i) for i in range(parser.num_errors)]
    listed = "; ".join(_describe(e) for e in errors[:8]) or "; ".join(backend.logger.errors[-4:])
    raise EngineError(
        f"{backend.name} {backend.version} cannot parse the graph",
        seen=f"{len(errors)} errors: {listed}"[:3000],
        expected="operators and types that its ONNX parser knows",
        fix="report this configuration",
    )


def raise_refusals(backend: Backend) -> None:
    """Raise the first error that a Python plugin kept since the last parse began, if any."""
    for creator in registered_plugins(backend).values():
        if creator.refusals:
            raise creator.refusals[0]


def _describe(error: Any) -> str:
    where = error.node_name() or "?"
    stack = error.local_function_stack() if hasattr(error, "local_function_stack") else []
    inside = f" in {' < '.join(stack)}" if stack else ""
    text = " ".join(str(error.desc()).split())
    return f"node {where} ({error.node_operator()}){inside}: {text}"


def plugin_layers(backend: Backend, network: Any) -> dict[str, int]:
    """How many layers of the network are plugins, by plugin name."""
    trt = backend.module
    found: Counter[str] = Counter()
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        if layer.type == trt.LayerType.PLUGIN_V3:
            # TensorRT's Python layers come as the base class; this is its documented way to the derived one
            layer.__class__ = trt.IPluginV3Layer
            # a plugin of a C++ library has its name in this interface only
            core = layer.plugin.get_capability_interface(trt.PluginCapabilityType.CORE)
            found[core.plugin_name] += 1
    return dict(found)


def check_network(backend: Backend, network: Any, graph: Graph, plugin_ops: frozenset[str]) -> dict[str, int]:
    """Prove that the network has the contract's interface and a plugin layer for every node that was to get one.

    Returns the plugin layers by name. Raises EngineError for the first difference.
    """
    inputs = [network.get_input(i).name for i in range(network.num_inputs)]
    outputs = [network.get_output(i).name for i in range(network.num_outputs)]
    for kind, seen, specs in (("inputs", inputs, graph.contract.inputs), ("outputs", outputs, graph.contract.outputs)):
        wanted = [s.name for s in specs]
        if sorted(seen) != sorted(wanted):
            raise EngineError(f"the network's {kind} differ from the contract", seen=str(seen), expected=str(wanted))
    layers = plugin_layers(backend, network)
    expected = {op: count for op, count in graph.custom_nodes.items() if op in plugin_ops}
    if layers != expected:
        raise EngineError(
            "TensorRT did not take the plugins",
            seen=f"plugin layers {layers}",
            expected=str(expected),
            fix="export the model again: nodes must carry plugin_namespace and abi",
        )
    return layers
