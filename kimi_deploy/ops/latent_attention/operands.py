"""What the parts of LatentAttention's body work on."""

from __future__ import annotations

from typing import NamedTuple

import onnx_ir as ir

from kimi_deploy.contract import Dtype

MASKED = -1e30
"""Added to the score of a position that may not be seen: finite, so that no softmax meets inf - inf."""


class Sizes(NamedTuple):
    """The op's attributes under their short names."""

    heads: int
    nope: int
    rope: int
    value: int
    rank: int

    @property
    def expand_from(self) -> int | None:
        """Steps from which keys and values of the whole cache are worth making; None where they never are.

        Multiplications per head and cached token: absorbed 2 (rank + rope) for each step; expanded
        nope + rope + value for each step, and rank (nope + value) once.
        """
        saved = 2 * (self.rank + self.rope) - (self.nope + self.rope + self.value)
        return -(-self.rank * (self.nope + self.value) // saved) if saved > 0 else None


class Operands(NamedTuple):
    """What attention over the cache needs, of dtype `compute` but for the cache, which is of dtype `stored`.

    query [batch, heads, sequence, nope + rope], scaled; key_weight [heads, nope, rank]; value_weight [heads, value,
    rank]; cache [batch, capacity, rank + rope]; position [batch, sequence, 1] int64: slot of every step; past
    [batch] int64: cached tokens of every row; total [1] int64: valid tokens of the longest row.
    """

    query: ir.Value
    key_weight: ir.Value
    value_weight: ir.Value
    cache: ir.Value
    position: ir.Value
    past: ir.Value
    total: ir.Value
    sizes: Sizes
    stored: Dtype
    compute: Dtype
