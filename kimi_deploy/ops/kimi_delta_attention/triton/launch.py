"""The op on Triton kernels: one kernel for a few steps, three for a prefill."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
import triton
import triton.language as tl

from kimi_deploy.errors import ContractError
from kimi_deploy.ops.kimi_delta_attention.cuda import MAX_HEAD_DIM
from kimi_deploy.ops.kimi_delta_attention.spec import L2_NORM_EPS
from kimi_deploy.ops.kimi_delta_attention.triton.chain import kda_chain
from kimi_deploy.ops.kimi_delta_attention.triton.decode import kda_decode
from kimi_deploy.ops.kimi_delta_attention.triton.gated_norm import kda_gated_norm
from kimi_deploy.ops.kimi_delta_attention.triton.prep import kda_prep
from kimi_deploy.ops.kimi_delta_attention.triton.tiling import Tiling, prefill_tiling

DECODE_STEPS = 16
"""Longest call that the decode kernel takes."""
NORM_ROWS = 16


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
    present_conv_state: torch.Tensor | None = None,
    present_recurrent_state: torch.Tensor | None = None,
    tiling: Tiling | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The op; ports and attributes as in `spec.SPEC`, float16, bfloat16 or float32 data of checked shapes.

    The recurrent state may also be float16 or bfloat16. The present states may be given, contiguous, and may be the
    past ones; otherwise they are new. `tiling` replaces the device's own. Nothing is synchronised or read back, so
    that a CUDA graph can hold it. The same inputs give the same bits on every run.
    Raises ContractError on a head that the kernels do not take.
    """
    if head_dim % 8 or head_dim > MAX_HEAD_DIM:
        raise ContractError(
            "KimiDeltaAttention: no Triton kernel for this head size",
            seen=str(head_dim),
            expected=f"a multiple of 8 up to {MAX_HEAD_DIM}",
        )
    batch, steps, _ = qkv.shape
    past_conv_state, past_recurrent_state = past_conv_state.contiguous(), past_recurrent_state.contiguous()
    output = torch.empty_like(output_gate, memory_format=torch.contiguous_format)
    conv_state = torch.empty_like(past_conv_state) if present_conv_state is None else present_conv_state
    state = torch.empty_like(past_recurrent_state) if present_recurrent_state is None else present_recurrent_state
    if not (conv_state.is_contiguous() and state.is_contiguous()):
        raise ContractError("KimiDeltaAttention: a given present state is not contiguous", expected="contiguous")
    if not batch:
        return output, conv_state, state

    qkv, decay, beta, output_gate = (x.contiguous() for x in (qkv, decay, beta, output_gate))
    conv_weight, A_log, dt_bias, norm_weight = (x.contiguous() for x in (conv_weight, A_log, dt_bias, norm_weight))
    ragged = sequence_lengths is not None
    lengths = qkv if sequence_lengths is None else sequence_lengths.contiguous()  # never read unless ragged
    bounded = gate == "bounded"
    width = conv_weight.shape[1]
    columns = triton.next_power_of_2(max(width - 1, 1))
    with _on_device(qkv):
        if steps <= DECODE_STEPS:
            block = triton.next_power_of_2(head_dim)
            kda_decode[(num_heads, batch)](
                qkv,
                decay,
                beta,
                output_gate,
                conv_weight,
                A_log,
                dt_bias,
                norm_weight,
                past_conv_state,
                past_recurrent_state,
                lengths,
                output,
                conv_state,
                state,
                steps,
                norm_eps,
                scale,
                gate_lower_bound,
                L2_NORM_EPS,
                num_heads,
                D=head_dim,
                BLOCK=block,
                WIDTH=width,
                COLUMNS=columns,
                BOUNDED=bounded,
                RAGGED=ragged,
                num_warps=decode_warps(block),
            )
            return output, conv_state, state

        t = tiling or prefill_tiling(head_dim, qkv)
        heads = batch * num_heads
        window = min(triton.cdiv(steps, t.chunk) * t.chunk, t.window(heads))
        chunks = window // t.chunk
        w, q, k = (qkv.new_empty((heads, chunks, t.chunk, t.block)) for _ in range(3))
        u = torch.empty_like(w, dtype=torch.float32)
        reach = qkv.new_empty((heads, chunks, t.chunk, t.chunk))
        total = qkv.new_empty((heads, chunks, t.block), dtype=torch.float32)
        o = qkv.new_empty((batch, window, num_heads, head_dim), dtype=torch.float32)
        precision = "tf32x3" if qkv.dtype == torch.float32 else "tf32"
        unit = tl.float32 if qkv.dtype == torch.float32 else tl.float16
        value = tl.float16 if qkv.dtype == torch.float16 else tl.float32
        for start in range(0, steps, window):
            kda_prep[(chunks, heads)](
                qkv,
                decay,
                beta,
                conv_weight,
                A_log,
                dt_bias,
                past_conv_state,
                lengths,
                w,
                u,
                q,
                k,
                reach,
                total,
                steps,
                start,
                chunks,
                scale,
                gate_lower_bound,
                L2_NORM_EPS,
                num_heads,
                D=head_dim,
                BLOCK=t.block,
                CHUNK=t.chunk,
                LEVELS=t.chunk.bit_length() - 1,
                WIDTH=width,
                BOUNDED=bounded,
                RAGGED=ragged,
                UNIT=unit,
                VALUE=value,
                PRECISION=precision,
                num_warps=t.prep_warps,
            )
            kda_chain[(triton.cdiv(head_dim, t.block_v), heads)](
                w,
                u,
                q,
                k,
                reach,
                total,
                qkv,
                past_conv_state,
                state if start else past_recurrent_state,
                lengths,
                o,
                conv_state,
                state,
                steps,
                start,
                chunks,
                num_heads,
                D=head_dim,
                BLOCK=t.block,
                BLOCK_V=t.block_v,
                CHUNK=t.chunk,
                WIDTH=width,
                COLUMNS=columns,
                RAGGED=ragged,
                LAST=start + window >= steps,
                PRECISION=precision,
                STAGES=t.stages,
                num_warps=t.chain_warps,
            )
            kda_gated_norm[(triton.cdiv(window * num_heads, NORM_ROWS), batch)](
                o,
                output_gate,
                norm_weight,
                lengths,
                output,
                steps,
                start,
                window,
                norm_eps,
                num_heads,
                D=head_dim,
                BLOCK=t.block,
                ROWS=NORM_ROWS,
                RAGGED=ragged,
                num_warps=4,
            )
    return output, conv_state, state


def decode_warps(block: int) -> int:
    """Warps of the decode kernel: 128 values of the state per thread.

    Measured on an H100, 32 heads of 128: 64 us at batch 32 against 87 with twice as many, 212 against 318 at batch 128.
    """
    return max(1, min(16, block * block // 4096))


def _on_device(x: torch.Tensor) -> AbstractContextManager[object]:
    """Triton launches on the current device, whatever its arguments are on."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()
