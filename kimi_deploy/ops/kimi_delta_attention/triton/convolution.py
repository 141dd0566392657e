"""Device functions of the short causal convolution and its state."""

from __future__ import annotations

import triton
import triton.language as tl

from kimi_deploy.ops.kimi_delta_attention.triton.elementwise import silu


@triton.jit
def conv_silu(qkv, weight, past, first, r, channel, keep, real, STRIDE, WIDTH: tl.constexpr):  # type: ignore[no-untyped-def]
    """SiLU of the convolution at steps `first` + r of channels `channel`, of the shape of `keep`, float32.

    `qkv` points at step 0 of a row, `past` at its conv state; r and channel broadcast to `keep`. Zero where not
    `keep`, which excludes channels that are not `real`: what lies there is never read. `first` is 0 or at least
    WIDTH - 1.
    """
    offset = r * STRIDE + channel
    total = tl.zeros(keep.shape, tl.float32)
    # a loop the compiler does not unroll: all loads at once would take more registers than there are
    for back in tl.range(0, WIDTH, num_stages=1):
        source = qkv + (first - back).to(tl.int64) * STRIDE
        x = tl.load(source + offset, mask=keep & (first + r >= back), other=0.0).to(tl.float32)
        total += x * tl.load(weight + channel * WIDTH + (WIDTH - 1 - back), mask=real, other=0.0).to(tl.float32)
    if first == 0:
        for column in tl.static_range(WIDTH - 1):
            old = tl.load(past + channel * (WIDTH - 1) + column, mask=real, other=0.0).to(tl.float32)
            for tap in tl.static_range(column + 1):
                factor = tl.load(weight + channel * WIDTH + tap, mask=real, other=0.0).to(tl.float32)
                total += tl.where((r == column - tap) & keep, old * factor, 0.0)
    return silu(total)


@triton.jit
def conv_silu_step(qkv, weight, past, step, channel, keep, STRIDE, WIDTH: tl.constexpr):  # type: ignore[no-untyped-def]
    """The same for one step, of the shape of `channel`, float32; zero where not `keep`."""
    total = tl.zeros(channel.shape, tl.float32)
    for tap in tl.static_range(WIDTH):
        source = step + (tap - (WIDTH - 1))
        new = tl.load(qkv + source.to(tl.int64) * STRIDE + channel, mask=keep & (source >= 0), other=0.0)
        old = tl.load(past + channel * (WIDTH - 1) + (source + (WIDTH - 1)), mask=keep & (source < 0), other=0.0)
        factor = tl.load(weight + channel * WIDTH + tap, mask=keep, other=0.0).to(tl.float32)
        total += (new.to(tl.float32) + old.to(tl.float32)) * factor
    return silu(total)


@triton.jit
def store_conv_state(qkv, past, present, length, channel, real, STRIDE, WIDTH: tl.constexpr, COLUMNS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Write the last WIDTH - 1 columns of past and new steps of `channel` [C], bit for bit.

    `present` may be `past`: every column is read before the barrier and written after it. COLUMNS is WIDTH - 1
    padded to a power of two.
    """
    column = tl.arange(0, COLUMNS)[None, :]
    keep = real[:, None] & (column < WIDTH - 1)
    source = length + column
    step = source - (WIDTH - 1)
    offset = channel[:, None] * (WIDTH - 1)
    old = tl.load(past + offset + source, mask=keep & (step < 0), other=0.0)
    new = tl.load(qkv + step.to(tl.int64) * STRIDE + channel[:, None], mask=keep & (step >= 0), other=0.0)
    tl.debug_barrier()
    tl.store(present + offset + column, tl.where(step < 0, old, new), mask=keep)
