"""Last of the three prefill kernels: RMSNorm of o over a head, times the sigmoid of the output gate."""

from __future__ import annotations

import triton
import triton.language as tl

from kimi_deploy.ops.kimi_delta_attention.triton.elementwise import sigmoid


@triton.jit(do_not_specialize=("steps", "start", "window", "H"))
def kda_gated_norm(  # type: ignore[no-untyped-def]
    o_in,
    output_gate,
    norm_weight,
    lengths,
    output,
    steps,
    start,
    window,
    norm_eps,
    H,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    RAGGED: tl.constexpr,
):
    """ROWS (step, head) pairs of one row. Grid [window * heads / ROWS, batch].

    o_in [batch, window, heads, D] holds the steps from `start` on; padded steps of it are not read and give zero.
    """
    row = tl.program_id(1).to(tl.int64)
    item = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    step = start + item // H
    length = steps
    if RAGGED:
        length = tl.load(lengths + row)
    d = tl.arange(0, BLOCK)[None, :]
    here = (step < steps)[:, None] & (item < window * H)[:, None] & (d < D)
    valid = here & (step < length)[:, None]

    o = tl.load(o_in + (row * window * H + item)[:, None] * D + d, mask=valid, other=0.0).to(tl.float32)
    o *= tl.rsqrt(tl.sum(o * o, axis=1) / D + norm_eps)[:, None]
    o *= tl.load(norm_weight + d, mask=d < D, other=0.0).to(tl.float32)
    place = ((row * steps + start) * H + item)[:, None] * D + d
    gate = tl.load(output_gate + place, mask=valid, other=0.0).to(tl.float32)
    o = tl.where(valid, o * sigmoid(gate), 0.0)
    tl.store(output + place, o.to(output.dtype.element_ty), mask=here)
