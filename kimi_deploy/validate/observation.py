"""What one sequence shows after a run: logits of every token and every state tensor, whichever runner it was."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from kimi_deploy.runtime.base import Runner
from kimi_deploy.runtime.state import State


@dataclass(frozen=True)
class Observation:
    """Logits float32 [T, vocab] of T consumed tokens and the state after them.

    `states` maps "layer.kind", in layer order, to one row's tensor: conv_state [channels, width-1], recurrent_state
    [heads, key, value], latent [T, width]. `length` is how many tokens the state says it has consumed.
    """

    logits: np.ndarray
    states: dict[str, np.ndarray]
    length: int

    def by_position(self) -> dict[str, np.ndarray]:
        """The tensors that have a row per token, [T, ...]: the logits and every latent cache."""
        return {"logits": self.logits} | {k: v for k, v in self.states.items() if k.endswith(".latent")}


def observe(logits: np.ndarray, state: State, row: int = 0) -> Observation:
    """One row of a state with that row's logits [T, vocab]; the state's tensors are copied."""
    tensors, length = state.tensors(), len(logits)
    states = {}
    for spec in state.contract.states:
        value = tensors[spec.past_name][row]
        states[f"{spec.layer}.{spec.kind}"] = np.array(value[:length] if spec.kind == "latent" else value)
    return Observation(logits, states, int(state.lengths[row]))


def run_in_pieces(runner: Runner, ids: np.ndarray, cuts: Sequence[int] = ()) -> Observation:
    """`runner` over ids[:cuts[0]], ids[cuts[0]:cuts[1]], ... in a state with room for just these tokens."""
    state = runner.new_state(batch=1, capacity=len(ids))
    edges = [0, *cuts, len(ids)]
    pieces = [runner.forward(ids[None, a:b], state, logits_indices="all")[0] for a, b in pairwise(edges) if b > a]
    return observe(np.concatenate(pieces), state)
