"""Second of the three prefill kernels: the only serial part, the state through the chunks of a row."""

from __future__ import annotations

import triton
import triton.language as tl

from kimi_deploy.ops.kimi_delta_attention.triton.convolution import store_conv_state


@triton.jit(do_not_specialize=("steps", "start", "chunks", "H"))
def kda_chain(  # type: ignore[no-untyped-def]
    w_in,
    u_in,
    q_in,
    k_in,
    reach_in,
    total_in,
    qkv,
    past_conv,
    past_state,
    lengths,
    o_out,
    present_conv,
    present_state,
    steps,
    start,
    chunks,
    H,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_V: tl.constexpr,
    CHUNK: tl.constexpr,
    WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    RAGGED: tl.constexpr,
    LAST: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    """BLOCK_V values of the state of one head of one row. Grid [D / BLOCK_V, batch * heads].

    The state stays transposed, [value, key], in float32 registers: it is the left operand of both products that
    read it, and their result that of the product that updates it, so that none crosses shared memory.
    Writes o [batch, steps of this launch, heads, D] float32 before its norm, for valid steps only, the state, and
    with LAST the conv state. past_state may be present_state, past_conv present_conv.
    """
    part = tl.program_id(0)
    pair = tl.program_id(1)
    row = (pair // H).to(tl.int64)
    head = pair % H
    length = steps
    if RAGGED:
        length = tl.minimum(tl.maximum(tl.load(lengths + row), 0), steps)

    r = tl.arange(0, CHUNK)
    d = tl.arange(0, BLOCK)
    e = part * BLOCK_V + tl.arange(0, BLOCK_V)
    square = (e < D)[:, None] & (d < D)[None, :]
    past_state += pair.to(tl.int64) * D * D
    present_state += pair.to(tl.int64) * D * D
    cell = d[None, :] * D + e[:, None]
    S = tl.load(past_state + cell, mask=square, other=0.0).to(tl.float32)
    data = w_in.dtype.element_ty
    window = chunks * CHUNK
    used = tl.minimum(tl.cdiv(tl.maximum(length - start, 0), CHUNK), chunks)
    for chunk in tl.range(0, used, num_stages=STAGES):
        block = pair.to(tl.int64) * chunks + chunk
        tile = block * CHUNK * BLOCK
        wide = r[:, None] * BLOCK + d[None, :]
        w = tl.load(w_in + tile + wide)
        q = tl.load(q_in + tile + wide)
        k = tl.load(k_in + tile + wide)
        u = tl.load(u_in + tile + (r[:, None] * BLOCK + e[None, :])).to(tl.float32)
        reach = tl.load(reach_in + block * CHUNK * CHUNK + (r[:, None] * CHUNK + r[None, :]))
        total = tl.load(total_in + block * BLOCK + d)

        old = S.to(data)
        new = tl.trans(u) - tl.dot(old, tl.trans(w), input_precision=PRECISION)
        o = tl.dot(old, tl.trans(q), input_precision=PRECISION)
        delta = new.to(data)
        o = tl.dot(delta, tl.trans(reach), acc=o, input_precision=PRECISION)
        S = tl.dot(delta, k, acc=S * total[None, :], input_precision=PRECISION)

        keep = (start + chunk * CHUNK + r < length)[:, None] & (e < D)[None, :]
        here = ((row * window + chunk * CHUNK) * H + head) * D
        tl.store(o_out + here + (r[:, None] * (H * D) + e[None, :]), tl.trans(o), mask=keep)

    tl.debug_barrier()
    tl.store(present_state + cell, S.to(present_state.dtype.element_ty), mask=square)
    if LAST:
        channels = H * D
        qkv += row * steps * 3 * channels
        past_conv += row * 3 * channels * (WIDTH - 1)
        present_conv += row * 3 * channels * (WIDTH - 1)
        for third in tl.static_range(3):
            channel = third * channels + head * D + e
            store_conv_state(qkv, past_conv, present_conv, length, channel, e < D, 3 * channels, WIDTH, COLUMNS)
