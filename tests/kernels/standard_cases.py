"""Inputs of the standard's operators, and float64 evaluations of their definitions to compare kernels with."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from kimi_deploy.kernels.standard import StandardKernels
from kimi_deploy.ops.spec import AttributeValue
from kimi_deploy.validate.compare import compare
from kimi_deploy.validate.tolerances import tolerance

from .cases import DTYPES, Arrays, Attributes
from .device import Device, run_guarded


def linear_attention_case(
    *,
    rule: str = "gated_delta",
    batch: int = 1,
    steps: int = 4,
    q_heads: int = 2,
    kv_heads: int = 2,
    key_heads: int | None = None,
    key_dim: int = 16,
    value_dim: int = 24,
    dtype: str = "float32",
    state_dtype: str | None = "float32",
    decay: str = "key",
    shared_beta: bool = False,
    scale: float = 0.0,
    strength: float = 0.5,
    seed: int = 0,
) -> tuple[Arrays, Attributes]:
    """Inputs and attributes of one node. `decay`: per "key" channel or per "head", log decays of about -`strength`.

    Keys have length one, as the schema asks for with the delta rules. `state_dtype` None: no past state.
    """
    rng = np.random.default_rng(seed)
    key_heads = kv_heads if key_heads is None else key_heads
    type_ = DTYPES[dtype]

    def normal(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape)

    key = normal(batch, steps, key_heads, key_dim)
    key /= np.linalg.norm(key, axis=-1, keepdims=True)
    arrays = {
        "query": normal(batch, steps, q_heads * key_dim),
        "key": key.reshape(batch, steps, key_heads * key_dim),
        "value": normal(batch, steps, kv_heads * value_dim),
    }
    if rule in ("gated", "gated_delta"):
        width = kv_heads * (key_dim if decay == "key" else 1)
        arrays["decay"] = -strength * rng.gamma(1.0, size=(batch, steps, width))
    if rule in ("delta", "gated_delta"):
        arrays["beta"] = rng.uniform(size=(batch, steps, 1 if shared_beta else kv_heads))
    arrays = {name: a.astype(type_) for name, a in arrays.items()}
    if state_dtype is not None:
        arrays["past_state"] = (0.5 * normal(batch, kv_heads, key_dim, value_dim)).astype(DTYPES[state_dtype])
    attributes: Attributes = {"q_num_heads": q_heads, "kv_num_heads": kv_heads, "update_rule": rule, "scale": scale}
    return arrays, attributes


def linear_attention_oracle(arrays: Mapping[str, np.ndarray], attributes: Mapping[str, AttributeValue]) -> Arrays:
    """The operator's definition in float64, on exactly these inputs. Key and query heads may be fewer than states."""
    rule, states = attributes["update_rule"], int(attributes["kv_num_heads"])
    queries = int(attributes["q_num_heads"])
    a = {name: array.astype(np.float64) for name, array in arrays.items()}
    batch, steps = a["query"].shape[:2]
    K, V = a["query"].shape[2] // queries, a["value"].shape[2] // states
    heads = max(queries, states)  # of the output

    def per_head(x: np.ndarray, size: int, wanted: int) -> np.ndarray:
        x = x.reshape(batch, steps, -1, size)
        return np.repeat(x, wanted // x.shape[2], axis=2)

    q, k, v = per_head(a["query"], K, heads), per_head(a["key"], K, states), per_head(a["value"], V, states)
    S = a.get("past_state", np.zeros((batch, states, K, V)))
    output = np.zeros((batch, steps, heads, V))
    for t in range(steps):
        if rule in ("gated", "gated_delta"):
            g = a["decay"][:, t].reshape(batch, states, -1)
            S = S * np.exp(g)[..., None]
        written = v[:, t]
        if rule in ("delta", "gated_delta"):
            beta = np.broadcast_to(a["beta"][:, t], (batch, states))
            written = beta[..., None] * (written - np.einsum("bhkv,bhk->bhv", S, k[:, t]))
        S = S + k[:, t, :, :, None] * written[:, :, None]
        output[:, t] = np.einsum("bhkv,bhk->bhv", np.repeat(S, heads // states, axis=1), q[:, t])
    scale = float(attributes.get("scale", 0.0)) or K**-0.5
    return {"output": scale * output.reshape(batch, steps, heads * V), "present_state": S}


def run_linear_attention(
    device: Device,
    arrays: Mapping[str, np.ndarray],
    attributes: Mapping[str, AttributeValue],
    *,
    state_dtype: str | None = None,
    in_place: bool = False,
) -> Arrays:
    """The kernel on host arrays, outputs poisoned, between guards.

    The present state is of `state_dtype`, if given, else of past_state's or query's type.
    """
    kernels = StandardKernels(device.kernels.library)
    queries, states = int(attributes["q_num_heads"]), int(attributes["kv_num_heads"])
    query, value = arrays["query"], arrays["value"]
    batch, steps = query.shape[:2]
    K, V = query.shape[2] // queries, value.shape[2] // states
    type_ = DTYPES[state_dtype] if state_dtype else arrays.get("past_state", query).dtype
    outputs = {
        "output": np.full((batch, steps, max(queries, states) * V), np.nan, query.dtype),
        "present_state": np.full((batch, states, K, V), np.nan, type_),
    }
    return run_guarded(
        device,
        lambda views, workspace: kernels.linear_attention(views, attributes, workspace=workspace),
        arrays,
        outputs,
        {"present_state": "past_state"} if in_place else {},
        lambda views: kernels.workspace_size(views, attributes),
    )


def causal_conv_case(
    *,
    batch: int = 2,
    channels: int = 5,
    steps: int = 8,
    width: int = 4,
    dtype: str = "float32",
    bias: bool = True,
    past: bool = True,
    activation: str = "silu",
    seed: int = 0,
) -> tuple[Arrays, Attributes]:
    rng = np.random.default_rng(seed)
    arrays = {
        "input": rng.standard_normal((batch, channels, steps)),
        "weight": rng.standard_normal((channels, 1, width)) * width**-0.5,
    }
    if bias:
        arrays["bias"] = rng.standard_normal(channels)
    if past:
        arrays["past_state"] = rng.standard_normal((batch, channels, width - 1))
    return {name: a.astype(DTYPES[dtype]) for name, a in arrays.items()}, {"activation": activation}


def causal_conv_oracle(arrays: Mapping[str, np.ndarray], attributes: Mapping[str, AttributeValue]) -> Arrays:
    """The operator's definition in float64, but for the rounding of the convolution to the data type."""
    x, weight = arrays["input"], arrays["weight"][:, 0].astype(np.float64)
    width = weight.shape[1]
    past = arrays.get("past_state", np.zeros((*x.shape[:2], width - 1), x.dtype))
    whole = np.concatenate([past, x], axis=2)
    y = sum(weight[:, j, None] * whole[:, :, j : j + x.shape[2]] for j in range(width))
    if "bias" in arrays:
        y = y + arrays["bias"].astype(np.float64)[:, None]
    if attributes["activation"] != "none":
        y = y if x.dtype == np.float32 else y.astype(x.dtype).astype(np.float64)
        y = y / (1 + np.exp(-y))
    return {"output": y, "present_state": whole[:, :, whole.shape[2] - (width - 1) :]}


def run_causal_conv(
    device: Device,
    arrays: Mapping[str, np.ndarray],
    attributes: Mapping[str, AttributeValue],
    *,
    in_place: bool = False,
) -> Arrays:
    """The kernel on host arrays, outputs poisoned, between guards."""
    kernels = StandardKernels(device.kernels.library)
    x, width = arrays["input"], arrays["weight"].shape[2]
    outputs = {
        "output": np.full(x.shape, np.nan, x.dtype),
        "present_state": np.full((*x.shape[:2], width - 1), np.nan, x.dtype),
    }
    return run_guarded(
        device,
        lambda views, _: kernels.causal_conv(views, attributes),
        arrays,
        outputs,
        {"present_state": "past_state"} if in_place else {},
    )


def check_linear_attention(results: Mapping[str, np.ndarray], expected: Mapping[str, np.ndarray]) -> None:
    """Output and state, each within the tolerance for its data type."""
    for name in ("output", "present_state"):
        _check(name, results, expected, "linear_attention")


def check_causal_conv(results: Mapping[str, np.ndarray], expected: Mapping[str, np.ndarray]) -> None:
    """The output within the tolerance for its data type, the state to the bit."""
    _check("output", results, expected, "causal_conv")
    assert results["present_state"].tobytes() == expected["present_state"].tobytes()


def _check(name: str, results: Mapping[str, np.ndarray], expected: Mapping[str, np.ndarray], op: str) -> None:
    entry = tolerance(f"{op}_{results[name].dtype}")
    difference = compare(results[name], expected[name])
    assert difference.within(entry), f"{name} against {entry.name}: {difference}"
