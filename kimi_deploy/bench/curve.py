"""How a decode step grows with the cached context, and that it does not grow with the capacity."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import numpy as np

from kimi_deploy.runtime.base import Runner

PREFILL_CHUNK = 512


@dataclass(frozen=True)
class Point:
    """Seconds per decode step (median and fastest) with `cached` tokens in a cache of `capacity`, batch 1."""

    cached: int
    capacity: int
    median: float
    fastest: float

    def to_dict(self) -> dict[str, float]:
        return asdict(self)


def decode_curve(
    runner: Runner, lengths: Sequence[int], steps: int, advance: Callable[[int], None] = lambda n: None
) -> list[Point]:
    """Time `steps` decode steps at each cached length, once with a cache that just fits and once four times as large.

    `advance(1)` is called per point.
    """
    random = np.random.default_rng(0)
    points = []
    for cached in lengths:
        for capacity in (cached + steps, 4 * (max(lengths) + steps)):
            state = runner.new_state(batch=1, capacity=capacity)
            ids = random.integers(0, runner.contract.vocab_size, (1, cached + steps))
            for start in range(0, cached, PREFILL_CHUNK):
                runner.forward(ids[:, start : min(start + PREFILL_CHUNK, cached)], state)
            times = []
            for step in range(cached, cached + steps):
                began = time.perf_counter()
                runner.forward(ids[:, step : step + 1], state)
                times.append(time.perf_counter() - began)
            points.append(Point(cached, capacity, statistics.median(times), min(times)))
            advance(1)
    return points
