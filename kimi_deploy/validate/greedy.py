"""Greedy generation by the reference, and what a candidate that is forced along the same tokens may choose."""

from __future__ import annotations

import numpy as np

from kimi_deploy.runtime.base import Runner
from kimi_deploy.validate.tolerances import Tolerance


def generate(runner: Runner, ids: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """`count` greedy tokens after int64 ids [T] and the logits [count, vocab] they were chosen by, in single steps."""
    state = runner.new_state(batch=1, capacity=len(ids) + count)
    rows: list[np.ndarray] = []
    step = ids[None]
    for _ in range(count):
        rows.append(runner.forward(step, state)[0, -1])
        step = np.array([[rows[-1].argmax()]], dtype=np.int64)
    logits = np.stack(rows)
    return logits.argmax(-1).astype(np.int64), logits


def judge_tokens(
    actual: np.ndarray, tokens: np.ndarray, expected: np.ndarray, tolerance: Tolerance, *, exact: bool
) -> tuple[bool, str]:
    """Whether logits `actual` [count, vocab], each computed after the reference's own tokens, choose those `tokens`.

    Up to the first other choice this is free generation: what would be fed is what was fed. Another choice is allowed,
    unless `exact`, where the reference's logits `expected` prefer their own by no more than twice the tolerance.
    """
    best = actual.argmax(-1)
    other = np.flatnonzero(best != tokens)
    if not len(other):
        return True, f"{len(tokens)} of {len(tokens)} tokens identical"
    gaps = expected[other].max(-1) - expected[other, best[other]]
    bounds = 2 * tolerance.peak * np.abs(expected[other]).max(-1)
    note = (
        f"{len(tokens) - len(other)} of {len(tokens)} tokens identical; at the first other one, number {other[0] + 1}, "
        f"the reference prefers its own by {gaps[0]:.2e}"
    )
    return not exact and bool((gaps <= bounds).all()), note
