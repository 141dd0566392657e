"""Bytes: of weights by component, of the states, of a step's activations, of an export."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from kimi_deploy.config import KimiLinearConfig
from kimi_deploy.contract import Dtype, state_table
from kimi_deploy.quantization.scheme import Scheme
from kimi_deploy.quantization.selection import quantized_parameters
from kimi_deploy.quantization.storage import stored_parts
from kimi_deploy.weights import Weight, weight_table

ITEM_BYTES: dict[str, int] = {"float32": 4, "float16": 2, "bfloat16": 2}

# end of a parameter's name -> component; the first that fits
_COMPONENTS = (
    ("embed_tokens.weight", "embeddings"),
    ("lm_head.weight", "head"),
    ("mlp.experts.gate_up_proj", "experts"),
    ("mlp.experts.down_proj", "experts"),
    ("mlp.gate.weight", "router"),
    ("e_score_correction_bias", "router"),
    ("shared_experts.gate_up_proj.weight", "shared experts"),
    ("shared_experts.down_proj.weight", "shared experts"),
    ("mlp.gate_up_proj.weight", "dense MLP"),
    ("mlp.down_proj.weight", "dense MLP"),
    ("layernorm.weight", "norms"),
    ("model.norm.weight", "norms"),
)
COMPONENTS = ("embeddings", "KDA", "MLA", "dense MLP", "router", "experts", "shared experts", "norms", "head")


@dataclass(frozen=True)
class Component:
    """A kind of parameter: how many there are, and their bytes as stored."""

    name: str
    parameters: int
    nbytes: int


@lru_cache(maxsize=8)
def weight_components(config: KimiLinearConfig, dtype: Dtype, scheme: Scheme | None = None) -> tuple[Component, ...]:
    """Every parameter of the model by component, exactly what an export of `dtype` holds; `scheme` is settled."""
    roles = quantized_parameters(config, scheme) if scheme else {}
    parameters = dict.fromkeys(COMPONENTS, 0)
    nbytes = dict.fromkeys(COMPONENTS, 0)
    for weight in weight_table(config):
        name = component_of(weight, config)
        parameters[name] += math.prod(weight.shape)
        if scheme is not None and weight.name in roles:
            nbytes[name] += sum(part.nbytes for part in stored_parts(weight.shape, roles[weight.name], scheme))
        else:
            nbytes[name] += weight_bytes(weight, dtype)
    return tuple(Component(name, parameters[name], nbytes[name]) for name in COMPONENTS)


def component_of(weight: Weight, config: KimiLinearConfig) -> str:
    """The component that a parameter belongs to; a token mixer's by the kind of its layer."""
    # norms inside a token mixer are the mixer's
    if ".self_attn." in weight.name:
        return "KDA" if config.is_kda(int(weight.name.split(".")[2])) else "MLA"
    return next(component for end, component in _COMPONENTS if weight.name.endswith(end))


def weight_bytes(weight: Weight, dtype: Dtype) -> int:
    """Bytes of a parameter in an export of `dtype`."""
    return math.prod(weight.shape) * ITEM_BYTES["float32" if weight.dtype == "float32" else dtype]


def kda_state_bytes(config: KimiLinearConfig, dtype: Dtype) -> int:
    """Recurrent (float32) and convolution states of all KDA layers for one sequence, whatever its length."""
    return _states(config, dtype, ("conv_state", "recurrent_state"))


def latent_bytes_per_token(config: KimiLinearConfig, dtype: Dtype) -> int:
    """Latent cache of all MLA layers for one token of one sequence."""
    return _states(config, dtype, ("latent",))


def _states(config: KimiLinearConfig, dtype: Dtype, kinds: tuple[str, ...]) -> int:
    return sum(
        math.prod(s.shape(batch=1, capacity=1)) * ITEM_BYTES[s.dtype]
        for s in state_table(config, dtype)
        if s.kind in kinds
    )


def full_mla_bytes_per_token(config: KimiLinearConfig, dtype: Dtype) -> int:
    """The same model with latent attention in every layer."""
    return config.num_hidden_layers * config.latent_dim * ITEM_BYTES[dtype]


def full_mha_bytes_per_token(config: KimiLinearConfig, dtype: Dtype) -> int:
    """The same model with keys and values of every head cached in every layer."""
    head = config.qk_head_dim + config.v_head_dim
    return config.num_hidden_layers * config.num_attention_heads * head * ITEM_BYTES[dtype]


def break_even_tokens(config: KimiLinearConfig, dtype: Dtype) -> float:
    """Tokens from which the hybrid's states are smaller than full MLA's cache; inf for a model without KDA."""
    saved = full_mla_bytes_per_token(config, dtype) - latent_bytes_per_token(config, dtype)
    return kda_state_bytes(config, dtype) / saved if saved else math.inf


Attention = Literal["whole", "tiled", "kernel"]
"""What a step keeps of its attention: float32 scores over the whole context; of a call whose past is at least as long
as itself no scores of that, but the keys and values of all heads, as `ort` bodies do; nothing that grows."""


def activation_bytes(
    config: KimiLinearConfig, batch: int, tokens: int, context: int, item: int = 4, attention: Attention = "whole"
) -> int:
    """Estimate of what a step over `tokens` tokens of each row holds beside weights and states, at `context` tokens.

    The widest layer's tensors that live together: a token mixer's projections before and after its op, or the chosen
    experts' inputs, gates and outputs, of `item` bytes; float32 attention scores three times (2.5 to 3.5 times measured
    with ONNX Runtime 1.32); a float32 row of logits per sequence. Keys and values of the tiled form are there three
    times as well: as made, in the order that its kernel wants, and in freed pieces that were large enough for a
    shorter past.
    """
    kda = 8 * config.linear_dim if "linear_attention" in config.layer_types else 0
    mla, scores, expanded = 0, 0, 0
    if "full_attention" in config.layer_types:
        heads = config.num_attention_heads
        mla = heads * (2 * config.latent_dim + config.qk_head_dim)
        scores = {"whole": 3 * heads * context * 4, "tiled": 3 * heads * tokens * 4, "kernel": 0}[attention]
        if attention == "tiled":
            expanded = 3 * heads * (config.qk_head_dim + config.v_head_dim) * context * 4
    moe = 0
    if "sparse" in config.mlp_types:
        moe = config.num_experts_per_token * (3 * config.moe_intermediate_size + 2 * config.hidden_size)
    dense = 3 * config.intermediate_size if "dense" in config.mlp_types else 0
    per_token = 4 * config.hidden_size * item + max(kda * item, mla * item + scores, dense * item, moe * item)
    return batch * (tokens * per_token + expanded + config.vocab_size * 4)
