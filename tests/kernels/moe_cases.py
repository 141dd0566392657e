"""Inputs of the MixtureOfExperts kernels, the float64 reference they are compared with, and running them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from kimi_deploy.kernels.moe import MoeKernels
from kimi_deploy.ops.mixture_of_experts.reference import mixture_of_experts
from kimi_deploy.ops.spec import AttributeValue
from kimi_deploy.validate.compare import compare
from kimi_deploy.validate.tolerances import tolerance

from .cases import DTYPES, Arrays, Attributes
from .device import Device, run_guarded


def moe_case(
    *,
    batch: int = 1,
    steps: int = 4,
    hidden: int = 64,
    inner: int = 32,
    experts: int = 8,
    top_k: int = 2,
    groups: int = 1,
    kept_groups: int = 1,
    renormalize: int = 1,
    dtype: str = "float32",
    seed: int = 0,
) -> tuple[Arrays, Attributes]:
    """Inputs and attributes of one node; expert 0 is favoured, so that it has more tokens than others."""
    rng = np.random.default_rng(seed)

    def normal(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape).astype(DTYPES[dtype])

    bias = (0.2 * rng.standard_normal(experts)).astype(np.float32)
    bias[0] += 0.3
    arrays = {
        "hidden_states": normal(batch, steps, hidden),
        "router_weight": normal(experts, hidden) * DTYPES[dtype](2 * hidden**-0.5),
        "router_bias": bias,
        "gate_up_weight": normal(experts, 2 * inner, hidden) * DTYPES[dtype](hidden**-0.5),
        "down_weight": normal(experts, hidden, inner) * DTYPES[dtype](inner**-0.5),
    }
    attributes: Attributes = {
        "num_experts": experts,
        "intermediate": inner,
        "top_k": top_k,
        "n_group": groups,
        "topk_group": kept_groups,
        "renormalize": renormalize,
        "routed_scaling_factor": 2.446,
    }
    return arrays, attributes


def moe_oracle(arrays: Mapping[str, np.ndarray], attributes: Mapping[str, AttributeValue]) -> np.ndarray:
    """The op's reference in float64, on exactly these inputs."""
    tensors = {name: torch.from_numpy(a.astype(np.float64)) for name, a in arrays.items()}
    given: dict[str, Any] = dict(attributes)
    return mixture_of_experts(**tensors, **given).numpy()


def run_moe(device: Device, arrays: Mapping[str, np.ndarray], attributes: Mapping[str, AttributeValue]) -> np.ndarray:
    """The kernels on host arrays, output and workspace poisoned, between guards."""
    kernels = MoeKernels(device.kernels.library)
    results = run_guarded(
        device,
        lambda views, workspace: kernels.run(views, attributes, workspace=workspace),
        arrays,
        {"output": np.full_like(arrays["hidden_states"], np.nan)},
        {},
        lambda views: kernels.workspace_size(views, attributes),
    )
    return results["output"]


def check_moe(actual: np.ndarray, arrays: Mapping[str, np.ndarray], attributes: Mapping[str, AttributeValue]) -> None:
    """Within the tolerance for the data type."""
    dtype = str(actual.dtype)
    entry = tolerance("float32" if dtype == "float32" else f"op_{dtype}")
    difference = compare(actual, moe_oracle(arrays, attributes))
    assert difference.within(entry), f"{entry.name}: {difference}"
