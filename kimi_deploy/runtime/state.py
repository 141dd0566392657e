"""The state of one batch of sequences: plain named tensors and how many tokens each row has consumed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NoReturn

import numpy as np

from kimi_deploy.contract import GraphContract, StateKind, StateTensor
from kimi_deploy.errors import StateError
from kimi_deploy.runtime.finite import check_finite
from kimi_deploy.runtime.snapshot import Snapshot, check_same_model, zero_unused
from kimi_deploy.runtime.state_file import save_snapshot
from kimi_deploy.runtime.storage import NUMPY_DTYPES, Storage


@dataclass(frozen=True)
class StateMemory:
    """Bytes of one state tensor; `bytes_per_token` is not zero only for a cache that grows."""

    layer: int
    kind: StateKind
    shape: tuple[int, ...]
    nbytes: int
    bytes_per_token: int


@dataclass(eq=False, repr=False)
class State:
    """What `Runner.forward` reads and advances. Make one with `Runner.new_state`.

    `lengths` int32 [batch] counts the tokens each row has consumed; `capacity` is the most that a row's latent
    cache can hold (models without one have no limit); `fingerprint` names the checkpoint; `storage` holds the
    tensors where the runner wants them; `owner` is that runner, the only one that can step the state.
    """

    contract: GraphContract
    fingerprint: str
    capacity: int
    storage: Storage
    lengths: np.ndarray
    owner: object

    def __repr__(self) -> str:
        """In one line, without the tensors."""
        rows = ", ".join(map(str, self.lengths[:8].tolist())) + ", ..." * (self.batch > 8)
        return f"State(batch={self.batch}, capacity={self.capacity}, lengths=[{rows}], {self.nbytes / 1e6:.2f} MB)"

    @property
    def batch(self) -> int:
        """Number of sequences."""
        return len(self.lengths)

    def shape(self, spec: StateTensor) -> tuple[int, ...]:
        """Concrete shape of one state tensor."""
        return spec.shape(self.batch, self.capacity)

    def tensors(self) -> dict[str, np.ndarray]:
        """Every tensor on the host by its past name, the whole capacity of a latent cache included.

        Views where the state lives on the host: they change with the next step; `snapshot` for a lasting copy.
        """
        return {s.past_name: self.storage.read(s.past_name) for s in self.contract.states}

    @property
    def nbytes(self) -> int:
        """Bytes allocated for the state, second buffers included."""
        return self.storage.nbytes

    def memory(self) -> tuple[StateMemory, ...]:
        """Bytes of each tensor, in layer order."""
        report = []
        for spec in self.contract.states:
            shape = self.shape(spec)
            nbytes = int(np.prod(shape)) * NUMPY_DTYPES[spec.dtype].itemsize
            per_token = nbytes // self.capacity if spec.kind == "latent" else 0
            report.append(StateMemory(spec.layer, spec.kind, shape, nbytes, per_token))
        return tuple(report)

    def check_finite(self) -> None:
        """Raise StateError at the first tensor with NaN or Inf, naming its layer, kind, batch row and head."""
        for spec in self.contract.states:
            check_finite(self.contract, spec, self.storage.read(spec.past_name), self.lengths)

    def snapshot(self, notes: dict[str, str] | None = None) -> Snapshot:
        """Copy the state to the host; of a latent cache only the rows in use."""
        longest = int(self.lengths.max())
        tensors = {}
        for spec in self.contract.states:
            value = self.storage.read(spec.past_name)
            latent = spec.kind == "latent"
            tensors[spec.past_name] = zero_unused(value[:, :longest], self.lengths) if latent else np.array(value)
        return Snapshot(self.contract, self.fingerprint, self.capacity, self.lengths.copy(), tensors, dict(notes or {}))

    def restore(self, snapshot: Snapshot) -> None:
        """Take over a snapshot; the continuation is bit-identical to that of the state it was taken from.

        Raises StateError, before anything is written, when it is of another model, has another number of rows, or
        does not fit the capacity.
        """
        check_same_model("the snapshot", snapshot.contract, snapshot.fingerprint, self.contract, self.fingerprint)
        longest = int(snapshot.lengths.max())
        if len(snapshot.lengths) != self.batch or (self.contract.has_latent and longest > self.capacity):
            raise StateError(
                "the snapshot does not fit the state",
                seen=f"{len(snapshot.lengths)} rows of up to {longest} tokens",
                expected=f"{self.batch} rows of at most {self.capacity} tokens",
                fix="make a state of that batch and capacity, or use Runner.resume",
            )
        for spec in self.contract.states:
            value = snapshot.tensors[spec.past_name]
            if spec.kind == "latent":
                # not only the part in use: what is left of the old state may be NaN, see zero_unused
                whole = np.zeros(self.shape(spec), value.dtype)
                whole[:, : value.shape[1]] = value
                value = whole
            self.storage.write(spec.past_name, value)
        self.lengths[:] = snapshot.lengths

    def save(self, path: Path | str, notes: dict[str, str] | None = None) -> None:
        """Write the state to one safetensors file, whole or not at all; `Runner.load_state` reads it back.

        Raises StateError when it cannot be written.
        """
        save_snapshot(self.snapshot(notes), Path(path))

    def select(self, rows: Sequence[int]) -> State:
        """A new, independent state made of copies of these rows, in this order; a row may come more than once.

        Raises StateError for a row that does not exist, or no row at all.
        """
        if not rows or not all(0 <= r < self.batch for r in rows):
            raise StateError(
                "rows cannot be selected",
                seen=str(list(rows)),
                expected=f"at least one of 0 to {self.batch - 1}",
            )
        storage = self.storage.empty_like(len(rows))
        for spec in self.contract.states:
            storage.write(spec.past_name, self.storage.read(spec.past_name)[list(rows)])
        return replace(self, storage=storage, lengths=self.lengths[list(rows)])

    def fork(self, n: int) -> State:
        """A new state with every row copied `n` times, copies side by side, to be continued differently."""
        return self.select([row for row in range(self.batch) for _ in range(n)])

    def rewind(self, length: int) -> NoReturn:
        """Always raises StateError: a recurrent state has no way back. Snapshots have; see SnapshotHistory."""
        raise StateError(
            f"the state cannot be rewound to {length} tokens",
            seen=f"{self.lengths.tolist()} tokens consumed and no snapshot at {length}",
            expected="a snapshot taken at exactly that length: each token decays and overwrites the recurrent "
            "state, so earlier states cannot be computed back from it",
            fix="take snapshots (State.snapshot, or SnapshotHistory every N tokens) and restore one, or prefill "
            f"the first {length} tokens again",
        )

    crop = rewind
