"""What every runner shares: checking a call before anything is written, and advancing the state after it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from kimi_deploy.contract import GraphContract
from kimi_deploy.errors import ContractError, StateError
from kimi_deploy.runtime.snapshot import Snapshot, check_same_model
from kimi_deploy.runtime.state import State
from kimi_deploy.runtime.state_file import load_snapshot
from kimi_deploy.runtime.storage import Storage

DEFAULT_CAPACITY = 4096
_INT64 = np.dtype(np.int64)


class Call(NamedTuple):
    """A checked call, C-contiguous: input_ids int64 [batch, sequence], sequence_lengths and past_lengths int32
    [batch], logits_indices int64 [batch, num_logits].

    `past_lengths` is where the graph writes; it may be the state's own array, which changes after the run only. For a
    row that takes no step it may be below the row's length, so that its padded steps, which change nothing, stay inside
    the cache.
    """

    input_ids: np.ndarray
    sequence_lengths: np.ndarray
    past_lengths: np.ndarray
    logits_indices: np.ndarray


class Kernels(NamedTuple):
    """Which of this package's kernels run: `ops`, the sha256 of the `library` file that has them, and for which
    `instruction_set` they were compiled.
    """

    ops: tuple[str, ...]
    library: str
    instruction_set: str

    def to_dict(self) -> dict[str, Any]:
        return self._asdict() | {"ops": list(self.ops)}

    def __str__(self) -> str:
        return f"kernels of library {self.library[:16]} ({self.instruction_set})"


def kernels_to_dict(kernels: Kernels | None) -> dict[str, Any] | None:
    """For a report: null where function bodies ran, or where there is nothing to choose."""
    return None if kernels is None else kernels.to_dict()


def ops_run_as(kernels: Kernels | dict[str, Any] | None) -> str:
    """In words, what ran this package's ops in ONNX Runtime; also of what a report says."""
    if kernels is None:
        return "function bodies"
    return str(Kernels(**kernels) if isinstance(kernels, dict) else kernels)


class Runner(ABC):
    """A loaded model. `contract` is its graph's interface, `fingerprint` names the checkpoint it came from, `kernels`
    what runs as this package's own kernels in a runtime that could also do without; None where it does without.
    """

    contract: GraphContract
    fingerprint: str
    kernels: Kernels | None = None

    @property
    def largest_state(self) -> tuple[int | None, int | None]:
        """The largest batch and capacity of a state; None where only memory limits them."""
        return None, None

    @abstractmethod
    def _new_storage(self, batch: int, capacity: int) -> Storage:
        """Zeroed tensors."""

    @abstractmethod
    def _run(self, call: Call, state: State) -> np.ndarray:
        """Run the graph, leave the new tensors in `state.storage`, return logits float32 [batch, num_logits, vocab]."""

    def _run_greedy(self, call: Call, state: State) -> tuple[np.ndarray, np.ndarray]:
        """As `_run`, but each row's likeliest token int64 [batch] by its first wanted logits, and its logit float32."""
        logits = self._run(call, state)[:, 0]
        best = logits.argmax(-1)
        return best, np.take_along_axis(logits, best[:, None], -1)[:, 0]

    def new_state(self, batch: int = 1, capacity: int = DEFAULT_CAPACITY) -> State:
        """An empty state for `batch` sequences of at most `capacity` tokens each.

        Raises StateError for sizes below one or more memory than there is.
        """
        if batch < 1 or capacity < 1:
            raise StateError(
                "a state of this size makes no sense",
                seen=f"batch {batch}, capacity {capacity}",
                expected="at least 1 each",
            )
        try:
            storage = self._new_storage(batch, capacity)
        except (MemoryError, ValueError) as error:
            raise StateError(
                "there is not enough memory for the state",
                seen=f"batch {batch}, capacity {capacity}: {error}",
                fix="use a smaller batch or capacity",
            ) from error
        lengths = np.zeros(batch, np.int32)
        return State(self.contract, self.fingerprint, capacity, storage, lengths, self)

    def resume(self, snapshot: Snapshot, capacity: int | None = None) -> State:
        """A new state that continues from `snapshot`, also one that another runner of the same checkpoint took.

        `capacity` may differ from the snapshot's. Raises StateError when the snapshot is of another model or is longer
        than the capacity.
        """
        check_same_model("the snapshot", snapshot.contract, snapshot.fingerprint, self.contract, self.fingerprint)
        state = self.new_state(len(snapshot.lengths), capacity or snapshot.capacity)
        state.restore(snapshot)
        return state

    def load_state(self, path: Path | str, capacity: int | None = None) -> State:
        """A new state from a file of `State.save`, also one saved by another runner of the same checkpoint.

        Raises StateError when the file is damaged or of another model, or does not fit `capacity`.
        """
        return self.resume(load_snapshot(Path(path), self.contract, self.fingerprint), capacity)

    def forward(
        self,
        input_ids: np.ndarray,
        state: State,
        sequence_lengths: np.ndarray | None = None,
        logits_indices: np.ndarray | Literal["all"] | None = None,
    ) -> np.ndarray:
        """Consume tokens and advance `state`; any mix of prefill, split prefill and decode gives the same result.

        input_ids [batch, sequence] int64, right-padded; sequence_lengths [batch] int, 0 to sequence: valid steps of
        each row (None = all). A row of length 0 keeps its state bit-identical. logits_indices [batch, num_logits] int:
        steps whose logits are wanted; None = each row's last valid step; "all" = every step. Returns float32
        [batch, num_logits, vocab]; logits of padded steps mean nothing.

        Raises ContractError for wrong shapes, dtypes or ids and StateError for a state of another model or a full one;
        in every case before anything is written.
        """
        call = check_call(self, input_ids, state, sequence_lengths, logits_indices)
        logits = self._run(call, state)
        _advance(state.lengths, call.sequence_lengths)
        return logits

    def forward_greedy(
        self, input_ids: np.ndarray, state: State, sequence_lengths: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """As `forward`, but returns only the likeliest next token of each row int64 [batch], and its logit float32.

        Equal logits go to the smaller id; a NaN counts as the largest, so that a finite logit means that all are
        finite or -inf. A runner on a device chooses there. Raises as `forward` does.
        """
        call = check_call(self, input_ids, state, sequence_lengths, None)
        chosen = self._run_greedy(call, state)
        _advance(state.lengths, call.sequence_lengths)
        return chosen


def _advance(lengths: np.ndarray, steps: np.ndarray) -> None:
    """Add the steps taken, in plain numbers: the first NumPy arithmetic after a step waits for its code from memory."""
    before, taken = lengths.tolist(), steps.tolist()
    for row in range(len(before)):
        lengths[row] = before[row] + taken[row]


def check_call(
    runner: Runner,
    input_ids: np.ndarray,
    state: State,
    sequence_lengths: np.ndarray | None,
    logits_indices: np.ndarray | Literal["all"] | None,
) -> Call:
    """Check the arguments of `Runner.forward` and complete them; raises as it says."""
    _check_state(runner, state)
    if sequence_lengths is None and logits_indices is None:
        step = _sound_step(runner.contract.vocab_size, input_ids, state)
        if step is not None:
            return step
    top = runner.contract.vocab_size - 1
    ids = _integers("input_ids", input_ids, np.int64, (state.batch, None), top, "token ids below the vocabulary size")
    batch, steps = ids.shape
    if steps < 1:
        raise ContractError("input_ids has no step", seen=str(ids.shape), expected="at least one token")
    if sequence_lengths is None:
        lengths = np.full(batch, steps, np.int32)
    else:
        meaning = "valid steps of each row"
        lengths = _integers("sequence_lengths", sequence_lengths, np.int32, (batch,), steps, meaning)
    if logits_indices is None and sequence_lengths is None:
        indices = np.full((batch, 1), steps - 1, np.int64)
    elif logits_indices is None:
        indices = np.maximum(lengths.astype(np.int64) - 1, 0)[:, None]
    elif isinstance(logits_indices, str):
        if logits_indices != "all":
            raise ContractError("logits_indices is not valid", seen=logits_indices, expected="an array, None or 'all'")
        indices = np.tile(np.arange(steps, dtype=np.int64), (batch, 1))
    else:
        meaning = "steps of this call"
        indices = _integers("logits_indices", logits_indices, np.int64, (batch, None), steps - 1, meaning)
    return Call(ids, lengths, _past_lengths(state, lengths, steps), indices)


def _sound_step(vocab_size: int, ids: np.ndarray, state: State) -> Call | None:
    """The call of one token per row, or None for any other, which the full checks then complete or refuse.

    A decode step finds the processor's caches full of weights, so that every line and every object costs: this looks at
    all that the full checks look at, but with few of either.
    """
    if type(ids) is not np.ndarray or ids.dtype is not _INT64 or not ids.flags.c_contiguous:
        return None
    past = state.lengths
    if ids.shape != (len(past), 1):
        return None
    if len(past) == 1:
        token = highest = ids.item()
        longest = past.item()
    else:
        numbers = ids.ravel().tolist()
        token, highest, longest = min(numbers), max(numbers), max(past.tolist())
    if token < 0 or highest >= vocab_size or longest >= state.capacity:
        return None
    lengths, indices = _step_constants(len(past))
    return Call(ids, lengths, past, indices)


@lru_cache(maxsize=16)
def _step_constants(batch: int) -> tuple[np.ndarray, np.ndarray]:
    """sequence_lengths and logits_indices of one token per row. All calls share them, so they are read-only."""
    lengths, indices = np.ones(batch, np.int32), np.zeros((batch, 1), np.int64)
    lengths.flags.writeable = indices.flags.writeable = False
    return lengths, indices


def _check_state(runner: Runner, state: State) -> None:
    if state.owner is runner:
        return
    check_same_model("the state", state.contract, state.fingerprint, runner.contract, runner.fingerprint)
    raise StateError(
        "the state belongs to another runner",
        seen="a state of the same model whose memory another runner owns",
        fix="continue it here with runner.resume(state.snapshot())",
    )


def _past_lengths(state: State, lengths: np.ndarray, steps: int) -> np.ndarray:
    """Where each row writes; raises StateError when the cache cannot hold it."""
    past = state.lengths.copy()
    if max(past.tolist()) + steps <= state.capacity or not state.contract.has_latent:
        return past
    full = state.lengths.astype(np.int64) + lengths > state.capacity
    if full.any():
        row = int(full.argmax())
        raise StateError(
            "the state is full: the latent cache has no room for these tokens",
            seen=f"batch row {row}: {state.lengths[row]} tokens cached, {lengths[row]} more",
            expected=f"at most {state.capacity} (the state's capacity, nothing was written)",
            fix="make the state with more capacity: runner.resume(state.snapshot(), capacity=...) keeps what it holds",
        )
    idle = lengths == 0
    past[idle] = np.minimum(past[idle], max(state.capacity - steps, 0))
    padded = past.astype(np.int64) + steps > state.capacity
    if padded.any():
        row = int(padded.argmax())
        raise StateError(
            "the state is full: padded steps need room in the latent cache as well",
            seen=f"batch row {row}: {state.lengths[row]} tokens cached, {steps} steps, {lengths[row]} of them valid",
            expected=f"at most {state.capacity} (the state's capacity, nothing was written)",
            fix="use less padding, or make the state with more capacity: runner.resume(state.snapshot(), capacity=...)",
        )
    return past


def _integers(
    name: str, value: np.ndarray, dtype: type, shape: tuple[int | None, ...], high: int, meaning: str
) -> np.ndarray:
    """`value` as a contiguous array of an integer `dtype`, each from 0 to `high`; None in `shape` is any size."""
    if not isinstance(value, np.ndarray) or value.dtype.kind not in "iu":
        seen = f"{value.dtype} array" if isinstance(value, np.ndarray) else type(value).__name__
        raise ContractError(f"{name} is not an array of integers", seen=seen, expected=f"{np.dtype(dtype)} array")
    if value.ndim != len(shape) or any(w is not None and w != s for w, s in zip(shape, value.shape, strict=True)):
        wanted = ", ".join("any" if w is None else str(w) for w in shape)
        raise ContractError(f"{name} has the wrong shape", seen=str(value.shape), expected=f"({wanted})")
    # a decode step checks a few numbers: plain Python is quicker at that than NumPy
    numbers = value.ravel().tolist()
    if numbers and (min(numbers) < 0 or max(numbers) > high):
        index = tuple(int(i) for i in np.argwhere((value < 0) | (value > high))[0])
        raise ContractError(
            f"{name} is out of range", seen=f"{value[index]} at {list(index)}", expected=f"0 to {high}: {meaning}"
        )
    return np.ascontiguousarray(value, dtype=dtype)
