"""One kernel for a few steps: convolution, norms, gate, delta rule and gated RMSNorm, state read and written once."""

from __future__ import annotations

import triton
import triton.language as tl

from kimi_deploy.ops.kimi_delta_attention.triton.convolution import conv_silu_step, store_conv_state
from kimi_deploy.ops.kimi_delta_attention.triton.elementwise import exp, log2_decay, sigmoid


@triton.jit
def pick(x, part, index: tl.constexpr):  # type: ignore[no-untyped-def]
    """Row `index` of x [4, C]."""
    return tl.sum(tl.where(part == index, x, 0.0), axis=0)


@triton.jit(do_not_specialize=("H",))
def kda_decode(  # type: ignore[no-untyped-def]
    qkv,
    decay,
    beta,
    output_gate,
    conv_weight,
    A_log,
    dt_bias,
    norm_weight,
    past_conv,
    past_state,
    lengths,
    output,
    present_conv,
    present_state,
    steps,
    norm_eps,
    scale,
    lower_bound,
    l2_eps,
    H,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    BOUNDED: tl.constexpr,
    RAGGED: tl.constexpr,
):
    """All steps of one head of one row. Grid [heads, batch]; BLOCK is D padded to a power of two."""
    head = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    d = tl.arange(0, BLOCK)
    real = d < D
    square = real[:, None] & real[None, :]
    past_state += (row * H + head) * D * D
    present_state += (row * H + head) * D * D
    cell = d[:, None] * D + d[None, :]
    S = tl.load(past_state + cell, mask=square, other=0.0).to(tl.float32)

    length = steps
    if RAGGED:
        length = tl.minimum(tl.maximum(tl.load(lengths + row), 0), steps)
    channels = H * D
    first = head * D
    qkv += row * steps * 3 * channels
    decay += row * steps * channels
    beta += row * steps * H
    output_gate += row * steps * channels
    output += row * steps * channels
    past_conv += row * 3 * channels * (WIDTH - 1)
    present_conv += row * 3 * channels * (WIDTH - 1)

    rate = exp(tl.load(A_log + head))
    part = tl.arange(0, 4)[:, None]
    channel = (first + d)[None, :]
    is_qkv = (part < 3) & real[None, :]
    is_decay = (part == 3) & real[None, :]
    bias = tl.load(dt_bias + channel + 0 * part, mask=is_decay, other=0.0)
    weight = tl.load(norm_weight + d, mask=real, other=0.0).to(tl.float32)

    for t in range(length):
        # one row each for q, k, v and the decay: as vectors of their own the compiler would make each of them again
        # in every layout that the state's rows and columns ask for
        x = conv_silu_step(qkv, conv_weight, past_conv, t, part * channels + channel, is_qkv, 3 * channels, WIDTH)
        length_of = tl.sqrt(tl.sum(x * x, axis=1) + l2_eps)[:, None]
        x = tl.where(part < 2, x / length_of, x)
        raw = tl.load(decay + t * channels + channel + 0 * part, mask=is_decay, other=0.0).to(tl.float32)
        x = tl.where(is_decay, tl.exp2(log2_decay(raw + bias, rate, lower_bound, BOUNDED)), x)
        q, k, v, a = pick(x, part, 0) * scale, pick(x, part, 1), pick(x, part, 2), pick(x, part, 3)
        strength = sigmoid(tl.load(beta + t * H + head).to(tl.float32))
        S *= a[:, None]
        # q^T (S + k delta^T) = q^T S + (q.k) delta: both sums over the same S, so that it is passed once
        seen = tl.sum(k[:, None] * S, axis=0)
        o = tl.sum(q[:, None] * S, axis=0)
        delta = (v - seen) * strength
        o += tl.sum(q * k) * delta
        S += k[:, None] * delta[None, :]

        o *= tl.rsqrt(tl.sum(o * o) / D + norm_eps) * weight
        here = t * channels + first + d
        gate = tl.load(output_gate + here, mask=real, other=0.0).to(tl.float32)
        tl.store(output + here, (o * sigmoid(gate)).to(output.dtype.element_ty), mask=real)
    for t in range(length, steps):
        zero = tl.zeros([BLOCK], output.dtype.element_ty)
        tl.store(output + t * channels + first + d, zero, mask=real)

    tl.debug_barrier()
    tl.store(present_state + cell, S.to(present_state.dtype.element_ty), mask=square)
    for third in tl.static_range(3):
        store_conv_state(
            qkv, past_conv, present_conv, length, third * channels + first + d, real, 3 * channels, WIDTH, COLUMNS
        )
