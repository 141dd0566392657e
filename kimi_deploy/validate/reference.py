"""The float32 source model as the reference, which can follow a 16-bit model's expert choices where they nearly tie."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from heapq import heappop, heappush
from itertools import count

import numpy as np

from kimi_deploy.runtime.state import State
from kimi_deploy.runtime.torch_runner import TorchRunner
from kimi_deploy.validate.observation import Observation, observe, run_in_pieces
from kimi_deploy.validate.routing import Routers
from kimi_deploy.validate.tolerances import Tolerance

WINDOW = 64
"""Tokens per reference call while following: what is computed again after a position with another choice."""
MOST_ATTEMPTS = 48
"""Combinations of near ties tried for one token."""
DOUBT = 0.4
"""Share of the tolerance from which on a position with a near tie is looked at."""

Choices = Mapping[int, frozenset[int]]


@dataclass(frozen=True)
class Followed:
    """What the reference computes with the candidate's expert choices.

    `choices` maps a position to the layers where another set of experts was taken. `unexplained` is the first position
    that is beyond the tolerance whatever near tie is taken; from there on the reference's own choices stand.
    """

    observation: Observation
    choices: dict[int, Choices] = field(default_factory=dict)
    unexplained: int | None = None

    @property
    def count(self) -> int:
        """How many choices, of one layer for one token, were not the reference's own."""
        return sum(len(c) for c in self.choices.values())


class Reference:
    """The source model in float32.

    A router that reads 16-bit activations may choose another expert than float32 does when two are nearly equal. Both
    are right, and from that token on two different texts are compared. So where `tolerance.router_gap` is not zero, the
    reference takes the candidate's choice, if it is among the near ties and makes the token's logits and latents agree.
    All comparisons are then made with equal choices, at every position and without exception.
    """

    def __init__(self, runner: TorchRunner, tolerance: Tolerance) -> None:
        self.runner = runner
        self.tolerance = tolerance
        self._routers = Routers(runner.model)
        self._runs: dict[bytes, Observation] = {}

    def run(self, ids: np.ndarray) -> Observation:
        """All of int64 ids [T] in one call, kept for the next time."""
        key = ids.tobytes()
        if key not in self._runs:
            self._runs[key] = run_in_pieces(self.runner, ids)
        return self._runs[key]

    def follow(self, ids: np.ndarray, seen: Observation) -> Followed:
        """What the reference computes for ids [T] when it chooses experts as the candidate that showed `seen` did."""
        own = self.run(ids)
        if not self.tolerance.router_gap or self._errors(seen, own.logits, own.states, 0).max() <= DOUBT:
            return Followed(own)
        state = self.runner.new_state(batch=1, capacity=len(ids))
        logits: list[np.ndarray] = []
        choices: dict[int, Choices] = {}
        start, unexplained = 0, None
        while start < len(ids):
            stop = len(ids) if unexplained is not None else min(start + WINDOW, len(ids))
            before = state.snapshot()
            part = self._forward(ids[start:stop], state)
            at = self._next_tie(seen, part, state, start) if unexplained is None else None
            if at is None:
                logits.append(part)
                start = stop
                continue
            state.restore(before)
            if at > start:
                logits.append(self._forward(ids[start:at], state))
            row, choices[at], error = self._step(ids, at, state, seen)
            logits.append(row)
            if error > 1.0:
                unexplained = at
            start = at + 1
        taken = {at: layers for at, layers in choices.items() if layers}
        return Followed(observe(np.concatenate(logits), state), taken, unexplained)

    def _forward(self, ids: np.ndarray, state: State) -> np.ndarray:
        return self.runner.forward(ids[None], state, logits_indices="all")[0]

    def _errors(
        self, seen: Observation, logits: np.ndarray, states: Mapping[str, np.ndarray], start: int
    ) -> np.ndarray:
        """Of each position from `start` on that has logits: the largest error of those and of its latents, each over
        the tensor's peak, as a share of the tolerance.
        """
        stop = start + len(logits)
        worst = np.zeros(len(logits))
        for name, value in seen.by_position().items():
            expected = logits if name == "logits" else states[name][start:stop]
            error = np.abs(value[start:stop].astype(np.float64) - expected).reshape(len(logits), -1).max(-1)
            peak = np.abs(np.nan_to_num(value.astype(np.float64), posinf=0.0, neginf=0.0)).max() or 1.0
            worst = np.maximum(worst, error / peak)
        # no choice explains what is not finite
        return np.nan_to_num(worst / self.tolerance.peak, nan=np.inf)

    def _latents(self, state: State) -> dict[str, np.ndarray]:
        tensors = state.tensors()
        return {f"{s.layer}.{s.kind}": tensors[s.past_name][0] for s in state.contract.states if s.kind == "latent"}

    def _next_tie(self, seen: Observation, part: np.ndarray, state: State, start: int) -> int | None:
        """The first position of the last call that is beyond the tolerance, or in doubt and has a near tie."""
        errors = self._errors(seen, part, self._latents(state), start)
        for index in np.flatnonzero(errors > DOUBT).tolist():
            if errors[index] > 1.0 or self._routers.alternatives(index, self.tolerance.router_gap):
                return start + index
        return None

    def _step(self, ids: np.ndarray, at: int, state: State, seen: Observation) -> tuple[np.ndarray, Choices, float]:
        """Consume token `at` with those near ties that agree best: logits [1, vocab], the other choices, the error."""
        before, order = state.snapshot(), count()
        best: tuple[float, Choices] = (np.inf, {})
        queue: list[tuple[float, float, int, Choices]] = [(0.0, 0.0, next(order), {})]
        for _ in range(MOST_ATTEMPTS):
            if not queue or best[0] <= DOUBT:
                break
            choices = heappop(queue)[-1]
            error, _ = self._attempt(ids, at, state, seen, choices)
            state.restore(before)
            # an equal error means that the choice did not matter: fewer changes then stand
            if error < 0.9 * best[0]:
                best = (error, choices)
            for tie in self._routers.alternatives(0, self.tolerance.router_gap, max(choices, default=-1)):
                heappush(queue, (error, tie.gap, next(order), {**choices, tie.layer: tie.experts}))
        error, logits = self._attempt(ids, at, state, seen, best[1])
        return logits, best[1], error

    def _attempt(
        self, ids: np.ndarray, at: int, state: State, seen: Observation, choices: Choices
    ) -> tuple[float, np.ndarray]:
        with self._routers.forced(choices):
            logits = self._forward(ids[at : at + 1], state)
        return float(self._errors(seen, logits, self._latents(state), at)[0]), logits
