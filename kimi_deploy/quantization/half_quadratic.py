"""Half-quadratic quantisation (HQQ): scales and zero points fitted to the weights, without data.

After H. Badri and A. Shaji, "Half-Quadratic Quantization of Large Machine Learning Models", Mobius Labs, 2023
(https://mobiusml.github.io/hqq_blog/). Minimised is the sum of |W - W_r|^p with p = 0.7, W_r being what the levels
stand for: a norm that forgives the few outliers a group cannot reach. With an auxiliary error W_e, two steps alternate:

    W_e <- shrink(W - W_r)          shrink(x) = sign(x) max(0, |x| - |x|^(p-1) / beta)
    scale, zero <- argmin || W - W_e - scale (Q - zero) ||^2

The paper's second step moves real zero points and keeps the scale. The kernels here take whole zero points, which are
too coarse for that: the zero point is rounded, and the scale, then the only real unknown, is solved for as well. A
symmetric quantisation has the scale alone.
"""

from __future__ import annotations

import numpy as np

P = 0.7
BETA, BETA_GROWTH = 10.0, 1.01
"""The weight of the quadratic coupling, for weights over their group's scale, and its growth per step."""
STEPS = 10
"""More lower the norm a little further and raise the squared error again."""


def fit(
    groups: np.ndarray, scale: np.ndarray, zero: np.ndarray, bits: int, symmetric: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Scale and zero point [n, 1] for `groups` [n, group], starting from those given and never worse in the norm."""
    highest = np.float32((1 << bits) - 1)
    unit = scale  # errors are measured in steps of the first scale, so that beta means the same for every group
    best_scale, best_zero = scale.copy(), zero.copy()
    best = np.full(scale.shape, np.inf, np.float32)
    beta = np.float32(BETA)
    for step in range(STEPS + 1):
        levels = np.clip(np.rint(groups / scale) + zero, 0, highest)
        centred = levels - zero
        error = (groups - centred * scale) / unit
        size = np.abs(error)
        loss = np.power(size, np.float32(P)).sum(-1, keepdims=True)
        better = loss < best
        best_scale, best_zero, best = (
            np.where(better, new, old) for new, old in ((scale, best_scale), (zero, best_zero), (loss, best))
        )
        if step == STEPS:
            break
        # |x|^(p-1) grows without bound towards zero, where the result is zero whatever it is
        shrunk = np.maximum(size - np.power(np.maximum(size, np.float32(1e-6)), np.float32(P - 1)) / beta, 0)
        target = groups - np.copysign(shrunk, error) * unit
        if not symmetric:
            zero = np.clip(np.rint((levels - target / scale).mean(-1, keepdims=True)), 0, highest)
            centred = levels - zero
        square = (centred * centred).sum(-1, keepdims=True)
        solved = (centred * target).sum(-1, keepdims=True) / np.maximum(square, 1)
        scale = np.where(solved > unit * np.float32(1e-3), solved, scale)
        beta *= np.float32(BETA_GROWTH)
    return best_scale, best_zero
