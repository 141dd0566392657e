"""Known faults of exported models, each as a change to a right graph that no shape, name or dtype shows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from kimi_deploy.errors import ValidationError
from kimi_deploy.ops.kimi_delta_attention.delta_rule import CHUNK
from kimi_deploy.ops.spec import DOMAIN
from kimi_deploy.validate.faults.graph import Graph


@dataclass(frozen=True)
class Planted:
    """Where a fault was put, the check that must find it first, and the tensor that must then be named first.

    Of several `tensors` any will do: an expert's output shows in a convolution's window only if a late token chose it.
    """

    where: str
    check: str
    tensors: tuple[str, ...]


@dataclass(frozen=True)
class Fault:
    """`plant` changes a graph in memory. A `fine` fault is smaller than the rounding of 16 bits."""

    name: str
    plant: Callable[[Graph], Planted]
    fine: bool = False


def _second(layers: list[int]) -> int:
    """The second of the layers where there is one: the first layer's input is the embedding alone."""
    return layers[min(1, len(layers) - 1)]


def _kda(graph: Graph) -> int:
    return _second(graph.layers("recurrent_state"))


def _swapped_state(graph: Graph) -> Planted:
    """Square in key and value, so that every shape check passes."""
    layer = _kda(graph)
    name = f"present.{layer}.recurrent_state"
    graph.replace_output(name, lambda right: graph.add(None, "Transpose", right, perm=[0, 1, 3, 2]))
    return Planted(name, "prefill", (f"{layer}.recurrent_state",))


def _dropped_expert(graph: Graph) -> Planted:
    layer = graph.moe_layers()[0]
    name = f"model.layers.{layer}.mlp.experts.down_proj"
    weight = graph.weight(name)
    weight[1] = 0
    graph.set_weight(name, weight)
    return Planted(f"{name}[1]", "prefill", graph.tensors_after(layer))


def _biased_weights(graph: Graph) -> Planted:
    """The scores with the selection bias also weigh the experts: without a bias nothing would show."""
    body = next(f for f in graph.model.functions.values() if (f.domain, f.name) == (DOMAIN, "MixtureOfExperts"))
    for node in body:
        if node.op_type == "GatherElements":
            source = node.inputs[1].producer() if node.inputs[1] is not None else None
            if source is not None and source.op_type == "TopK":
                node.replace_input_with(0, source.inputs[0])
                return Planted("weights of every router", "prefill", graph.tensors_after(graph.moe_layers()[0]))
    raise ValidationError(
        "the fault cannot be planted: no GatherElements by TopK in MixtureOfExperts' body", fix="report this as a bug"
    )


def _ignored_router_bias(graph: Graph) -> Planted:
    layer = graph.moe_layers()[0]
    name = f"model.layers.{layer}.mlp.gate.e_score_correction_bias"
    graph.set_weight(name, 0 * graph.weight(name))
    return Planted(name, "prefill", graph.tensors_after(layer))


def _wrong_eps(graph: Graph) -> Planted:
    """Too large by a hundred, in the norm before the first layer."""
    node = next(
        n
        for n in graph.model.graph
        if n.op_type == "RMSNormalization" and n.inputs[1] is not None and "0.input_layernorm" in str(n.inputs[1].name)
    )
    node.attributes["epsilon"] = ir.AttrFloat32("epsilon", 1e-3)
    first = graph.contract.states[0]
    return Planted("layer 0's input norm", "prefill", (f"{first.layer}.{first.kind}",))


def _advanced_twice(graph: Graph) -> Planted:
    """As when a captured graph runs once more than it is read: right outputs, a state one call too far."""
    layer = _kda(graph)
    name, node = f"present.{layer}.recurrent_state", graph.mixer(layer)
    graph.replace_output(name, lambda right: graph.repeat(node, {9: right}).outputs[2])
    return Planted(name, "prefill", (f"{layer}.recurrent_state",))


def _late_window(graph: Graph) -> Planted:
    """The convolution's window ends one token early: what is kept is one token late."""
    layer = _kda(graph)
    name, node = f"present.{layer}.conv_state", graph.mixer(layer)

    def wrong(right: ir.Value) -> ir.Value:
        past, new = node.inputs[8], node.inputs[0]
        assert past is not None
        assert new is not None
        columns = graph.add(None, "Concat", past, graph.add(None, "Transpose", new, perm=[0, 2, 1]), axis=2)
        assert right.shape is not None
        width = int(right.shape[2])  # type: ignore[arg-type]  # the contract's, not symbolic
        bounds = [graph.constant([n]) for n in (-1 - width, -1, 2)]
        return graph.add(None, "Slice", columns, *bounds)

    graph.replace_output(name, wrong)
    return Planted(name, "prefill", (f"{layer}.conv_state",))


def _stale_slot(graph: Graph) -> Planted:
    """The last token's row of the cache keeps what was there."""
    layer = graph.layers("latent")[0]
    name, past = f"present.{layer}.latent", graph.value(f"past_key_values.{layer}.latent")

    def wrong(right: ir.Value) -> ir.Value:
        end = graph.add(None, "Add", graph.value("past_lengths"), graph.value("sequence_lengths"))
        last = graph.add(None, "Sub", graph.add(None, "Cast", end, to=ir.DataType.INT64.value), graph.constant(1))
        capacity = graph.add(None, "Squeeze", graph.add(None, "Shape", past, start=1, end=2))
        slots = graph.add(None, "Range", graph.constant(0), capacity, graph.constant(1))
        stale = graph.add(None, "Equal", slots, graph.add(None, "Unsqueeze", last, graph.constant([1])))
        return graph.add(None, "Where", graph.add(None, "Unsqueeze", stale, graph.constant([2])), past, right)

    graph.replace_output(name, wrong)
    return Planted(name, "prefill", (f"{layer}.latent",))


def _bfloat16_state(graph: Graph) -> Planted:
    layer = _kda(graph)
    name = f"present.{layer}.recurrent_state"

    def wrong(right: ir.Value) -> ir.Value:
        rounded = graph.add(None, "Cast", right, to=ir.DataType.BFLOAT16.value)
        return graph.add(None, "Cast", rounded, to=ir.DataType.FLOAT.value)

    graph.replace_output(name, wrong)
    return Planted(name, "prefill", (f"{layer}.recurrent_state",))


def _zeroed_slice(graph: Graph) -> Planted:
    """Stored transposed: the last axis is the projection's output, of which an eighth is lost."""
    layer = _kda(graph)
    name = f"model.layers.{layer}.self_attn.qkv_proj.weight"
    weight = graph.weight(name)
    weight[:, : weight.shape[1] // 8] = 0
    graph.set_weight(name, weight)
    return Planted(f"{name}[:, :{weight.shape[1] // 8}]", "prefill", (f"{layer}.conv_state",))


def _missing_attention_scale(graph: Graph) -> Planted:
    layer = graph.layers("latent")[0]
    graph.set_attribute("LatentAttention", "scale", 1.0)
    return Planted("every LatentAttention", "prefill", graph.tensors_after(layer))


def _missing_expert_scale(graph: Graph) -> Planted:
    graph.set_attribute("MixtureOfExperts", "routed_scaling_factor", 1.0)
    return Planted("every MixtureOfExperts", "prefill", graph.tensors_after(graph.moe_layers()[0]))


def _scaled_logits(graph: Graph) -> Planted:
    """By 1.2 %, as where the head's scale was rounded: within the bounds of 16 bits, beyond PyTorch's noise in them."""
    name = "model.norm.weight"
    weight = graph.weight(name)
    graph.set_weight(name, (1.012 * weight.astype(np.float64)).astype(weight.dtype))
    return Planted(name, "prefill", ("logits",))


def _ignored_past(graph: Graph) -> Planted:
    """Every call begins with an empty recurrent state: a single pass is right."""
    layer = _kda(graph)
    node = graph.mixer(layer)
    past = node.inputs[9]
    assert past is not None
    node.replace_input_with(9, graph.add(node, "Sub", past, past))
    return Planted(f"past_key_values.{layer}.recurrent_state", "split-prefill", (f"{layer}.recurrent_state",))


def _counted_padding(graph: Graph) -> Planted:
    """Padded steps count as tokens: without padding everything is right."""
    layer = _kda(graph)
    node, lengths = graph.mixer(layer), graph.value("sequence_lengths")
    steps = graph.add(node, "Shape", graph.value("input_ids"), start=1, end=2)
    whole = graph.add(node, "Cast", steps, to=ir.DataType.INT32.value)
    node.replace_input_with(10, graph.add(node, "Add", graph.add(node, "Sub", lengths, lengths), whole))
    return Planted(f"sequence_lengths of layer {layer}", "ragged-batch", (f"{layer}.conv_state",))


def _calls_of(graph: Graph, steps: int, kind: str) -> Planted:
    """A call of just so many steps leaves the second KDA layer's state of `kind` as it was."""
    layer = _kda(graph)
    name, past = f"present.{layer}.{kind}", graph.value(f"past_key_values.{layer}.{kind}")

    def wrong(right: ir.Value) -> ir.Value:
        length = graph.add(None, "Shape", graph.value("input_ids"), start=1, end=2)
        return graph.add(None, "Where", graph.add(None, "Equal", length, graph.constant([steps])), past, right)

    graph.replace_output(name, wrong)
    return Planted(f"{name} of calls of {steps} tokens", "chunk-boundaries", (f"{layer}.{kind}",))


def _full_window(graph: Graph) -> Planted:
    """As where the last n steps of a window are cut out by [-n:] and none are left to keep."""
    window = next(s for s in graph.contract.states if s.kind == "conv_state").dims[-1]
    return _calls_of(graph, int(window), "conv_state")


def _full_chunk(graph: Graph) -> Planted:
    """As where the chunk that ends with the call is taken for an empty rest."""
    return _calls_of(graph, CHUNK, "recurrent_state")


FAULTS: tuple[Fault, ...] = (
    Fault("swapped state", _swapped_state),
    Fault("dropped expert", _dropped_expert),
    Fault("biased router weights", _biased_weights),
    Fault("ignored router bias", _ignored_router_bias),
    Fault("wrong eps", _wrong_eps, fine=True),
    Fault("state advanced twice", _advanced_twice),
    Fault("late convolution window", _late_window),
    Fault("stale cache slot", _stale_slot),
    Fault("bfloat16 state", _bfloat16_state, fine=True),
    Fault("zeroed slice", _zeroed_slice),
    Fault("missing attention scale", _missing_attention_scale),
    Fault("missing expert scale", _missing_expert_scale),
    Fault("scaled logits", _scaled_logits),
    Fault("ignored past", _ignored_past),
    Fault("counted padding", _counted_padding),
    Fault("full window dropped", _full_window),
    Fault("full chunk dropped", _full_chunk),
)
