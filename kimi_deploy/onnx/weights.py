"""What is stored for a graph's weights, in pieces that are small beside the model.

This is the seam between a checkpoint, what becomes of its values, and the files they go to:

- an `Initializer` is a tensor of the graph that will live in a weight file;
- a `Piece` is one unit of work: calling `produce` reads its `spans` of the checkpoint and returns the bytes of its
  `regions`, which are contiguous stretches of one or several initializers;
- a `WeightPlan` is all of them. `plan_weights` makes the plan of plain casts. A transform of the weights (a
  quantisation, say) edits the graph and calls `WeightPlan.replace` with its own initializers and pieces; `row_parts`
  gives it the parameter in rows that can be loaded and worked on alone.

The writer (`kimi_deploy.onnx.weight_files`) knows nothing else: not what a piece means, and not how large the model is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import onnx_ir as ir

from kimi_deploy.checkpoint import Checkpoint
from kimi_deploy.checkpoint.cast import FLOAT_DTYPES
from kimi_deploy.checkpoint.parameter_part import ParameterPart, Span
from kimi_deploy.contract import Dtype
from kimi_deploy.errors import ExportError
from kimi_deploy.onnx.budget import PART_BYTES
from kimi_deploy.onnx.passes import TRANSPOSED
from kimi_deploy.weights import Weight

_TILE = 256


@dataclass(frozen=True)
class Initializer:
    """A tensor of the graph that lives in a weight file: `name`, ONNX `dtype` and `shape`, as stored."""

    name: str
    dtype: ir.DataType
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.ceil(math.prod(self.shape) * self.dtype.bitwidth / 8)


@dataclass(frozen=True)
class Region:
    """The bytes `offset` to `offset + nbytes` of the stored `initializer`."""

    initializer: str
    offset: int
    nbytes: int


@dataclass(frozen=True)
class Piece:
    """One unit of work of the writer.

    `produce()` returns one C-contiguous array per region, whose bytes in memory are the bytes stored; it reads `spans`
    of the checkpoint, each byte once, and must give the same bytes every time. It may run in any thread, beside other
    pieces. `working_bytes` is the most that it holds in memory at a time, its result included.
    """

    spans: tuple[Span, ...]
    regions: tuple[Region, ...]
    produce: Callable[[], Sequence[np.ndarray]]
    working_bytes: int

    @property
    def nbytes(self) -> int:
        return sum(region.nbytes for region in self.regions)

    @property
    def disk_order(self) -> tuple[str, int]:
        """Sorts pieces by where the checkpoint's files hold the first byte they read."""
        return min((span.tensor.file, span.offset) for span in self.spans)


class WeightPlan:
    """Every initializer that goes to a weight file, by name, and the pieces that fill them."""

    def __init__(self) -> None:
        self._initializers: dict[str, Initializer] = {}
        self._pieces: dict[str, list[Piece]] = {}
        self.in_place: dict[str, tuple[Initializer, Span]] = {}
        """Initializers that are read from the checkpoint's own files, and where they lie there, by name."""

    def add(self, initializers: Sequence[Initializer], pieces: Sequence[Piece]) -> None:
        """Add `initializers`, filled by `pieces` and by no other. Raises ExportError unless every byte is, once."""
        for initializer in initializers:
            _check_covered(initializer, [r for p in pieces for r in p.regions if r.initializer == initializer.name])
            if initializer.name in self._initializers:
                raise ExportError("an initializer is planned twice", seen=initializer.name)
        unknown = {r.initializer for p in pieces for r in p.regions} - {i.name for i in initializers}
        if unknown:
            raise ExportError("a piece fills an initializer that it was not added with", seen=str(sorted(unknown)))
        self._initializers.update((i.name, i) for i in initializers)
        self._pieces[initializers[0].name] = list(pieces)

    def replace(self, name: str, initializers: Sequence[Initializer], pieces: Sequence[Piece]) -> None:
        """Store `initializers` instead of the initializer `name`, which was added alone; the caller edits the graph.

        Raises ExportError as `add`.
        """
        if self.in_place.pop(name, None) is None:
            del self._initializers[name], self._pieces[name]
        self.add(initializers, pieces)

    @property
    def initializers(self) -> tuple[Initializer, ...]:
        """Those of the weight files, in the order in which the checkpoint's files hold their first bytes."""
        first: dict[str, tuple[str, int]] = {}
        for piece in self.pieces:
            for region in piece.regions:
                first.setdefault(region.initializer, piece.disk_order)
        return tuple(sorted(self._initializers.values(), key=lambda i: (first[i.name], i.name)))

    @property
    def pieces(self) -> tuple[Piece, ...]:
        """In the order in which the checkpoint's files hold what they read."""
        pieces = (piece for pieces in self._pieces.values() for piece in pieces)
        return tuple(sorted(pieces, key=lambda p: (p.disk_order, p.regions[0].initializer, p.regions[0].offset)))

    @property
    def nbytes(self) -> int:
        """Bytes that go to the weight files."""
        return sum(i.nbytes for i in self._initializers.values())


def _check_covered(initializer: Initializer, regions: Sequence[Region]) -> None:
    end = 0
    for region in sorted(regions, key=lambda r: r.offset):
        if region.offset != end:
            break
        end += region.nbytes
    else:
        if end == initializer.nbytes:
            return
    raise ExportError(
        f"the pieces of {initializer.name} leave a gap or overlap",
        seen=f"bytes 0 to {end} are filled once",
        expected=f"{initializer.nbytes} bytes",
    )


def row_parts(checkpoint: Checkpoint, weight: Weight, dtype: Dtype) -> list[ParameterPart]:
    """The parameter in consecutive parts: an expert [1, out, in] each, or at most PART_BYTES of rows of a matrix."""
    experts = len(weight.shape) == 3
    row = math.prod(weight.shape[1:]) * checkpoint.part(weight.name, 0, 1).stored_dtype(dtype).itemsize
    rows = 1 if experts else max(1, PART_BYTES // row)
    total = weight.shape[0]
    return [checkpoint.part(weight.name, start, min(start + rows, total)) for start in range(0, total, rows)]


def in_place_span(checkpoint: Checkpoint, weight: Weight, dtype: Dtype) -> Span | None:
    """Where a file of the checkpoint holds the parameter just as a graph of `dtype` stores it, untransposed; or None.

    That takes the same dtype and, for one made of several tensors, that they lie back to back in its order.
    """
    part = checkpoint.part(weight.name)
    stored = part.stored_dtype(dtype)
    first, end = part.spans[0], part.spans[0].offset
    for span in part.spans:
        if (span.tensor.file, span.offset) != (first.tensor.file, end) or FLOAT_DTYPES[span.tensor.dtype] != stored:
            return None
        end += span.nbytes
    if part.form.layout not in ("concat", "stack") or first.offset % stored.itemsize:
        return None
    return Span(first.tensor, first.offset, end - first.offset)


def in_place_spans(checkpoint: Checkpoint, dtype: Dtype) -> dict[str, Span]:
    """`in_place_span` of every parameter that has one, by name."""
    spans = {r.weight.name: in_place_span(checkpoint, r.weight, dtype) for r in checkpoint.resolve()}
    return {name: span for name, span in spans.items() if span is not None}


def plan_weights(
    model: ir.Model, checkpoint: Checkpoint, dtype: Dtype, in_place: Mapping[str, Span] | None = None
) -> WeightPlan:
    """The plan that stores every parameter in its own shape, cast to its dtype class and, for MatMul, transposed.

    Parameters `in_place` stay in their spans of the checkpoint's files.
    """
    plan = WeightPlan()
    for resolved in checkpoint.resolve():
        weight = resolved.weight
        value = model.graph.initializers[weight.name]
        assert value.dtype is not None
        transposed = TRANSPOSED in value.metadata_props
        shape = weight.shape[::-1] if transposed else weight.shape
        initializer = Initializer(weight.name, value.dtype, shape)
        if in_place and weight.name in in_place:
            plan.in_place[weight.name] = (initializer, in_place[weight.name])
            continue
        parts = row_parts(checkpoint, weight, dtype)
        if transposed:
            pieces = [_transposed_piece(initializer, parts, dtype)]
        else:
            pieces = _plain_pieces(initializer, parts, dtype)
        plan.add([initializer], pieces)
    return plan


def _plain_pieces(initializer: Initializer, parts: Sequence[ParameterPart], dtype: Dtype) -> list[Piece]:
    row = initializer.nbytes // initializer.shape[0]
    pieces = []
    for part in parts:
        nbytes = part.weight.shape[0] * row
        region = Region(initializer.name, part.start * row, nbytes)
        # beside the result a block as stored, another as float32 and its cast
        pieces.append(Piece(part.spans, (region,), partial(_load, part, dtype), 2 * nbytes + PART_BYTES))
    return pieces


def _load(part: ParameterPart, dtype: Dtype) -> list[np.ndarray]:
    return [part.load(dtype)]


def _transposed_piece(initializer: Initializer, parts: Sequence[ParameterPart], dtype: Dtype) -> Piece:
    """One piece: a row of the result takes an element of every stored row."""
    spans = tuple(span for part in parts for span in part.spans)
    region = Region(initializer.name, 0, initializer.nbytes)

    def produce() -> list[np.ndarray]:
        out = np.empty(initializer.shape, parts[0].stored_dtype(dtype))
        for part in parts:
            _transpose_into(out[:, part.start : part.start + part.weight.shape[0]], part.load(dtype))
        return [out]

    return Piece(spans, (region,), produce, initializer.nbytes + 4 * PART_BYTES)


def _transpose_into(out: np.ndarray, value: np.ndarray) -> None:
    """out[...] = value.T, in tiles that stay in a cache: five times as fast."""
    # integers of the same size are copied faster than numpy's extension types
    integer = np.dtype(f"u{value.itemsize}")
    source, target = value.view(integer), out.view(integer)
    for row in range(0, source.shape[0], _TILE):
        for column in range(0, source.shape[1], _TILE):
            tile = source[row : row + _TILE, column : column + _TILE]
            target[column : column + _TILE, row : row + _TILE] = tile.T
