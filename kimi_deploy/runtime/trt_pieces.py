"""Cutting a call into pieces that an engine's profile holds: prefill(T) is prefill(t1), then prefill(t2)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from kimi_deploy.runtime.base import Call


@dataclass(frozen=True)
class Piece:
    """Steps `start` and on of a larger call, as a call of its own."""

    call: Call
    start: int
    whole: Call

    def place(self, logits: np.ndarray, result: np.ndarray) -> None:
        """Copy this piece's logits [batch, num_logits, vocab] to where the larger call wants them."""
        wanted = self.whole.logits_indices
        inside = (wanted >= self.start) & (wanted < self.start + self.call.input_ids.shape[1])
        row, column = np.nonzero(inside)
        if self.call.logits_indices.shape == wanted.shape:
            result[row, column] = logits[row, column]
        else:
            result[row, column] = logits[row, wanted[row, column] - self.start]


def pieces(call: Call, steps: int, num_logits: int) -> Iterator[Piece]:
    """`call` in pieces of at most `steps` steps and `num_logits` logits per row.

    A piece computes as many logits as the call wants in all, or, where that is more than it can, those of each step.
    """
    length = call.input_ids.shape[1]
    every_step = call.logits_indices.shape[1] > num_logits
    size = min(steps, num_logits) if every_step else steps
    for start in range(0, length, size):
        ids = np.ascontiguousarray(call.input_ids[:, start : start + size])
        here = ids.shape[1]
        if every_step:
            indices = np.tile(np.arange(here, dtype=np.int64), (len(ids), 1))
        else:
            indices = np.clip(call.logits_indices - start, 0, here - 1)
        valid = np.clip(call.sequence_lengths - start, 0, here).astype(np.int32)
        past = (call.past_lengths + np.minimum(call.sequence_lengths, start)).astype(np.int32)
        yield Piece(Call(ids, valid, past, indices), start, call)
