"""QuantizedMixtureOfExperts in plain torch, on any device: weights made float, inputs rounded as the contract says."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from kimi_deploy.errors import ContractError
from kimi_deploy.ops.mixture_of_experts.reference import route


def dequantize(
    levels: torch.Tensor, scales: torch.Tensor, zero_points: torch.Tensor | None, bits: int, dtype: torch.dtype
) -> torch.Tensor:
    """Weights [..., in] of `dtype`; packed levels [..., in*bits/8], scales [..., in/group], packed zero points."""
    values = unpack(levels, bits).to(dtype).unflatten(-1, (scales.shape[-1], -1))
    zero = unpack(zero_points, bits)[..., : scales.shape[-1]].to(dtype)[..., None] if zero_points is not None else None
    return ((values - (zero if zero is not None else 1 << (bits - 1))) * scales.to(dtype)[..., None]).flatten(-2)


def unpack(packed: torch.Tensor, bits: int) -> torch.Tensor:
    """uint8 values [..., n] of packed bytes [..., n*bits/8]."""
    return packed if bits == 8 else torch.stack([packed & 15, packed >> 4], dim=-1).flatten(-2)


def rounded(x: torch.Tensor, group: int) -> torch.Tensor:
    """x [..., n] with every `group` consecutive elements rounded to 127 steps of their largest magnitude, float32.

    The scale's reciprocal is computed and multiplied with, in float32: where a value lies halfway between two steps,
    a division would go the other way than the kernels do.
    """
    blocks = x.float().unflatten(-1, (-1, group))
    scale = blocks.abs().amax(-1, keepdim=True) / 127
    steps = torch.round(blocks * torch.where(scale > 0, 1 / scale, 0))
    return (steps * scale).flatten(-2).to(x.dtype)


def quantized_mixture_of_experts(
    hidden_states: torch.Tensor,
    router_weight: torch.Tensor,
    router_bias: torch.Tensor,
    gate_up_levels: torch.Tensor,
    gate_up_scales: torch.Tensor,
    down_levels: torch.Tensor,
    down_scales: torch.Tensor,
    gate_up_zero_points: torch.Tensor | None = None,
    down_zero_points: torch.Tensor | None = None,
    *,
    num_experts: int,
    intermediate: int,
    top_k: int,
    n_group: int,
    topk_group: int,
    renormalize: int,
    routed_scaling_factor: float,
    bits: int,
    block_size: int,
    symmetric: int,
    activations: str,
) -> torch.Tensor:
    """The op; ports and attributes as in `spec.SPEC`. Everything is computed in float32 (float64 for float64 inputs).

    Only experts that some token chose are computed, and made float, one at a time. Raises ContractError when zero
    points are there and `symmetric` says otherwise, or the reverse.
    """
    absent = [x is None for x in (gate_up_zero_points, down_zero_points)]
    if absent != [bool(symmetric)] * 2:
        raise ContractError(
            "QuantizedMixtureOfExperts: zero points do not fit the attribute symmetric",
            seen=f"symmetric {symmetric}, absent {absent}",
            expected="both absent with 1, both given with 0",
        )
    wide = torch.promote_types(hidden_states.dtype, torch.float32)
    tokens = hidden_states.flatten(0, 1).to(wide)
    chosen, weights = route(
        tokens,
        router_weight.to(wide),
        router_bias.to(wide),
        top_k=top_k,
        n_group=n_group,
        topk_group=topk_group,
        renormalize=bool(renormalize),
        routed_scaling_factor=routed_scaling_factor,
    )

    def product(x: torch.Tensor, expert: int, *operands: torch.Tensor | None) -> torch.Tensor:
        levels, scales, zeros = (o[expert] if o is not None else None for o in operands)
        assert levels is not None
        assert scales is not None
        read = rounded(x, block_size) if activations == "int8" else x
        return read @ dequantize(levels, scales, zeros, bits, wide).T

    result = torch.zeros_like(tokens)
    for expert in chosen.unique().tolist():
        token, place = torch.where(chosen == expert)
        rows = product(tokens[token], expert, gate_up_levels, gate_up_scales, gate_up_zero_points)
        gate, up = rows.unflatten(-1, (-1, 2)).unbind(-1)
        out = product(F.silu(gate) * up, expert, down_levels, down_scales, down_zero_points)
        result = result.index_add(0, token, out * weights[token, place, None])
    return result.to(hidden_states.dtype).view_as(hidden_states)
