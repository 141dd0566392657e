"""KimiDeltaAttention in plain torch, on any device: the definition that every other implementation is compared with."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F

from kimi_deploy.errors import ContractError
from kimi_deploy.ops.kimi_delta_attention.delta_rule import chunkwise_kda, recurrent_kda
from kimi_deploy.ops.kimi_delta_attention.spec import L2_NORM_EPS

LONGEST_RECURRENCE = 16
"""Tokens of a call up to which the recurrence is the quicker form."""

Form = Literal["auto", "recurrent", "chunkwise"]


def log_decay(
    decay: torch.Tensor, A_log: torch.Tensor, dt_bias: torch.Tensor, gate: str, lower_bound: float
) -> torch.Tensor:
    """g [batch, sequence, heads, dim] from decay [batch, sequence, heads*dim], A_log [heads], dt_bias [heads*dim].

    softplus gate: -exp(A_log) softplus(decay + dt_bias) (Kimi-Linear-48B);
    bounded gate: lower_bound sigmoid(exp(A_log) (decay + dt_bias)) (GLM-5-Next's forget gate).
    """
    x = (decay + dt_bias).unflatten(-1, (A_log.shape[0], -1))
    rate = A_log.exp()[:, None]
    if gate == "softplus":
        return -rate * F.softplus(x)
    return lower_bound * torch.sigmoid(rate * x)


def causal_conv_silu(x: torch.Tensor, weight: torch.Tensor, past: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """SiLU of the depthwise causal convolution of x [batch, sequence, channels] after past [batch, channels, width-1].

    Returns it and all columns, past and new, [batch, channels, width-1+sequence].
    """
    columns = torch.cat([past, x.transpose(1, 2)], dim=-1)
    mixed = F.conv1d(columns, weight[:, None], groups=weight.shape[0])
    return F.silu(mixed).transpose(1, 2), columns


def l2_norm(x: torch.Tensor) -> torch.Tensor:
    """x over sqrt(sum of squares + 1e-6) on the last axis."""
    return x / torch.sqrt((x * x).sum(-1, keepdim=True) + L2_NORM_EPS)


def kimi_delta_attention(
    qkv: torch.Tensor,
    decay: torch.Tensor,
    beta: torch.Tensor,
    output_gate: torch.Tensor,
    conv_weight: torch.Tensor,
    A_log: torch.Tensor,
    dt_bias: torch.Tensor,
    norm_weight: torch.Tensor,
    past_conv_state: torch.Tensor,
    past_recurrent_state: torch.Tensor,
    sequence_lengths: torch.Tensor | None = None,
    *,
    num_heads: int,
    head_dim: int,
    norm_eps: float,
    scale: float,
    gate: str,
    gate_lower_bound: float,
    form: Form = "auto",
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The op; ports and attributes as in `spec.SPEC`. float64 inputs are computed in float64, all others in float32.

    `form` chooses the recurrence or the chunkwise form; "auto" takes the recurrence up to LONGEST_RECURRENCE tokens.
    Returns output, present_conv_state, present_recurrent_state; none aliases an input.
    Raises ContractError when a sequence length is below 0 or above the steps.
    """
    dtype = qkv.dtype
    wide = torch.promote_types(dtype, torch.float32)
    steps = qkv.shape[1]
    valid = _valid_steps(qkv, sequence_lengths)

    def widen(x: torch.Tensor) -> torch.Tensor:
        """In the computing dtype, with padded steps zeroed: whatever they hold, NaN included, must not spread."""
        return torch.where(valid[..., None], x.to(wide), 0.0)

    qkv, decay, beta, output_gate = widen(qkv), widen(decay), widen(beta), widen(output_gate)
    mixed, columns = causal_conv_silu(qkv, conv_weight.to(wide), past_conv_state.to(wide))
    q, k, v = (x.unflatten(-1, (num_heads, head_dim)) for x in mixed.chunk(3, dim=-1))
    g = log_decay(decay, A_log.to(wide), dt_bias.to(wide), gate, gate_lower_bound)
    # a padded step neither forgets nor writes
    g = torch.where(valid[..., None, None], g, 0.0)
    b = torch.where(valid[..., None], torch.sigmoid(beta), 0.0)

    rule = recurrent_kda if form == "recurrent" or (form == "auto" and steps <= LONGEST_RECURRENCE) else chunkwise_kda
    o, state = rule(l2_norm(q), l2_norm(k), v, g, b, past_recurrent_state.to(wide), scale)
    o = o * torch.rsqrt(o.pow(2).mean(-1, keepdim=True) + norm_eps) * norm_weight.to(wide)
    output = o.flatten(-2) * torch.sigmoid(output_gate)
    output = torch.where(valid[..., None], output, 0.0).to(dtype)

    width = conv_weight.shape[1]
    lengths = valid.sum(dim=1)
    last = lengths[:, None] + torch.arange(width - 1, device=qkv.device)
    conv_state = columns.gather(2, last[:, None].expand(-1, columns.shape[1], -1)).to(dtype)
    # x + 0 turns -0 into 0: a row without a step keeps its states to the bit
    idle = (lengths == 0)[:, None, None]
    conv_state = torch.where(idle, past_conv_state, conv_state)
    state_dtype = past_recurrent_state.dtype
    state = torch.where(idle[..., None], past_recurrent_state, state.to(state_dtype))
    return output, conv_state, state


def _valid_steps(x: torch.Tensor, sequence_lengths: torch.Tensor | None) -> torch.Tensor:
    """bool [batch, sequence]: which steps count."""
    steps = torch.arange(x.shape[1], device=x.device)
    if sequence_lengths is None:
        return torch.ones_like(steps, dtype=torch.bool).expand(x.shape[0], -1)
    if int(sequence_lengths.min()) < 0 or int(sequence_lengths.max()) > x.shape[1]:
        raise ContractError(
            "KimiDeltaAttention: a length is out of range",
            seen=f"sequence_lengths {sequence_lengths.tolist()}",
            expected=f"from 0 to {x.shape[1]}, the steps of this call",
        )
    return steps < sequence_lengths[:, None]
