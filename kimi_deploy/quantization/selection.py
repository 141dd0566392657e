"""Which parameters a scheme quantises, and in groups of how many inputs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

from kimi_deploy.config import KimiLinearConfig
from kimi_deploy.contract import Dtype
from kimi_deploy.errors import UsageError
from kimi_deploy.quantization.scheme import GROUPS, PREFERRED_GROUP, Scheme
from kimi_deploy.weights import weight_table

Role = Literal["product", "experts", "embeddings"]

HEAD, EMBEDDINGS = "lm_head.weight", "model.embed_tokens.weight"
_PRODUCTS = frozenset(
    {
        "qkv_proj.weight",
        "o_proj.weight",
        "q_proj.weight",
        "q_a_proj.weight",
        "q_b_proj.weight",
        "kv_a_proj_with_mqa.weight",
        "gate_up_proj.weight",
        "down_proj.weight",
    }
)
_EXPERTS = frozenset({"experts.gate_up_proj", "experts.down_proj"})

NEVER = (
    "router",
    "forget gate, output gate and beta projections",
    "norms",
    "A_log, dt_bias",
    "convolution",
    "kv_b_proj",
)
"""What no scheme touches: small tensors that everything depends on, and what LatentAttention reads whole."""


def quantized_parameters(config: KimiLinearConfig, scheme: Scheme) -> dict[str, Role]:
    """The parameters that `scheme` quantises, in model order.

    Raises UsageError when it names the head or the embeddings of a model that ties them: one tensor cannot be read both
    by a product and by a lookup.
    """
    if config.tie_word_embeddings and (scheme.head or scheme.embeddings):
        raise UsageError(
            "--quantize: the model ties its head to its embeddings",
            seen="head or embeddings in the specification",
            fix="leave both out",
        )
    found: dict[str, Role] = {}
    for weight in weight_table(config):
        last_two = ".".join(weight.name.split(".")[-2:])
        if last_two in _PRODUCTS or (weight.name == HEAD and scheme.head):
            found[weight.name] = "product"
        elif last_two in _EXPERTS:
            found[weight.name] = "experts"
        elif weight.name == EMBEDDINGS and scheme.embeddings:
            found[weight.name] = "embeddings"
    return found


def settled(scheme: Scheme, config: KimiLinearConfig, dtype: Dtype) -> Scheme:
    """`scheme` with its group size decided.

    Raises UsageError when the group it names, or every group there is, does not divide the inputs of a quantised
    parameter (the expert kernel takes whole groups only), and for a model of another dtype than float32.
    """
    if dtype != "float32":
        # 16 bits would save neither time nor memory where quantised models run: docs/quantisation.md
        raise UsageError(
            "--quantize needs --dtype float32: what is not quantised stays float32",
            seen=f"--dtype {dtype}",
            expected="float32 activations, in which ONNX Runtime's CPU kernels compute whatever they are given",
            fix="leave --dtype out; or export the unquantised model in that dtype, without --quantize",
        )
    shapes = {w.name: w.shape for w in weight_table(config)}
    inputs: Mapping[str, int] = {name: shapes[name][-1] for name in quantized_parameters(config, scheme)}
    fitting = [g for g in GROUPS if all(size % g == 0 for size in inputs.values())]
    wanted = scheme.group or (PREFERRED_GROUP if PREFERRED_GROUP in fitting else min(GROUPS))
    if wanted not in fitting:
        name, size = next((n, s) for n, s in inputs.items() if s % wanted)
        raise UsageError(
            "--quantize: the group does not divide a parameter's inputs",
            seen=f"group={wanted}, {name} with {size} inputs",
            expected=f"group={' or '.join(map(str, fitting))}" if fitting else "inputs in multiples of 32",
            fix="give a group that fits" if fitting else "this model cannot be quantised by groups",
        )
    return replace(scheme, group=wanted)


def record(scheme: Scheme, config: KimiLinearConfig, bytes_before: int, bytes_after: int) -> dict[str, Any]:
    """What a manifest says about a quantisation; `Scheme.from_dict` reads the scheme back."""
    roles = list(quantized_parameters(config, scheme).values())
    excluded = list(NEVER)
    excluded += [name for name in ("head", "embeddings") if not getattr(scheme, name)]
    return scheme.to_dict() | {
        "parameters": {role: roles.count(role) for role in dict.fromkeys(roles)},
        "excluded": excluded,
        "weight_bytes_before": bytes_before,
        "weight_bytes": bytes_after,
    }
