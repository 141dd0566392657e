"""What an implementation is compared with: the float64 recurrence, transformers' functions, ONNX's evaluator.

Each takes the op's arrays and attributes and returns its outputs by name, float64.
"""

from __future__ import annotations

from collections.abc import Mapping
from inspect import unwrap

import numpy as np
import torch
from onnx.reference import ReferenceEvaluator
from transformers.models.kimi_linear import modeling_kimi_linear as theirs

from kimi_deploy.ops.kimi_delta_attention.body import body
from kimi_deploy.ops.kimi_delta_attention.reference import log_decay
from kimi_deploy.ops.kimi_delta_attention.spec import SPEC
from kimi_deploy.ops.spec import AttributeValue

from ..ops.op_model import op_model
from .cases import Arrays, oracle


def transformers_op(arrays: Arrays, attributes: Mapping[str, AttributeValue], rule) -> Arrays:  # type: ignore[no-untyped-def]
    """The layer between its projections as transformers computes it in float32: its convolution, `rule`, its norm.

    Unwrapped: where fla is installed, transformers would call that instead.

    The gate is ours: `tests/ops/test_kda_reference.py` compares it with theirs. No ragged rows.
    """
    x = {name: torch.from_numpy(a.astype(np.float32)) for name, a in arrays.items()}
    H, D = int(attributes["num_heads"]), int(attributes["head_dim"])
    # theirs keeps as many columns as the filter has, the oldest unused
    columns = torch.nn.functional.pad(x["past_conv_state"], (1, 0))
    mixed = unwrap(theirs.causal_conv1d_update)(x["qkv"].mT, columns, x["conv_weight"], activation="silu").mT
    q, k, v = (part.unflatten(-1, (H, D)) for part in mixed.chunk(3, dim=-1))
    g = log_decay(x["decay"], x["A_log"], x["dt_bias"], str(attributes["gate"]), float(attributes["gate_lower_bound"]))
    o, state = unwrap(rule)(
        q,
        k,
        v,
        g=g,
        beta=x["beta"].sigmoid(),
        initial_state=x["past_recurrent_state"],
        output_final_state=True,
        use_qk_l2norm_in_kernel=True,
    )
    norm = theirs.KimiLinearRMSNormGated(D, eps=float(attributes["norm_eps"]))
    with torch.no_grad():
        norm.weight.copy_(x["norm_weight"])
        output = norm(o, x["output_gate"].unflatten(-1, (H, D)))
    return {
        "output": output.flatten(-2).double().numpy(),
        "present_conv_state": columns[..., 1:].double().numpy(),
        "present_recurrent_state": state.double().numpy(),
    }


def transformers_recurrent(arrays: Arrays, attributes: Mapping[str, AttributeValue]) -> Arrays:
    return transformers_op(arrays, attributes, theirs.recurrent_kimi_delta_attention)


def transformers_chunk(arrays: Arrays, attributes: Mapping[str, AttributeValue]) -> Arrays:
    return transformers_op(arrays, attributes, theirs.chunk_kimi_delta_attention)


def onnx_evaluator(arrays: Arrays, attributes: Mapping[str, AttributeValue]) -> Arrays:
    """The op's function body in ONNX's own evaluator, on float32 ports."""
    wide = {name: a if a.dtype == np.int32 else a.astype(np.float32) for name, a in arrays.items()}
    wide.setdefault("sequence_lengths", np.full(len(wide["qkv"]), wide["qkv"].shape[1], np.int32))
    model = op_model(SPEC, body("onnx", attributes, "float32"), attributes, "float32", wide)
    results = ReferenceEvaluator(model).run(None, {i.name: wide[i.name] for i in model.graph.input})
    return {port.name: a.astype(np.float64) for port, a in zip(SPEC.outputs, results, strict=True)}


ORACLES = {
    "float64_recurrence": oracle,
    "transformers_recurrent": transformers_recurrent,
    "transformers_chunk": transformers_chunk,
    "onnx_evaluator": onnx_evaluator,
}
