"""Choosing the next token from logits: greedy, temperature, top-k, top-p, reproducibly."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from kimi_deploy.errors import NotFiniteError, UsageError


@dataclass(frozen=True)
class Sampling:
    """How to choose tokens.

    `temperature` 0 is greedy; `top_k` keeps the k largest logits (0 = all); `top_p` then keeps the fewest tokens
    whose probabilities reach p (1 = all). The same `seed` gives the same tokens: the random number of a token
    depends only on the seed, its row and how many tokens that row's state has consumed, so it does not change with
    the other rows, and a resumed sequence goes on as it would have. Raises UsageError for values out of range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    @property
    def greedy(self) -> bool:
        """Whether it always takes the likeliest token."""
        return self.temperature == 0 or self.top_k == 1

    def __post_init__(self) -> None:
        for name, value, ok, expected in (
            ("temperature", self.temperature, 0 <= self.temperature < math.inf, "a number of 0 (greedy) or more"),
            ("top-k", self.top_k, self.top_k >= 0, "an integer of 0 (all tokens) or more"),
            ("top-p", self.top_p, 0 < self.top_p <= 1, "a number above 0 and up to 1 (all tokens)"),
            ("seed", self.seed, 0 <= self.seed < 2**64, "an integer from 0 to 2**64 - 1"),
        ):
            if not ok:
                raise UsageError(f"{name} is out of range", seen=str(value), expected=expected)


def choose(logits: np.ndarray, sampling: Sampling, row: int, length: int) -> int:
    """The next token of batch row `row` whose state has consumed `length` tokens; `logits` float32 [vocab].

    Equal logits go to the smaller id. Raises NotFiniteError when the logits have NaN or +Inf, or nothing but -Inf.
    """
    # argmax stops at a NaN, so the best value tells whether there is one
    best = int(np.argmax(logits))
    check_best(best, float(logits[best]), row, length)
    if sampling.greedy:
        return best
    ids, probabilities = _candidates(logits, sampling)
    draw = np.random.Generator(np.random.Philox(key=sampling.seed, counter=[0, 0, row, length])).random()
    cumulative = np.cumsum(probabilities)
    index = int(np.searchsorted(cumulative, draw * cumulative[-1], side="right"))
    return int(ids[min(index, len(ids) - 1)])


def check_best(best: int, logit: float, row: int, length: int) -> None:
    """Raise NotFiniteError when the best logit of a row, token id `best`, is not finite."""
    if not math.isfinite(logit):
        raise NotFiniteError(
            "the logits are not finite",
            seen=f"{logit} at token id {best}, batch row {row}, after {length} tokens",
            expected="finite logits",
            fix="State.check_finite names the layer; run the model in float32 or check the checkpoint's weights",
        )


def _candidates(logits: np.ndarray, sampling: Sampling) -> tuple[np.ndarray, np.ndarray]:
    """Ids that may be chosen and their probabilities, which sum to at most one."""
    ids = np.arange(len(logits))
    if 0 < sampling.top_k < len(logits):
        # everything that ties with the k-th largest, so that ties fall to the smaller id
        ids = np.flatnonzero(logits >= np.partition(logits, -sampling.top_k)[-sampling.top_k])
        ids = ids[np.argsort(-logits[ids], kind="stable")][: sampling.top_k]
    scaled = logits[ids].astype(np.float64)
    weights = np.exp((scaled - scaled.max()) / sampling.temperature)
    probabilities = weights / weights.sum()
    if sampling.top_p < 1:
        # all tokens below this together cannot make up 1 - p: they need no sorting
        likely = np.flatnonzero(probabilities >= (1 - sampling.top_p) / len(ids))
        order = likely[np.argsort(-probabilities[likely], kind="stable")]
        kept = int(np.searchsorted(np.cumsum(probabilities[order]), sampling.top_p)) + 1
        ids, probabilities = ids[order[:kept]], probabilities[order[:kept]]
    return ids, probabilities
