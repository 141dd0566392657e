"""The checks of a candidate: ways to run the same tokens that must all give what the reference gives in one pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from kimi_deploy.errors import StateError
from kimi_deploy.ops.kimi_delta_attention.delta_rule import CHUNK
from kimi_deploy.ops.kimi_delta_attention.reference import LONGEST_RECURRENCE
from kimi_deploy.runtime.base import Runner
from kimi_deploy.runtime.state import State
from kimi_deploy.validate.judging import Judge, Place
from kimi_deploy.validate.observation import Observation, observe, run_in_pieces
from kimi_deploy.validate.prompts import Prompt, longest
from kimi_deploy.validate.reference import Followed
from kimi_deploy.validate.report import Row
from kimi_deploy.validate.tolerances import tolerance

ODD_PIECE = 37
CONTINUED = 24
"""Tokens that the resume check goes on for, the first few one by one."""
PADDED = 7
"""Steps by which the padding check makes a batch wider than its longest prompt."""
BATCH_STEPS = 512
"""Steps of a batched call at most: attention between all steps of a dozen prompts of 4,096 tokens takes 10 GB."""


class Checks:
    """One candidate's checks but for greedy generation. `same_dtype` is the source model in the candidate's dtype."""

    def __init__(self, judge: Judge, candidate: Runner, same_dtype: Runner | None) -> None:
        self.judge, self.candidate, self.same_dtype = judge, candidate, same_dtype

    def reference_forms(self, index: int, prompt: Prompt) -> Iterator[Row]:
        """The source model against itself: short pieces are a recurrence, the whole prompt takes the chunkwise form."""
        if len(prompt.ids) > LONGEST_RECURRENCE:
            reference = self.judge.reference
            cuts = range(LONGEST_RECURRENCE, len(prompt.ids), LONGEST_RECURRENCE)
            seen = run_in_pieces(reference.runner, prompt.ids, cuts)
            place = Place("reference-forms", index, prompt.name)
            yield from self.judge.rows(place, seen, Followed(reference.run(prompt.ids)))

    def reference_dtype(self, index: int, prompt: Prompt) -> Iterator[Row]:
        """The source model in the candidate's dtype: noise, not judged."""
        if self.same_dtype is not None:
            seen = run_in_pieces(self.same_dtype, prompt.ids)
            followed = self.judge.reference.follow(prompt.ids, seen)
            place = Place("reference-dtype", index, prompt.name)
            yield from self.judge.rows(place, seen, followed, judged=False)

    def prefill(self, index: int, prompt: Prompt) -> Iterator[Row]:
        """The whole prompt in one call."""
        return self._in_pieces(Place("prefill", index, prompt.name), prompt, ())

    def split_prefill(self, index: int, prompt: Prompt) -> Iterator[Row]:
        """In three uneven pieces, so that a piece ends inside a chunk and one is a single token."""
        third = len(prompt.ids) // 3
        return self._in_pieces(Place("split-prefill", index, prompt.name), prompt, (third, third + 1))

    def decode_steps(self, index: int, prompt: Prompt) -> Iterator[Row]:
        """Token by token."""
        return self._in_pieces(Place("decode-steps", index, prompt.name), prompt, range(1, len(prompt.ids)))

    def chunk_boundaries(self, index: int, prompt: Prompt) -> Iterator[Row]:
        """In pieces at which a convolution's window or a chunk is not quite full, full, and just over; odd; long."""
        states = self.candidate.contract.states
        window = max((int(s.dims[-1]) for s in states if s.kind == "conv_state"), default=0)
        for size in (window, window + 1, ODD_PIECE, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK):
            if 0 < size < len(prompt.ids):
                place = Place("chunk-boundaries", index, f"{prompt.name}, pieces of {size}")
                yield from self._in_pieces(place, prompt, range(size, len(prompt.ids), size))

    def _in_pieces(self, place: Place, prompt: Prompt, cuts: Sequence[int]) -> Iterator[Row]:
        seen = run_in_pieces(self.candidate, prompt.ids, cuts)
        yield from self.judge.against_reference(place, prompt.ids, seen)

    def ragged_batch(self, prompts: Sequence[Prompt]) -> Iterator[Row]:
        """All prompts in one right-padded batch: each row must equal the prompt alone."""
        return self._batch("ragged-batch", prompts, range(len(prompts)), 0, lambda count: np.zeros(count, np.int64))

    def padding(self, prompts: Sequence[Prompt]) -> Iterator[Row]:
        """The batch again with its rows in reverse, wider, and padded with other tokens; then a row that only waits."""
        random, vocab = np.random.default_rng(0), self.candidate.contract.vocab_size
        order = range(len(prompts) - 1, -1, -1)
        yield from self._batch("padding", prompts, order, PADDED, lambda count: random.integers(0, vocab, count))
        yield from self._idle_row(prompts)

    def _batch(
        self,
        check: str,
        prompts: Sequence[Prompt],
        order: Sequence[int],
        extra: int,
        padding: Callable[[int], np.ndarray],
    ) -> Iterator[Row]:
        largest = self.candidate.largest_state[0] or len(order)
        for first in range(0, len(order), largest):
            yield from self._one_batch(check, prompts, order[first : first + largest], extra, padding)

    def _one_batch(
        self,
        check: str,
        prompts: Sequence[Prompt],
        order: Sequence[int],
        extra: int,
        padding: Callable[[int], np.ndarray],
    ) -> Iterator[Row]:
        rows = [prompts[i] for i in order]
        width = len(longest(rows).ids) + extra
        lengths = np.array([len(p.ids) for p in rows], dtype=np.int32)
        ids = np.stack([np.concatenate([p.ids, padding(width - len(p.ids))]) for p in rows])
        state = self.candidate.new_state(batch=len(rows), capacity=width)
        logits: list[list[np.ndarray]] = [[] for _ in rows]
        for start in range(0, width, BATCH_STEPS):
            piece = ids[:, start : start + BATCH_STEPS]
            valid = np.clip(lengths - start, 0, piece.shape[1])
            # every valid step; a shorter row asks for its last one again
            steps = np.minimum(np.arange(max(1, max(valid))), np.maximum(valid[:, None].astype(np.int64) - 1, 0))
            found = self.candidate.forward(piece, state, sequence_lengths=valid, logits_indices=steps)
            for row, count in enumerate(valid):
                logits[row].append(found[row, :count])
        for row, index in enumerate(order):
            prompt = prompts[index]
            seen = observe(np.concatenate(logits[row]), state, row)
            yield from self.judge.against_reference(Place(check, index, prompt.name), prompt.ids, seen)

    def _idle_row(self, prompts: Sequence[Prompt]) -> Iterator[Row]:
        """A row of length 0 beside one that goes on keeps its state to the bit."""
        index = prompts.index(longest(prompts))
        batch = min(2, self.candidate.largest_state[0] or 2)
        ids = np.stack([prompts[index].ids[:BATCH_STEPS]] * batch)
        state = self.candidate.new_state(batch=batch, capacity=ids.shape[1] + 3)
        self.candidate.forward(ids, state)
        before = observe(np.zeros((ids.shape[1], 1)), state, row=batch - 1)
        valid = np.array([3, 0][-batch:], dtype=np.int32)
        self.candidate.forward(ids[:, :3], state, sequence_lengths=valid)
        after = observe(np.zeros((ids.shape[1], 1)), state, row=batch - 1)
        yield from self._equal(Place("padding", index, f"{prompts[index].name}, waiting"), after, before)

    def resume(self, index: int, prompt: Prompt) -> Iterator[Row]:
        """A snapshot in the middle, restored and resumed: each continuation is the first one to the bit."""
        half = max(1, len(prompt.ids) // 2)
        room = (self.candidate.largest_state[1] or half + CONTINUED) - half
        rest = np.resize(prompt.ids[half:] if len(prompt.ids) > half else prompt.ids, min(CONTINUED, room))
        state = self.candidate.new_state(batch=1, capacity=half + len(rest))
        self.candidate.forward(prompt.ids[None, :half], state)
        snapshot = state.snapshot()
        first = self._continue(state, rest)
        state.restore(snapshot)
        for what, again in (("restored", state), ("resumed", self.candidate.resume(snapshot))):
            seen = self._continue(again, rest)
            yield from self._equal(Place("resume", index, f"{prompt.name}, {what}"), seen, first)

    def _continue(self, state: State, ids: np.ndarray) -> Observation:
        pieces = [ids[i : i + 1] for i in range(4)] + [ids[4:]]
        logits = [self.candidate.forward(p[None], state, logits_indices="all")[0] for p in pieces]
        # the whole state, that of the tokens before included
        seen = observe(np.concatenate(logits), state)
        whole = observe(np.zeros((int(state.lengths[0]), 1)), state)
        return Observation(seen.logits, whole.states, whole.length)

    def full_cache(self, index: int, prompt: Prompt) -> Iterator[Row]:
        """A cache filled to its last slot refuses a token more, and is as it was."""
        if not self.candidate.contract.has_latent:
            return
        state = self.candidate.new_state(batch=1, capacity=len(prompt.ids))
        logits = self.candidate.forward(prompt.ids[None], state, logits_indices="all")[0]
        before = observe(logits, state)
        place = Place("full-cache", index, prompt.name)
        try:
            self.candidate.forward(prompt.ids[None, :1], state)
        except StateError:
            yield from self._equal(place, observe(logits, state), before)
        else:
            yield Row(place.check, place.prompt, "refusal", None, False, "a token beyond the capacity was taken", index)

    def _equal(self, place: Place, seen: Observation, expected: Observation) -> Iterator[Row]:
        return self.judge.rows(place, seen, Followed(expected), bound=tolerance("exact"))
