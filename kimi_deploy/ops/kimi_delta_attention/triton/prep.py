"""First of the three prefill kernels: everything of a chunk that does not need the state, all chunks at once.

e^{-G} overflows once a chunk decays by e^88, so it is never formed. A chunk is cut in halves, quarters, ... single
steps. A pair j < i is cut apart at exactly one level, into an even block and the odd one after it, and there
    e^{G_i - G_j} = E_i E_j
with E_i = e^{sum of g from the start of i's block through i} and E_j = e^{sum of g after j to the end of its block}:
neither exceeds one, whatever the gate. At that level one matrix product of (x E) and (k E) yields all such pairs. The
sums are matrix products too, of a mask and g: a step outside the sum cannot disturb it, however large its g.

The same halving inverts the unit triangle I + A: with T the inverse of its diagonal blocks and L what the next level
adds to A below them, T - T (L T) is the inverse of the blocks twice as large. It has no row loop and, unlike a Neumann
product, no large terms that cancel: |T_ij| <= 1.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kimi_deploy.ops.kimi_delta_attention.triton.convolution import conv_silu
from kimi_deploy.ops.kimi_delta_attention.triton.elementwise import exp, log2_decay, sigmoid


@triton.jit
def split(g, UNIT: tl.constexpr):  # type: ignore[no-untyped-def]
    """64 g as the sum of two operands, from g <= 0, a log2. In float32 the first is all of it.

    g below -512 is taken as -512, whose power of two is zero as well; the factor keeps float16 out of its subnormals.
    """
    g = 64.0 * tl.maximum(g, -512.0)
    high = g.to(UNIT)
    low = (g - high.to(tl.float32)).to(UNIT)
    return high, low


@triton.jit
def masked_exp(mask, high, low, UNIT: tl.constexpr, PRECISION: tl.constexpr):  # type: ignore[no-untyped-def]
    """2 ** (mask @ g) from a mask [CHUNK, CHUNK] and the two parts of 64 g [CHUNK, BLOCK]."""
    chosen = tl.where(mask, 1.0, 0.0).to(UNIT)
    total = tl.dot(chosen, high, input_precision=PRECISION)
    if tl.float32 != UNIT:
        total = tl.dot(chosen, low, acc=total, input_precision=PRECISION)
    return tl.exp2(total * (1.0 / 64.0))


@triton.jit
def unit_triangle_inverse(A, r, LEVELS: tl.constexpr, CHUNK: tl.constexpr, UNIT: tl.constexpr, PRECISION: tl.constexpr):  # type: ignore[no-untyped-def]
    """(I + A)^-1 of the strictly lower triangular A [CHUNK, CHUNK], float32."""
    differ = r[:, None] ^ r[None, :]
    T = tl.where(differ == 0, 1.0, tl.zeros([CHUNK, CHUNK], tl.float32))
    for level in tl.range(0, LEVELS, num_stages=1):
        L = tl.where((differ >> level) == 1, A, 0.0)
        T_unit = T.to(UNIT)
        LT = tl.dot(L.to(UNIT), T_unit, input_precision=PRECISION)
        T -= tl.dot(T_unit, LT.to(UNIT), input_precision=PRECISION)
    return T


@triton.jit(do_not_specialize=("steps", "start", "chunks", "H"))
def kda_prep(  # type: ignore[no-untyped-def]
    qkv,
    decay,
    beta,
    conv_weight,
    A_log,
    dt_bias,
    past_conv,
    lengths,
    w_out,
    u_out,
    q_out,
    k_out,
    reach_out,
    total_out,
    steps,
    start,
    chunks,
    scale,
    lower_bound,
    l2_eps,
    H,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
    LEVELS: tl.constexpr,
    WIDTH: tl.constexpr,
    BOUNDED: tl.constexpr,
    RAGGED: tl.constexpr,
    UNIT: tl.constexpr,
    VALUE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One chunk of one head of one row. Grid [chunks, batch * heads]; CHUNK = 2 ** LEVELS; BLOCK is D padded.

    Reads steps from `start` + CHUNK * chunk on. Writes, for the chain kernel (all padded to BLOCK with zeros):
    w = T diag(beta) (k e^G) and u = T diag(beta) v, the decayed operands q e^G scale and k e^{G_C - G}
    [CHUNK, BLOCK], reach = scale tril(q_i^T diag(e^{G_i - G_j}) k_j) [CHUNK, CHUNK] and e^{G_C} [BLOCK].
    UNIT is the dtype of matrix operands that cannot exceed one, VALUE that of v's product, which has no such bound,
    PRECISION how float32 ones are multiplied.
    """
    chunk = tl.program_id(0)
    pair = tl.program_id(1)
    row = (pair // H).to(tl.int64)
    head = pair % H
    length = steps
    if RAGGED:
        length = tl.minimum(tl.load(lengths + row), steps)
    first = start + chunk * CHUNK
    if first >= length:
        return

    r = tl.arange(0, CHUNK)
    d = tl.arange(0, BLOCK)
    real = d < D
    inside = first + r < length
    valid = inside[:, None] & real[None, :]
    channels = H * D
    channel = head * D + d
    stride = 3 * channels
    rows, line, lines = r[:, None], channel[None, :], real[None, :]
    qkv += row * steps * stride
    past_conv += row * stride * (WIDTH - 1)

    q = conv_silu(qkv, conv_weight, past_conv, first, rows, line, valid, lines, stride, WIDTH)
    q *= (1.0 / tl.sqrt(tl.sum(q * q, axis=1) + l2_eps))[:, None]
    k = conv_silu(
        qkv, conv_weight, past_conv, first, r[:, None], channels + line, valid, real[None, :], 3 * channels, WIDTH
    )
    k *= (1.0 / tl.sqrt(tl.sum(k * k, axis=1) + l2_eps))[:, None]
    now = tl.sum(q * k, axis=1)
    # narrow while they live through the levels
    q, k = q.to(UNIT), k.to(UNIT)

    here = row * steps + first
    offset = r[:, None] * channels + channel[None, :]
    x = tl.load(decay + here * channels + offset, mask=valid, other=0.0).to(tl.float32)
    x += tl.load(dt_bias + channel, mask=real, other=0.0)[None, :]
    rate = exp(tl.load(A_log + head))
    # a padded step neither forgets nor writes
    g = tl.where(valid, log2_decay(x, rate, lower_bound, BOUNDED), 0.0)
    strength = tl.load(beta + here * H + r * H + head, mask=inside, other=0.0).to(tl.float32)
    strength = tl.where(inside, sigmoid(strength), 0.0)

    i, j = r[:, None], r[None, :]
    reach = tl.where(i == j, now[:, None], 0.0)
    A = tl.zeros([CHUNK, CHUNK], tl.float32)
    block = pair.to(tl.int64) * chunks + chunk
    tl.store(total_out + block * BLOCK + d, tl.exp2(tl.sum(g, axis=0)))
    high, low = split(g, UNIT)
    for level in tl.range(0, LEVELS, num_stages=1):
        # odd rows: columns of their own block up to themselves; even rows: those after themselves
        odd = ((i >> level) & 1) == 1
        between = ((i >> level) == (j >> level)) & (odd == (j <= i))
        E = masked_exp(between, high, low, UNIT, PRECISION)
        cut = (i > j) & (((i ^ j) >> level) == 1)
        column = tl.trans((k * E).to(UNIT))
        reach += tl.where(cut, tl.dot((q * E).to(UNIT), column, input_precision=PRECISION), 0.0)
        A += tl.where(cut, tl.dot((k * E).to(UNIT), column, input_precision=PRECISION), 0.0)
    T = unit_triangle_inverse(A * strength[:, None], r, LEVELS, CHUNK, UNIT, PRECISION)

    tile = block * CHUNK * BLOCK
    wide = r[:, None] * BLOCK + d[None, :]
    data = w_out.dtype.element_ty
    from_start = masked_exp(j <= i, high, low, UNIT, PRECISION)
    tl.store(q_out + tile + wide, (q * from_start * scale).to(data))
    to_end = masked_exp(j > i, high, low, UNIT, PRECISION)
    tl.store(k_out + tile + wide, (k * to_end).to(data))
    tl.store(reach_out + block * CHUNK * CHUNK + (r[:, None] * CHUNK + r[None, :]), (reach * scale).to(data))

    T *= strength[None, :]
    w = tl.dot(T.to(UNIT), (k * from_start).to(UNIT), input_precision=PRECISION)
    tl.store(w_out + tile + wide, w.to(data))
    v = conv_silu(
        qkv, conv_weight, past_conv, first, r[:, None], 2 * channels + line, valid, real[None, :], 3 * channels, WIDTH
    )
    u = tl.dot(T.to(VALUE), v.to(VALUE), input_precision=PRECISION)
    tl.store(u_out + tile + wide, u.to(u_out.dtype.element_ty))
