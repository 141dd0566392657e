"""The source model with quantised weights: what an export with `--quantize` is compared with."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

from kimi_deploy.model.causal_lm import KimiLinearForCausalLM
from kimi_deploy.model.layers import MixtureOfExperts
from kimi_deploy.ops.quantized_mixture_of_experts.reference import dequantize, rounded
from kimi_deploy.quantization.scheme import Scheme
from kimi_deploy.quantization.selection import quantized_parameters

Stored = Callable[[str], np.ndarray]
"""The value of an initializer of the export, by name."""


def quantize_model(model: KimiLinearForCausalLM, stored: Stored, scheme: Scheme) -> None:
    """Make the float32 `model` compute what the export of `scheme` should: weights from the levels it stores.

    With int8 activations the inputs of quantised products are rounded by groups, as the kernels round them.
    """
    operands: dict[str, dict[str, torch.Tensor]] = {}
    for name, role in quantized_parameters(model.config, scheme).items():
        parts = ("levels", "scales") if scheme.symmetric else ("levels", "scales", "zero_points")
        values = {part: torch.from_numpy(np.array(stored(f"{name}_{part}"))) for part in parts}
        if role == "experts":
            operands[name] = values
            continue
        levels = values["levels"].flatten(1)
        weight = dequantize(levels, values["scales"], values.get("zero_points"), scheme.bits, torch.float32)
        module = model.get_submodule(name.removesuffix(".weight"))
        module.weight = nn.Parameter(weight, requires_grad=False)
        if role == "product" and scheme.activations == "int8":
            module.register_forward_pre_hook(rounding(scheme))
    for layer in model.model.layers:
        name = f"model.layers.{layer.layer}.mlp.experts."
        if isinstance(layer.mlp, MixtureOfExperts):
            layer.mlp = QuantizedMixtureOfExperts(
                layer.mlp, operands[f"{name}gate_up_proj"], operands[f"{name}down_proj"], scheme
            )


def rounding(scheme: Scheme) -> Callable[[nn.Module, tuple[torch.Tensor, ...]], tuple[torch.Tensor, ...]]:
    """A forward pre-hook that rounds a product's input as the kernels of `scheme`, whose group is settled, round it."""
    assert scheme.group is not None
    group = scheme.group

    def hook(module: nn.Module, arguments: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return (rounded(arguments[0], group),)

    return hook


class QuantizedMixtureOfExperts(MixtureOfExperts):
    """`torch.ops.kimi.quantized_mixture_of_experts` beside the router and the shared experts of the float module."""

    def __init__(
        self,
        base: MixtureOfExperts,
        gate_up: Mapping[str, torch.Tensor],
        down: Mapping[str, torch.Tensor],
        scheme: Scheme,
    ) -> None:
        nn.Module.__init__(self)
        self.gate, self.shared_experts = base.gate, base.shared_experts
        self.operands = (gate_up["levels"], gate_up["scales"], down["levels"], down["scales"])
        self.zero_points = (gate_up.get("zero_points"), down.get("zero_points"))
        own: dict[str, Any] = {
            "bits": scheme.bits,
            "block_size": scheme.group,
            "symmetric": int(scheme.symmetric),
            "activations": scheme.activations,
        }
        self.attributes = base.attributes | own

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        routed = torch.ops.kimi.quantized_mixture_of_experts(
            x, self.gate.weight, self.gate.e_score_correction_bias, *self.operands, *self.zero_points, **self.attributes
        )
        return routed if self.shared_experts is None else routed + self.shared_experts(x)
