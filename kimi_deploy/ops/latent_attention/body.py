"""ONNX function body of LatentAttention: what the flavours share; writing the cache and attending differ."""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir

from kimi_deploy.contract import Dtype
from kimi_deploy.ops.flavours import Flavour, check_flavour
from kimi_deploy.ops.function_builder import op_builder, op_function
from kimi_deploy.ops.latent_attention import body_parts
from kimi_deploy.ops.latent_attention.body_parts import Parts
from kimi_deploy.ops.latent_attention.body_tiled import kernel_helper
from kimi_deploy.ops.latent_attention.operands import Operands, Sizes
from kimi_deploy.ops.latent_attention.spec import SPEC
from kimi_deploy.ops.spec import AttributeValue

_PARTS: dict[Flavour, Parts] = {
    "ort": Parts(body_parts.scatter_in_place, body_parts.attend_in_the_cheapest_form, (kernel_helper,), float32=True),
    "onnx": Parts(body_parts.scatter_in_place, body_parts.attend_operator),
    "primitive": Parts(body_parts.scatter_copy, body_parts.attend_capacity),
}


def body(flavour: Flavour, attributes: Mapping[str, AttributeValue], dtype: Dtype) -> list[ir.Function]:
    """Functions of one flavour for nodes with these attributes, the op's own last.

    Absorbed form: the key half of kv_b_weight is applied to the query and the value half to the attended latents, so
    that one matrix of latents serves every head as key and value; expanded form: keys and values are made of it. Rows
    of padded steps are rewritten with what the cache holds there.
    Cached rows past the valid length weigh nothing but must be finite. Raises UsageError on an unknown flavour and
    ContractError on attributes that are not the op's.
    """
    SPEC.check_attributes(attributes)
    parts = _PARTS[check_flavour(flavour)]
    s = Sizes(
        *(
            int(attributes[name])
            for name in ("num_heads", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "kv_lora_rank")
        )
    )
    b = op_builder(SPEC)
    x = b.inputs
    compute: Dtype = "float32" if parts.float32 else dtype

    step = b("Unsqueeze", b.positions(x["query"], 1), b.ints(1))
    past, lengths = (b("Cast", x[n], to=ir.DataType.INT64.value) for n in ("past_lengths", "sequence_lengths"))
    valid = b("Less", step, b("Unsqueeze", lengths, b.ints(1, 2)))
    position = b("Add", step, b("Unsqueeze", past, b.ints(1, 2)))  # [batch, sequence, 1]
    # a query step always sees its own slot, so that no softmax is over nothing
    total = b("Max", b("ReduceMax", b("Add", past, lengths), keepdims=1), b.ints(1))

    kept = b("GatherND", x["past_latent"], position, batch_dims=1)
    rows = b("Where", valid, b.convert(x["latent"], dtype, compute), b.convert(kept, dtype, compute))
    present = parts.write(b, x["past_latent"], b.convert(rows, compute, dtype), position, past)

    weight = b("Reshape", b.inputs["kv_b_weight"], b.ints(s.heads, s.nope + s.value, s.rank))
    key_weight, value_weight = b.outputs(
        "Split", [b.convert(weight, dtype, compute), b.ints(s.nope, s.value)], 2, axis=1
    )
    scale = b.convert(b.number(float(attributes["scale"])), "float32", compute)
    query = b("Reshape", b.convert(x["query"], dtype, compute), b.ints(0, 0, s.heads, s.nope + s.rope))
    query = b("Transpose", b("Mul", query, scale), perm=[0, 2, 1, 3])

    operands = Operands(query, key_weight, value_weight, present, position, past, total, s, dtype, compute)
    output = b("Transpose", parts.attend(b, operands), perm=[0, 2, 1, 3])
    output = b("Reshape", output, b.ints(0, 0, s.heads * s.value))
    output = b("Where", valid, output, b.convert(b.number(0.0), "float32", compute))
    own = op_function(b, SPEC, [b.convert(output, compute, dtype), present])
    return [*(helper(s) for helper in parts.helpers), own]
