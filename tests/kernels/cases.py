"""Inputs of the KDA kernels, easy and hostile, and the float64 recurrence they are compared with."""

from __future__ import annotations

from collections.abc import Mapping

import ml_dtypes
import numpy as np

from kimi_deploy.ops.spec import AttributeValue
from kimi_deploy.validate.compare import compare
from kimi_deploy.validate.tolerances import tolerance

DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
GATES = ("softplus", "bounded")
LENGTHS = (1, 2, 3, 15, 16, 17, 31, 32, 33, 63, 64, 65, 130, 500, 4096)
DISTRIBUTIONS = ("plain", "strong", "vanishing", "slow", "correlated", "repeated", "beta_extremes", "zero_rows")

Arrays = dict[str, np.ndarray]
Attributes = dict[str, AttributeValue]


def attributes_of(heads: int, dim: int, gate: str) -> Attributes:
    return {
        "num_heads": heads,
        "head_dim": dim,
        "norm_eps": 1e-5,
        "scale": dim**-0.5,
        "gate": gate,
        "gate_lower_bound": -5.0 if gate == "bounded" else 0.0,
    }


def make_case(
    *,
    batch: int = 1,
    steps: int = 16,
    heads: int = 1,
    dim: int = 64,
    dtype: str = "bfloat16",
    gate: str = "softplus",
    distribution: str = "plain",
    entries: int | None = None,
    seed: int = 0,
) -> tuple[Arrays, Attributes]:
    """The op's inputs and attributes. States are not zero; `entries` is the batch of the states, if not `batch`.

    plain: gates around a released model's initialisation. strong: decays of e^-8 per step and more, e^-88 within a
    tile. vanishing: some steps forget everything (g = -1e4). slow: 1e-4 to 1e-2 per step. correlated: slow, keys
    nearly alike. repeated: slow, one token again and again. beta_extremes: beta 0 and 1. zero_rows: q and k are 0.
    """
    rng = np.random.default_rng(seed)
    entries = batch if entries is None else entries
    HD = heads * dim

    def normal(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape)

    qkv, decay, beta = normal(batch, steps, 3 * HD), normal(batch, steps, HD), normal(batch, steps, heads)
    A_log = np.log(rng.uniform(1, 4, heads))
    dt_bias = normal(HD) - 3
    if distribution == "strong":
        decay = decay + 12
    elif distribution == "vanishing":
        decay = np.where(rng.uniform(size=decay.shape) < 0.2, 1e4, decay)
    elif distribution in ("slow", "correlated", "repeated"):
        A_log = np.zeros(heads)
        dt_bias = np.log(10 ** rng.uniform(-4, -2, HD))
        if gate == "bounded":
            dt_bias = dt_bias - np.log(5)
        decay = decay * 0.1
        if distribution == "correlated":
            qkv[..., HD : 2 * HD] = qkv[:, :1, HD : 2 * HD] + 0.05 * qkv[..., HD : 2 * HD]
            beta = beta + 2
        elif distribution == "repeated":
            qkv, decay, beta = (np.repeat(x[:, :1], steps, axis=1) for x in (qkv, decay, beta))
            beta = beta + 2
    elif distribution == "beta_extremes":
        beta = np.where(rng.uniform(size=beta.shape) < 0.5, -1e4, 1e4)
    elif distribution == "zero_rows":
        dead = rng.uniform(size=(batch, steps)) < 0.3
        qkv[..., : 2 * HD][dead] = 0
        if steps > 12:
            qkv[:, 4:12, : 2 * HD] = 0  # longer than the convolution, so that q and k themselves are 0
    type_ = DTYPES[dtype]
    arrays = {
        "qkv": qkv.astype(type_),
        "decay": decay.astype(type_),
        "beta": beta.astype(type_),
        "output_gate": normal(batch, steps, HD).astype(type_),
        "conv_weight": (0.5 * normal(3 * HD, 4)).astype(type_),
        "A_log": A_log.astype(np.float32),
        "dt_bias": dt_bias.astype(np.float32),
        "norm_weight": (1 + 0.1 * normal(dim)).astype(type_),
        "past_conv_state": normal(entries, 3 * HD, 3).astype(type_),
        "past_recurrent_state": (0.3 * normal(entries, heads, dim, dim)).astype(np.float32),
    }
    return arrays, attributes_of(heads, dim, gate)


def oracle(arrays: Mapping[str, np.ndarray], attributes: Mapping[str, AttributeValue]) -> dict[str, np.ndarray]:
    """The float64 recurrence on exactly these inputs; ports as in the op's spec."""
    # here, so that the sanitised run, in a process of its own, needs no torch
    import torch

    from kimi_deploy.ops.kimi_delta_attention.reference import kimi_delta_attention

    tensors = {name: torch.from_numpy(a if a.dtype == np.int32 else a.astype(np.float64)) for name, a in arrays.items()}
    results = kimi_delta_attention(**tensors, **attributes, form="recurrent")
    names = ("output", "present_conv_state", "present_recurrent_state")
    return {name: x.numpy() for name, x in zip(names, results, strict=True)}


def check(results: Mapping[str, np.ndarray], expected: Mapping[str, np.ndarray], bound: str | tuple[str, str]) -> None:
    """Output and recurrent state within two tolerances, `bound`_output and `bound`_state; the conv state exactly."""
    output, state = (f"{bound}_output", f"{bound}_state") if isinstance(bound, str) else bound
    for name, entry in (("output", output), ("present_recurrent_state", state)):
        difference = compare(results[name].astype(np.float64), expected[name])
        assert difference.within(tolerance(entry)), f"{name} against {entry}: {difference}"
    np.testing.assert_array_equal(results["present_conv_state"].astype(np.float64), expected["present_conv_state"])
