"""Inputs of QuantizedMixtureOfExperts for the tests, and what the float64 reference makes of them."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from kimi_deploy.ops.quantized_mixture_of_experts.reference import quantized_mixture_of_experts
from kimi_deploy.ops.spec import AttributeValue
from kimi_deploy.quantization.blocks import pack, quantize
from tests.ops.body_cases import Arrays, Attributes, in_float64, moe_attributes

HIDDEN, INTERMEDIATE = 96, 64


def quantized_attributes(
    bits: int = 4,
    symmetric: int = 0,
    activations: str = "float32",
    block_size: int = 32,
    **routing: int,
) -> Attributes:
    return {
        **moe_attributes(**routing),
        "intermediate": INTERMEDIATE,
        "bits": bits,
        "block_size": block_size,
        "symmetric": symmetric,
        "activations": activations,
    }


def quantized_arrays(attributes: Mapping[str, AttributeValue], batch: int, steps: int, hidden: int = HIDDEN) -> Arrays:
    names = ("num_experts", "bits", "block_size", "intermediate")
    experts, bits, group, intermediate = (int(attributes[n]) for n in names)
    weights, data = np.random.default_rng(80), np.random.default_rng(steps * 7 + batch)
    arrays = {
        "hidden_states": data.standard_normal((batch, steps, hidden)),
        "router_weight": 0.3 * weights.standard_normal((experts, hidden)),
        "router_bias": 0.3 * weights.standard_normal(experts),
    }
    arrays = {n: a.astype(np.float32) for n, a in arrays.items()}
    for name, shape in (("gate_up", (experts, 2 * intermediate, hidden)), ("down", (experts, hidden, intermediate))):
        # a mean beside zero, so that zero points are not all the same
        value = (0.2 * weights.standard_normal(shape) + 0.1 * weights.standard_normal((*shape[:2], 1))).astype(
            np.float32
        )
        made = quantize(value, bits, group, symmetric=bool(attributes["symmetric"]), method="rtn")
        arrays |= {f"{name}_levels": pack(made.levels, bits), f"{name}_scales": made.scales}
        if not attributes["symmetric"]:
            arrays[f"{name}_zero_points"] = pack(made.zero_points, bits)
    return arrays


def quantized_reference(arrays: Arrays, attributes: Mapping[str, AttributeValue]) -> list[np.ndarray]:
    return in_float64(quantized_mixture_of_experts, arrays, attributes)
