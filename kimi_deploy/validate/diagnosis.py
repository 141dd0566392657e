"""What a wrong tensor looks like, and where in the model that points to."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from kimi_deploy.contract import StateTensor


def first_wrong_position(actual: np.ndarray, expected: np.ndarray, bound: float) -> int | None:
    """First index of axis 0 with an error above `bound` of the expected peak, or a value that is not finite."""
    error = np.abs(actual.astype(np.float64) - expected.astype(np.float64)).reshape(len(expected), -1).max(-1)
    beyond = np.flatnonzero(~(error <= bound * (np.abs(expected.astype(np.float64)).max() or 1.0)))
    return int(beyond[0]) if len(beyond) else None


def describe(kind: str, actual: np.ndarray, expected: np.ndarray, bound: float) -> str:
    """A known fault that explains one row of a wrong state of `kind`, in a few words; empty when there is none."""
    a, e = actual.astype(np.float64), expected.astype(np.float64)
    peak = np.abs(e).max() or 1.0

    def near(x: np.ndarray, y: np.ndarray) -> bool:
        return bool(np.abs(x - y).max() <= bound * peak)

    if not np.isfinite(a).all():
        return f"{int((~np.isfinite(a)).sum())} of {a.size} values are not finite"
    if not a.any():
        return "all zero"
    if kind == "recurrent_state":
        if near(a.swapaxes(-1, -2), e):
            return "key and value axes are swapped"
        # a float32 whose low 16 bits are zero has been a bfloat16
        if actual.dtype == np.float32 and not (actual.view(np.uint32) & 0xFFFF).any():
            return "every value has only a bfloat16's bits"
    if kind == "conv_state" and a.shape[1] > 1:
        if near(a[:, 1:], e[:, :-1]):
            return "the window is one token late"
        if near(a[:, :-1], e[:, 1:]):
            return "the window is one token early"
    if kind == "latent":
        wrong = np.flatnonzero(np.abs(a - e).max(-1) > bound * peak)
        if len(wrong) == 1 and len(e) > 1:
            never = ", which was never written" if not a[wrong[0]].any() else ""
            return f"only token {wrong[0]} of {len(e)} is wrong{never}"
    empty = ~a.any(axis=tuple(range(1, a.ndim))) & e.any(axis=tuple(range(1, e.ndim)))
    if empty.any() and kind != "latent":
        what = "head" if kind == "recurrent_state" else "channel"
        return f"{what}s {_ranges(np.flatnonzero(empty))} are zero"
    return ""


def _ranges(indices: np.ndarray) -> str:
    groups = np.split(indices, np.flatnonzero(np.diff(indices) > 1) + 1)
    return ", ".join(str(g[0]) if len(g) == 1 else f"{g[0]} to {g[-1]}" for g in groups[:4])


def where_to_look(tensor: str, states: Sequence[StateTensor]) -> str:
    """The part of the model between the first wrong tensor and the right ones before it, in order of computation."""
    last = max(s.layer for s in states)
    if tensor == "logits":
        latent = any(s.kind == "latent" for s in states if s.layer == last)
        mixer = "attention and its projection" if latent else "the output gate, norm and projection of KDA"
        return f"every state is right: {mixer} or the MLP of layer {last}, later layers, the final norm or lm_head"
    if tensor not in {f"{s.layer}.{s.kind}" for s in states}:
        return ""
    layer, kind = tensor.split(".")
    before = "the embedding" if layer == "0" else f"the mixer's output or the MLP of layer {int(layer) - 1}"
    if kind == "recurrent_state":
        return f"the inputs of layer {layer}'s KDA are right: its convolution, gates, A_log, dt_bias, or the delta rule"
    inside = "qkv projection, or the convolution's window" if kind == "conv_state" else "key-value projection and norm"
    return f"{before}, or layer {layer}'s input norm, {inside}"
