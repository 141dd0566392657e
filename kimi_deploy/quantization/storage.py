"""What is stored for a quantised parameter: levels, scales and zero points, as the kernels read them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from kimi_deploy.quantization.scheme import Scheme
from kimi_deploy.quantization.selection import Role

PartName = Literal["levels", "scales", "zero_points"]


@dataclass(frozen=True)
class StoredPart:
    """One of a quantised parameter's tensors: uint8, but for the float32 scales."""

    name: PartName
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * (4 if self.name == "scales" else 1)


def stored_parts(shape: tuple[int, ...], role: Role, scheme: Scheme) -> tuple[StoredPart, ...]:
    """The tensors that stand for a parameter of `shape` [..., in]; zero points last, absent where symmetric.

    The group of `scheme` is settled.
    """
    assert scheme.group is not None
    *rows, width = shape
    blocks = width // scheme.group
    # the product's kernel wants a block's bytes on an axis of their own
    levels = (
        (*rows, blocks, scheme.group * scheme.bits // 8) if role == "product" else (*rows, width * scheme.bits // 8)
    )
    parts = (StoredPart("levels", levels), StoredPart("scales", (*rows, blocks)))
    if scheme.symmetric:
        return parts
    return (*parts, StoredPart("zero_points", (*rows, math.ceil(blocks * scheme.bits / 8))))
