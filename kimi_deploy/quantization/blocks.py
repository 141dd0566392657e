"""Quantising rows of weights by groups: levels, scales and zero points, and how they are packed.

A group is `group` consecutive elements of a row. weight = (level - zero point) * scale, levels 0 .. 2^bits - 1;
without zero points it is 2^(bits - 1). Two 4-bit levels share a byte, the first in its low half. These are the
formula and the layout of ONNX Runtime's MatMulNBits and QMoE.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from kimi_deploy.quantization.half_quadratic import fit
from kimi_deploy.quantization.scheme import Method

TILE = 1 << 16
"""Elements worked on at a time: what is computed for them stays in a processor's cache."""


class Quantized(NamedTuple):
    """levels uint8 [..., in], scales float32 [..., in / group], zero points uint8 like the scales; not packed."""

    levels: np.ndarray
    scales: np.ndarray
    zero_points: np.ndarray


def middle(bits: int) -> int:
    """The zero point of a symmetric quantisation."""
    return 1 << (bits - 1)


def quantize(weight: np.ndarray, bits: int, group: int, *, symmetric: bool, method: Method) -> Quantized:
    """Quantise float32 `weight` [..., in], `group` dividing in. Deterministic; a group of zeros stays zeros."""
    *leading, width = weight.shape
    groups = np.ascontiguousarray(weight, np.float32).reshape(-1, group)
    levels = np.empty(groups.shape, np.uint8)
    scales = np.empty(len(groups), np.float32)
    zeros = np.empty(len(groups), np.uint8)
    step = max(1, TILE // group)
    for start in range(0, len(groups), step):
        part = slice(start, start + step)
        scale, zero = nearest_parameters(groups[part], bits, symmetric)
        if method == "hqq":
            scale, zero = fit(groups[part], scale, zero, bits, symmetric)
        levels[part] = to_levels(groups[part], scale, zero, bits)
        scales[part], zeros[part] = scale[:, 0], zero[:, 0]
    shape = (*leading, width // group)
    return Quantized(levels.reshape(weight.shape), scales.reshape(shape), zeros.reshape(shape))


def nearest_parameters(groups: np.ndarray, bits: int, symmetric: bool) -> tuple[np.ndarray, np.ndarray]:
    """Scale and zero point [n, 1] of groups [n, group] that reach from a group's smallest value to its largest."""
    highest = (1 << bits) - 1
    if symmetric:
        scale = np.abs(groups).max(-1, keepdims=True) / np.float32(highest // 2)
        return _nonzero(scale), np.full_like(scale, middle(bits))
    # zero is always a level, so that it stays exact
    low = np.minimum(groups.min(-1, keepdims=True), 0)
    scale = _nonzero((np.maximum(groups.max(-1, keepdims=True), 0) - low) / np.float32(highest))
    return scale, np.clip(np.rint(-low / scale), 0, highest)


def _nonzero(scale: np.ndarray) -> np.ndarray:
    """Scale 1 for a group of zeros, and for one so small that its scale would vanish."""
    return np.where(scale > np.finfo(np.float32).tiny, scale, np.float32(1))


def to_levels(groups: np.ndarray, scale: np.ndarray, zero: np.ndarray, bits: int) -> np.ndarray:
    """The nearest levels, float32 like `groups`."""
    return np.clip(np.rint(groups / scale) + zero, 0, (1 << bits) - 1)


def dequantize(quantized: Quantized, group: int) -> np.ndarray:
    """The weights that the levels stand for, float32 [..., in]."""
    levels, scales, zeros = quantized
    grouped = levels.reshape(*scales.shape, group).astype(np.float32)
    return ((grouped - zeros[..., None].astype(np.float32)) * scales[..., None]).reshape(levels.shape)


def pack(values: np.ndarray, bits: int) -> np.ndarray:
    """uint8 values [..., n] of `bits` bits in bytes [..., ceil(n * bits / 8)]."""
    if bits == 8:
        return values
    if values.shape[-1] % 2:
        values = np.concatenate([values, np.zeros_like(values[..., :1])], axis=-1)
    return values[..., 0::2] | (values[..., 1::2] << 4)


def unpack(packed: np.ndarray, bits: int, count: int) -> np.ndarray:
    """Inverse of `pack`: the first `count` values of each row."""
    if bits == 8:
        return packed
    pairs = np.stack([packed & 15, packed >> 4], axis=-1)
    return pairs.reshape(*packed.shape[:-1], -1)[..., :count]
