"""Generating tokens with any runner: chunked prefill, batches of prompts, streaming, stop ids."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Generator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np

from kimi_deploy.errors import NotFiniteError, StateError, UsageError
from kimi_deploy.runtime.base import Runner
from kimi_deploy.runtime.sampling import Sampling, check_best, choose
from kimi_deploy.runtime.state import State

DEFAULT_CHUNK = 512
"""Tokens per prefill call: attention scores take heads x chunk x cached tokens, so a chunk bounds the memory."""

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class Token:
    """A new token of batch row `row`; `index` counts that row's new tokens from 0."""

    row: int
    index: int
    id: int


@dataclass(frozen=True)
class GenerationResult:
    """What was generated, per row: `tokens` without the stop token, and why the row ended.

    `state` has consumed each prompt and every new token but the last chosen one, `pending` (the stop token where the
    row ended with one): give that first when you go on from the state. Seconds are those of the model and the
    sampling, not of whoever reads the stream.
    """

    tokens: list[list[int]]
    finish_reasons: list[FinishReason]
    pending: list[int]
    state: State
    prompt_tokens: int
    new_tokens: int
    time_to_first_token: float
    prefill_seconds: float
    decode_seconds: float

    @property
    def prefill_tokens_per_second(self) -> float:
        """Prompt tokens of all rows per second of prefill."""
        return self.prompt_tokens / self.prefill_seconds

    @property
    def decode_tokens_per_second(self) -> float:
        """Tokens of all rows after each row's first, per second; 0 when there was no decode step."""
        later = self.new_tokens - len(self.tokens)
        return later / self.decode_seconds if self.decode_seconds else 0.0


def prefill(
    runner: Runner,
    input_ids: np.ndarray,
    state: State,
    sequence_lengths: np.ndarray | None = None,
    chunk: int = DEFAULT_CHUNK,
    after_step: Callable[[], object] | None = None,
) -> np.ndarray:
    """Consume right-padded prompts `input_ids` int64 [batch, sequence], `chunk` steps at a time.

    Returns each row's logits after its last valid token, float32 [batch, vocab]; those of an empty row mean nothing.
    `after_step` is called after each chunk. Raises as `Runner.forward` does, for the whole prompt before any chunk
    when it is the capacity that is too small.
    """
    if chunk < 1:
        raise UsageError("the prefill chunk is out of range", seen=str(chunk), expected="at least 1")
    batch, steps = input_ids.shape
    lengths = np.full(batch, steps, np.int32) if sequence_lengths is None else sequence_lengths
    check_room(state, lengths)
    logits = np.zeros((batch, runner.contract.vocab_size), np.float32)
    for start in range(0, steps, chunk):
        part = input_ids[:, start : start + chunk]
        valid = np.clip(lengths - start, 0, part.shape[1])
        last = runner.forward(part, state, valid)[:, 0]
        logits[valid > 0] = last[valid > 0]
        if after_step is not None:
            after_step()
    return logits


def check_room(state: State, tokens: np.ndarray) -> None:
    """Raise StateError unless every row's cache has room for that many more tokens."""
    needed = state.lengths.astype(np.int64) + tokens
    if state.contract.has_latent and needed.max() > state.capacity:
        raise StateError(
            "the prompt and the new tokens do not fit the state",
            seen=f"{int(needed.max())} tokens",
            expected=f"at most {state.capacity}, the capacity of the latent cache",
            fix="make the state with more capacity (--capacity), or ask for fewer new tokens (--max-new-tokens)",
        )


def check_capacity(capacity: int, prompt: int, new: int, saved: int = 0) -> None:
    """Raise UsageError unless a latent cache of `capacity` tokens holds `saved` ones, a prompt and what follows it."""
    # the last token is chosen, not consumed
    needed = saved + prompt + new - 1
    if capacity < needed:
        parts = [f"{n} tokens of the {what}" for n, what in ((saved, "saved state"), (prompt, "prompt")) if n]
        raise UsageError(
            "the capacity is below what the prompt and the new tokens need",
            seen=f"capacity {capacity}",
            expected=f"{needed} or more: {', '.join(parts)} and {new - 1} new ones",
            fix=f"give more capacity (--capacity {needed}), or ask for fewer new tokens (--max-new-tokens)",
        )


def generate(
    runner: Runner,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    sampling: Sampling | None = None,
    stop_ids: Collection[int] = (),
    state: State | None = None,
    capacity: int | None = None,
    chunk: int = DEFAULT_CHUNK,
    on_token: Callable[[Token], object] | None = None,
) -> GenerationResult:
    """`stream`, driven to its end; `on_token` sees each token as it comes."""
    tokens = stream(
        runner,
        prompts,
        max_new_tokens=max_new_tokens,
        sampling=sampling,
        stop_ids=stop_ids,
        state=state,
        capacity=capacity,
        chunk=chunk,
    )
    while True:
        try:
            token = next(tokens)
        except StopIteration as end:
            result: GenerationResult = end.value
            return result
        if on_token is not None:
            on_token(token)


def stream(
    runner: Runner,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    sampling: Sampling | None = None,
    stop_ids: Collection[int] = (),
    state: State | None = None,
    capacity: int | None = None,
    chunk: int = DEFAULT_CHUNK,
    after_step: Callable[[], object] | None = None,
) -> Generator[Token, None, GenerationResult]:
    """Generate up to `max_new_tokens` per prompt, yielding each token as it is chosen; returns the result.

    Rows run in one batch. A row ends at a stop id, which is not yielded; from then on it takes no step and its state
    stays as it is, until all rows have ended. Greedy without `sampling`. `state` continues sequences, one row per
    prompt; without it a state of `capacity` tokens is made, or of just what is needed. `after_step` is called after
    each prefill chunk and each decode step.

    Raises UsageError for an empty prompt and for a `capacity` below what is needed, StateError when the tokens do not
    fit `state`, NotFiniteError, and as `Runner.forward` does.
    """
    sampling = sampling or Sampling()
    check_prompts(prompts, max_new_tokens)
    ids, lengths = _pad(prompts)
    if state is None:
        if capacity is not None and runner.contract.has_latent:
            check_capacity(capacity, ids.shape[1], max_new_tokens)
        state = runner.new_state(len(prompts), capacity or ids.shape[1] + max_new_tokens)
    check_room(state, lengths + max_new_tokens - 1)
    stops = frozenset(stop_ids)
    tokens: list[list[int]] = [[] for _ in prompts]
    reasons: list[FinishReason] = ["length"] * len(prompts)
    pending = np.zeros(len(prompts), np.int64)
    active = np.ones(len(prompts), np.int32)

    began = time.perf_counter()
    logits = prefill(runner, ids, state, lengths, chunk, after_step)
    prefill_seconds = time.perf_counter() - began
    decode_seconds = first_token = 0.0
    for index in range(max_new_tokens):
        began = time.perf_counter()
        chosen = [int(row) for row in np.flatnonzero(active)]
        if index and sampling.greedy:
            best, values = runner.forward_greedy(pending[:, None], state, active)
            choices = [partial(_checked, int(best[row]), float(values[row])) for row in chosen]
        else:
            if index:
                logits = runner.forward(pending[:, None], state, active)[:, 0]
            choices = [partial(choose, logits[row], sampling) for row in chosen]
        if index and after_step is not None:
            after_step()
        for row, choice in zip(chosen, choices, strict=True):
            pending[row] = _explained(choice, row, state)
        seconds = time.perf_counter() - began
        if index:
            decode_seconds += seconds
        else:
            first_token = prefill_seconds + seconds
        for row in chosen:
            token = int(pending[row])
            if token in stops:
                active[row] = 0
                reasons[row] = "stop"
            else:
                tokens[row].append(token)
                yield Token(row, index, token)
        if not active.any():
            break
    return GenerationResult(
        tokens=tokens,
        finish_reasons=reasons,
        pending=pending.tolist(),
        state=state,
        prompt_tokens=int(lengths.sum()),
        new_tokens=sum(map(len, tokens)) + reasons.count("stop"),
        time_to_first_token=first_token,
        prefill_seconds=prefill_seconds,
        decode_seconds=decode_seconds,
    )


def check_prompts(prompts: Sequence[Sequence[int]], max_new_tokens: int) -> None:
    """Raise UsageError where there is no prompt, an empty one, or no token to generate."""
    if max_new_tokens < 1:
        raise UsageError("max-new-tokens is out of range", seen=str(max_new_tokens), expected="at least 1")
    if not prompts or not all(map(len, prompts)):
        empty = next((number for number, prompt in enumerate(prompts, 1) if not len(prompt)), 0)
        where = f"prompt {empty} of {len(prompts)} is empty" if prompts else "no prompt"
        raise UsageError(
            "there is nothing to continue", seen=where, expected="at least one token per prompt", fix="give some text"
        )


def _pad(prompts: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Right-padded ids int64 [batch, longest] and lengths int32 [batch]."""
    lengths = np.array([len(p) for p in prompts], np.int32)
    ids = np.zeros((len(prompts), int(lengths.max())), np.int64)
    for row, prompt in enumerate(prompts):
        ids[row, : len(prompt)] = prompt
    return ids, lengths


def _checked(best: int, logit: float, row: int, length: int) -> int:
    check_best(best, logit, row, length)
    return best


def _explained(choice: Callable[[int, int], int], row: int, state: State) -> int:
    """`choice(row, length)`; when the logits are not finite, the error also says which state is not."""
    try:
        return choice(row, int(state.lengths[row]))
    except NotFiniteError as error:
        try:
            state.check_finite()
        except NotFiniteError as cause:
            raise NotFiniteError(error.what, seen=f"{error.seen}; {cause.what}: {cause.seen}", fix=cause.fix) from error
        raise
