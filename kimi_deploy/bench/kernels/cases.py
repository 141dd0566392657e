"""What is measured, and the least that a device has to do for it. Standard library only."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Literal

HEAD_DIM = 128
CONV_WIDTH = 4
HEADS = (8, 16, 32, 64, 96)
BATCHES = (1, 8, 32, 128)
STEPS = (128, 512, 1024, 2048, 4096, 8192, 16384, 32768, 131072)
GATES: tuple[Gate, ...] = ("softplus", "bounded")
MAX_TOKENS = 131072
"""Steps of all rows of a prefill together: what the longest single row has."""
TILE = 16
"""Steps of a tile in `matrix_operations`."""

Gate = Literal["softplus", "bounded"]
Kind = Literal["decode", "prefill"]


@dataclass(frozen=True)
class Case:
    """One call of the op with `batch` rows of up to `steps` steps. Ragged rows have lengths of their own."""

    kind: Kind
    gate: Gate
    heads: int
    batch: int
    steps: int
    ragged: bool = False
    peers: bool = True
    """Whether other projects' kernels are measured as well: some tune themselves for seconds per number of heads."""

    @property
    def name(self) -> str:
        shape = f"{self.batch}x{self.steps}" + (" ragged" if self.ragged else "")
        return f"{self.kind} {self.gate} H={self.heads} {shape}"

    @property
    def lengths(self) -> tuple[int, ...]:
        """Valid steps of each row. Ragged: evenly from a sixteenth of `steps` to all, or every other row idle."""
        if not self.ragged:
            return (self.steps,) * self.batch
        if self.steps == 1:
            return tuple(1 - n % 2 for n in range(self.batch))
        low = max(1, self.steps // 16)
        spread = max(1, self.batch - 1)
        # the stride mixes long and short rows; it has no factor in common with a power of two
        return tuple(low + (self.steps - low) * (n * 5 % self.batch) // spread for n in range(self.batch))

    @property
    def tokens(self) -> int:
        return sum(self.lengths)

    @property
    def bytes(self) -> int:
        """Bytes that any implementation moves: every valid input read once, every output written once, 16-bit data.

        A step reads q, k, v, decay and output gate and writes its output, six values a channel, and one beta a head.
        A row reads and writes the conv state of three values in 3 channels and the float32 recurrent state; a row
        without steps keeps both, and they may lie in place.
        """
        channels = self.heads * HEAD_DIM
        rows = sum(length > 0 for length in self.lengths)
        step = 2 * (6 * channels + self.heads)
        row = 2 * (2 * 3 * channels * (CONV_WIDTH - 1) + 4 * channels * HEAD_DIM)
        weights = 2 * 3 * channels * CONV_WIDTH + 4 * (channels + self.heads) + 2 * HEAD_DIM
        return self.tokens * step + rows * row + weights

    @property
    def matrix_operations(self) -> int:
        """Floating-point operations on the matrix units of a chunked prefill in tiles of 16 steps; 0 for decode.

        Per tile of C steps and head: k k^T, q k^T, two products of the inverse and one of the attention, each
        2 C^2 D; two reads and one update of the state, each 2 C D^2.
        """
        if self.kind == "decode":
            return 0
        per_step = 2 * (5 * TILE * HEAD_DIM + 3 * HEAD_DIM * HEAD_DIM)
        return self.tokens * self.heads * per_step

    def shortened(self, steps: int, batch: int) -> Case:
        """The same with at most so many steps and rows: what a float64 recurrence can check."""
        return replace(self, steps=min(self.steps, steps), batch=min(self.batch, batch), peers=True)

    def to_dict(self) -> dict[str, object]:
        return {**asdict(self), "tokens": self.tokens, "bytes": self.bytes, "matrix_operations": self.matrix_operations}


TARGETS = (
    *(Case("prefill", gate, 32, 1, 8192) for gate in GATES),
    *(Case("decode", "softplus", 32, batch, 1) for batch in (1, 32)),
)
"""The shapes that goals are set for; measured first, with every implementation."""


def full_cases() -> list[Case]:
    """Every number of heads, batch, length and gate that fits MAX_TOKENS; ragged wherever there are several rows."""
    shapes: list[tuple[Kind, int, int]] = [("decode", batch, 1) for batch in BATCHES]
    shapes += [("prefill", batch, steps) for steps in STEPS for batch in BATCHES if batch * steps <= MAX_TOKENS]
    return [
        Case(kind, gate, heads, batch, steps, ragged)
        for kind, batch, steps in shapes
        for ragged in (False, True)
        if batch > 1 or not ragged
        for gate in GATES
        for heads in HEADS
    ]


def quick_cases() -> list[Case]:
    """The cases that decide, the most telling first; other projects' kernels at 32 heads, and once at 64."""
    cases = [Case("prefill", gate, 32, 1, 8192) for gate in GATES]
    cases += [Case("decode", "softplus", 32, batch, 1) for batch in BATCHES]
    cases += [Case("decode", "bounded", 32, batch, 1, peers=False) for batch in (1, 32)]
    cases += [Case("prefill", "bounded", 64, 1, 8192)]
    cases += [Case("prefill", "softplus", 32, 1, steps, peers=steps == 1024) for steps in STEPS if steps != 8192]
    cases += [Case("prefill", gate, 32, 8, 2048, ragged=True, peers=gate == "softplus") for gate in GATES]
    cases += [Case("prefill", "softplus", heads, 1, 8192, peers=False) for heads in (8, 16, 64, 96)]
    cases += [
        Case("decode", "softplus", heads, batch, 1, peers=False) for heads in (8, 16, 64, 96) for batch in (1, 32)
    ]
    cases += [Case("prefill", "softplus", 32, batch, 128, peers=False) for batch in (8, 32, 128)]
    cases += [Case("decode", "softplus", 32, 32, 1, ragged=True, peers=False)]
    return cases
