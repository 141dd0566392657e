"""How far one distribution over tokens is from another."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import numpy as np

from kimi_deploy.validate.compare import Difference, compare
from kimi_deploy.validate.tolerances import Tolerance


@dataclass(frozen=True)
class LogitsDifference:
    """Logits [..., vocab] against the reference's.

    `kl` is the mean of KL(reference || candidate) in nats; `top1` the share of positions with the same best
    token; `top5` and `top10` the mean overlap of the five and ten best; `flips` the positions whose best token
    differs although the reference prefers its own by more than the tolerance explains.
    """

    difference: Difference
    kl: float
    top1: float
    top5: float
    top10: float
    flips: int

    def within(self, tolerance: Tolerance) -> bool:
        """Whether the values are within the tolerance and no best token changed beyond it."""
        return self.difference.within(tolerance) and self.flips == 0

    def to_dict(self) -> dict[str, object]:
        return asdict(self)


def compare_logits(actual: np.ndarray, expected: np.ndarray, tolerance: Tolerance) -> LogitsDifference:
    """Compare float32 logits of one shape [..., vocab]; ValueError when the shapes differ."""
    difference = compare(actual, expected)
    if not difference.finite:
        return LogitsDifference(difference, float("inf"), 0.0, 0.0, 0.0, actual[..., 0].size)
    a = actual.reshape(-1, actual.shape[-1]).astype(np.float64)
    e = expected.reshape(-1, expected.shape[-1]).astype(np.float64)
    log_a, log_e = log_softmax(a), log_softmax(e)
    kl = float(np.mean(np.sum(np.exp(log_e) * (log_e - log_a), axis=-1)))
    best_a, best_e = a.argmax(-1), e.argmax(-1)
    rows = np.arange(len(e))
    gap = e[rows, best_e] - e[rows, best_a]
    # each of the two logits may be off by the tolerance
    flips = int(np.sum((best_a != best_e) & (gap > 2 * tolerance.peak * np.abs(e).max())))
    top1 = float(np.mean(best_a == best_e))
    return LogitsDifference(difference, max(kl, 0.0), top1, _overlap(a, e, 5), _overlap(a, e, 10), flips)


def _overlap(a: np.ndarray, e: np.ndarray, count: int) -> float:
    """Mean share of the `count` largest of each row that both have."""
    k = min(count, e.shape[-1])
    best_a, best_e = (np.argpartition(-x, k - 1)[:, :k] for x in (a, e))
    return float(np.mean([len(set(x) & set(y)) / k for x, y in zip(best_a, best_e, strict=True)]))


def log_softmax(x: np.ndarray) -> np.ndarray:
    """Logarithms of the probabilities that logits [..., vocab] stand for."""
    shifted = x - x.max(-1, keepdims=True)
    return shifted - np.log(np.sum(np.exp(shifted), axis=-1, keepdims=True))
