"""Inputs for the tests of function bodies, and the float64 references they are compared with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from kimi_deploy.contract import Dtype
from kimi_deploy.ops.kimi_delta_attention.reference import kimi_delta_attention
from kimi_deploy.ops.latent_attention.reference import latent_attention
from kimi_deploy.ops.mixture_of_experts.reference import mixture_of_experts
from kimi_deploy.ops.spec import AttributeValue, OpSpec
from kimi_deploy.validate.compare import compare
from kimi_deploy.validate.tolerances import tolerance
from tests.ops.op_model import NUMPY_DTYPES

Arrays = dict[str, np.ndarray]
Attributes = dict[str, AttributeValue]

REGIMES = ("mixed", "strong", "slow", "repeated", "resets")
"""mixed; forgetting all within a step or two, sums of g far below -88; hardly forgetting; one token again and again;
channels that forget all at some steps and hardly anything at the others."""


def kda_attributes(gate: str = "softplus", heads: int = 2, size: int = 16) -> Attributes:
    return {
        "num_heads": heads,
        "head_dim": size,
        "norm_eps": 1e-5,
        "scale": size**-0.5,
        "gate": gate,
        "gate_lower_bound": -5.0 if gate == "bounded" else 0.0,
    }


def kda_arrays(
    attributes: Mapping[str, AttributeValue],
    lengths: Sequence[int],
    steps: int,
    regime: str = "mixed",
    width: int = 4,
) -> Arrays:
    """The weights are the same for every call; the rest depends on the arguments."""
    heads, size = int(attributes["num_heads"]), int(attributes["head_dim"])
    features, batch = heads * size, len(lengths)
    weights, data = _normal(77), _normal(steps * 7 + batch)
    arrays = {
        "qkv": data(batch, steps, 3 * features),
        "decay": data(batch, steps, features) + {"strong": 20, "slow": -9, "repeated": -9}.get(regime, -1.5),
        "beta": data(batch, steps, heads),
        "output_gate": data(batch, steps, features),
        "conv_weight": 0.5 * weights(3 * features, width),
        "A_log": np.linspace(0.0, 2.7, heads),
        "dt_bias": 0.1 * weights(features),
        "norm_weight": 1 + 0.1 * weights(size),
        "past_conv_state": data(batch, 3 * features, width - 1),
        "past_recurrent_state": 0.3 * data(batch, heads, size, size),
        "sequence_lengths": np.array(lengths),
    }
    if regime == "resets":
        arrays["decay"] = np.where(arrays["decay"] > 0, 300.0, -9.0)
    if regime == "repeated":
        arrays["qkv"][:] = arrays["qkv"][:, :1]
        arrays["beta"][:] = 20.0
    return _typed(arrays)


def kda_reference(arrays: Arrays, attributes: Mapping[str, AttributeValue]) -> list[np.ndarray]:
    return in_float64(kimi_delta_attention, arrays, {**attributes, "form": "recurrent"})


def mla_attributes(heads: int = 4) -> Attributes:
    """No two sizes are the same, so that no mix-up goes unseen."""
    return {
        "num_heads": heads,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 8,
        "v_head_dim": 20,
        "kv_lora_rank": 40,
        "scale": 24**-0.5,
    }


def mla_arrays(
    attributes: Mapping[str, AttributeValue],
    past: Sequence[int],
    lengths: Sequence[int],
    steps: int,
    capacity: int,
) -> Arrays:
    heads, nope, rope, value, rank = (
        int(attributes[n]) for n in ("num_heads", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "kv_lora_rank")
    )
    weights, data = _normal(78), _normal(steps * 7 + capacity)
    return _typed(
        {
            "query": data(len(past), steps, heads * (nope + rope)),
            "latent": data(len(past), steps, rank + rope),
            "kv_b_weight": weights(heads * (nope + value), rank) * rank**-0.5,
            "past_latent": data(len(past), capacity, rank + rope),
            "past_lengths": np.array(past),
            "sequence_lengths": np.array(lengths),
        }
    )


def mla_reference(arrays: Arrays, attributes: Mapping[str, AttributeValue]) -> list[np.ndarray]:
    return in_float64(latent_attention, arrays, {**attributes, "form": "expanded"})


def moe_attributes(
    experts: int = 16, top_k: int = 4, groups: int = 1, kept: int = 1, renormalize: int = 1
) -> Attributes:
    return {
        "num_experts": experts,
        "intermediate": 24,
        "top_k": top_k,
        "n_group": groups,
        "topk_group": kept,
        "renormalize": renormalize,
        "routed_scaling_factor": 2.446,
    }


def moe_arrays(
    attributes: Mapping[str, AttributeValue], batch: int, steps: int, logit_shift: float = 0.0, hidden: int = 32
) -> Arrays:
    """`logit_shift` is added to every router logit, through a constant feature of the input."""
    experts, intermediate = int(attributes["num_experts"]), int(attributes["intermediate"])
    weights, data = _normal(79), _normal(steps * 7 + batch)
    arrays = {
        "hidden_states": data(batch, steps, hidden),
        "router_weight": 0.3 * weights(experts, hidden),
        "router_bias": 0.3 * weights(experts),
        "gate_up_weight": 0.2 * weights(experts, 2 * intermediate, hidden),
        "down_weight": 0.2 * weights(experts, hidden, intermediate),
    }
    if logit_shift:
        arrays["hidden_states"][..., 0] = 1.0
        arrays["router_weight"][:, 0] += logit_shift
    return _typed(arrays)


def moe_reference(arrays: Arrays, attributes: Mapping[str, AttributeValue]) -> list[np.ndarray]:
    return in_float64(mixture_of_experts, arrays, attributes)


def poisoned(arrays: Arrays, names: Sequence[str]) -> Arrays:
    """A copy with NaN in every padded step of the inputs called `names`."""
    result = dict(arrays)
    for name in names:
        result[name] = arrays[name].copy()
        for row, length in enumerate(arrays["sequence_lengths"]):
            result[name][row, length:] = np.nan
    return result


def padding_is_zero(output: np.ndarray, lengths: Sequence[int]) -> bool:
    return all(not output[row, length:].any() for row, length in enumerate(lengths))


def in_dtype(spec: OpSpec, arrays: Arrays, dtype: Dtype) -> Arrays:
    """The arrays of `T` ports cast to `dtype`."""
    return {n: a.astype(NUMPY_DTYPES[dtype]) if spec.input(n).dtype == "T" else a for n, a in arrays.items()}


def assert_close(actual: np.ndarray, expected: np.ndarray, name: str = "float32") -> None:
    difference = compare(actual.astype(np.float64), expected)
    assert difference.within(tolerance(name)), difference


def _normal(seed: int):  # type: ignore[no-untyped-def]
    generator = np.random.default_rng(seed)
    return lambda *shape: generator.standard_normal(shape)


def _typed(arrays: Arrays) -> Arrays:
    return {n: a.astype(np.int32 if a.dtype.kind == "i" else np.float32) for n, a in arrays.items()}


def in_float64(op, arrays: Arrays, attributes: Mapping[str, object]) -> list[np.ndarray]:  # type: ignore[no-untyped-def]
    tensors = {n: torch.from_numpy(a if a.dtype.kind in "iu" else a.astype(np.float64)) for n, a in arrays.items()}
    results = op(**tensors, **attributes)
    return [r.numpy() for r in (results if isinstance(results, tuple) else (results,))]
