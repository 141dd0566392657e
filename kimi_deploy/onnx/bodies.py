"""Function bodies of the custom ops in a model: put in, or exchanged for another flavour."""

from __future__ import annotations

from collections.abc import Collection

import onnx_ir as ir

from kimi_deploy.contract import Dtype
from kimi_deploy.errors import ExportError
from kimi_deploy.ops.flavours import Flavour
from kimi_deploy.ops.kimi_delta_attention.body import body as kimi_delta_attention_body
from kimi_deploy.ops.latent_attention.body import body as latent_attention_body
from kimi_deploy.ops.mixture_of_experts.body import body as mixture_of_experts_body
from kimi_deploy.ops.quantized_mixture_of_experts.body import body as quantized_mixture_of_experts_body
from kimi_deploy.ops.registry import OPS
from kimi_deploy.ops.spec import DOMAIN, AttributeValue

# The standard LinearAttention and CausalConvWithState are in opset 27; our other nodes are unchanged since 25.
MODEL_OPSET = 27

BODIES = {
    "KimiDeltaAttention": kimi_delta_attention_body,
    "LatentAttention": latent_attention_body,
    "MixtureOfExperts": mixture_of_experts_body,
    "QuantizedMixtureOfExperts": quantized_mixture_of_experts_body,
}


def set_bodies(model: ir.Model, flavour: Flavour, dtype: Dtype, ops: Collection[str] = tuple(OPS)) -> None:
    """Give every op of `ops` that occurs in `model` its `flavour` body, replacing what was there.

    Raises ExportError when nodes of one op differ in attributes: a body is specialised to them.
    """
    for name in ops:
        attributes = _attributes(model, name)
        if attributes is None:
            continue
        for key in [k for k in model.functions if k[0] == DOMAIN and k[1] == name]:
            del model.functions[key]
        for function in BODIES[name](flavour, attributes, dtype):
            model.functions[function.identifier()] = function
    _drop_unused_helpers(model)
    _order(model)
    model.graph.opset_imports[""] = MODEL_OPSET
    for function in model.functions.values():
        for domain, version in function.opset_imports.items():
            model.graph.opset_imports.setdefault(domain, version)


def _attributes(model: ir.Model, name: str) -> dict[str, AttributeValue] | None:
    """The OpSpec attributes shared by every node of the op, or None when it does not occur."""
    wanted = [a.name for a in OPS[name].attributes]
    seen: list[dict[str, AttributeValue]] = []
    for node in model.graph:
        if (node.domain, node.op_type) == (DOMAIN, name):
            values = {k: node.attributes[k].value for k in wanted}
            if values not in seen:
                seen.append(values)
    if len(seen) > 1:
        raise ExportError(f"nodes of {name} differ in attributes", seen=str(seen), expected="one set per model")
    return seen[0] if seen else None


def _called(nodes: ir.Graph | ir.Function) -> set[tuple[str, str]]:
    return {(n.domain, n.op_type) for n in ir.traversal.RecursiveGraphIterator(nodes)}


def _drop_unused_helpers(model: ir.Model) -> None:
    """Remove functions that neither the graph nor a used function calls any more."""
    used, frontier = set(), _called(model.graph)
    while frontier:
        keys = [k for k in model.functions if (k[0], k[1]) in frontier and k not in used]
        used.update(keys)
        frontier = set().union(*(_called(model.functions[k]) for k in keys)) if keys else set()
    for key in [k for k in model.functions if k not in used]:
        del model.functions[key]


def _order(model: ir.Model) -> None:
    """Helpers before the ops that call them: the checker resolves a call against functions listed earlier."""
    ordered = sorted(model.functions.items(), key=lambda item: item[0][0] == DOMAIN)
    for key in list(model.functions):
        del model.functions[key]
    for key, function in ordered:
        model.functions[key] = function
