"""Weight files beside a graph: laid out, filled piece by piece in the checkpoint's order, resumed, read back.

What is written is read back close behind, while the operating system still has it in memory: a second pass over files
larger than the memory would cost as much as reading the checkpoint again. What was meant and what the file has are
compared by XXH3 (128 bits), which finds a fault as surely as SHA-256 and takes a tenth of its time; SHA-256 is computed
once, for the manifest.

In memory at a time: what the pieces in flight hold (`IN_FLIGHT_BYTES`, or one piece that is larger), whatever the
model's size.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx_ir as ir
import xxhash

from kimi_deploy.errors import ExportError, UsageError
from kimi_deploy.onnx.budget import IN_FLIGHT_BYTES
from kimi_deploy.onnx.journal import Journal
from kimi_deploy.onnx.weights import Initializer, Piece, Region, WeightPlan
from kimi_deploy.page_cache import done_with

WEIGHTS_NAME = "weights.bin"
# a page, so that a runtime can map a large tensor where it lies; a cache line for the others
_LARGE_BYTES, _LARGE_ALIGNMENT, _ALIGNMENT = 1 << 20, 4096, 64
_BLOCK = 1 << 20
_BLOCKS_AHEAD = 8
# checked bytes are handed to the disk in steps of this size, and leave the page cache one such step later
_FLUSHED_BYTES = 64 << 20

Digests = Callable[[int], tuple[str, ...]]
"""XXH3 of each region of a piece, by its place in `WeightPlan.pieces`; may wait until the piece is written."""


@dataclass(frozen=True)
class Place:
    """Where an initializer lies: `file` beside the graph, `offset` in it."""

    file: str
    offset: int


@dataclass(frozen=True)
class Layout:
    """Where every initializer lies, and the size of every file."""

    places: dict[str, Place]
    sizes: dict[str, int]

    def fingerprint(self, plan: WeightPlan) -> str:
        """sha256 of everything that says which bytes of the checkpoint go where: what a journal belongs to."""
        pieces = [([(s.tensor.name, s.offset, s.nbytes) for s in p.spans], p.regions) for p in plan.pieces]
        parts = (sorted(self.places.items()), sorted(self.sizes.items()), plan.initializers, pieces, plan.in_place)
        return hashlib.sha256(repr(parts).encode()).hexdigest()


def lay_out(plan: WeightPlan, max_shard_bytes: int | None = None) -> Layout:
    """Initializers in the checkpoint's order, in one file or in files of at most `max_shard_bytes`.

    An initializer larger than that has a file of its own. Depends on the plan alone.
    """
    shards: list[list[tuple[str, int]]] = []
    sizes: list[int] = []
    for initializer in plan.initializers:
        alignment = _LARGE_ALIGNMENT if initializer.nbytes >= _LARGE_BYTES else _ALIGNMENT
        offset = -(-sizes[-1] // alignment) * alignment if sizes else 0
        full = max_shard_bytes is not None and offset + initializer.nbytes > max_shard_bytes
        if full or not shards:
            shards.append([])
            sizes.append(0)
            offset = 0
        shards[-1].append((initializer.name, offset))
        sizes[-1] = offset + initializer.nbytes
    count = len(shards)
    names = [WEIGHTS_NAME if count == 1 else f"weights-{n:05d}-of-{count:05d}.bin" for n in range(1, count + 1)]
    places = {name: Place(file, offset) for file, shard in zip(names, shards, strict=True) for name, offset in shard}
    return Layout(places, dict(zip(names, sizes, strict=True)))


def attach(model: ir.Model, plan: WeightPlan, layout: Layout, folder: Path) -> None:
    """Make the graph's initializers point into the weight files, which need not be there yet."""
    for initializer, place in _places(plan, layout):
        model.graph.initializers[initializer.name].const_value = ir.ExternalTensor(
            place.file,
            place.offset,
            initializer.nbytes,
            initializer.dtype,
            shape=ir.Shape(initializer.shape),
            name=initializer.name,
            base_dir=folder,
        )


def _places(plan: WeightPlan, layout: Layout) -> Iterator[tuple[Initializer, Place]]:
    for initializer in plan.initializers:
        yield initializer, layout.places[initializer.name]
    for initializer, span in plan.in_place.values():
        yield initializer, Place(span.tensor.file, span.offset)


def link_checkpoint_files(names: Collection[str], checkpoint: Path, folder: Path) -> None:
    """Give `folder` the files `names` of `checkpoint` as hard links, which take no space.

    A runtime opens weights only below the graph's own folder, and looks through symbolic links. Raises UsageError when
    the two folders are not on one file system.
    """
    for name in sorted(names):
        target = folder / name
        target.unlink(missing_ok=True)
        try:
            os.link(os.path.realpath(checkpoint / name), target)
        except OSError as error:
            raise UsageError(
                "the export cannot refer to the checkpoint's files",
                seen=f"no hard link to {checkpoint / name}: {error.strerror}",
                expected="a checkpoint and an output on one file system that has hard links",
                fix="give -o on the checkpoint's file system, or leave out --weights reference",
            ) from error


def reserve(sizes: Mapping[str, int], folder: Path) -> None:
    """Create every file that is not there yet at its full size; on most file systems that takes no space."""
    for name, size in sizes.items():
        with (folder / name).open("ab") as file:
            file.truncate(size)


def write_weights(
    plan: WeightPlan, layout: Layout, stored: Layout, folder: Path, journal: Journal, progress: Callable[[int], None]
) -> dict[str, str]:
    """Fill the reserved files of `layout`, check them against the bytes in memory, and return the sha256 of each.

    The check (`check_weights`) looks where the graph has its weights, `stored`. Pieces that `journal` says are finished
    are read back, and done again where they differ. `progress` is called with bytes that are written and checked.
    Raises CheckpointError as the pieces do, ExportError as `check_weights`, and OSError of the disk.
    """
    pieces = plan.pieces
    budget = _Budget(IN_FLIGHT_BYTES)
    with ExitStack() as stack:
        files = {name: stack.enter_context((folder / name).open("r+b", buffering=0)) for name in layout.sizes}

        def place(region: Region) -> tuple[int, int]:
            at = layout.places[region.initializer]
            return files[at.file].fileno(), at.offset + region.offset

        def work(index: int) -> tuple[str, ...]:
            piece = pieces[index]
            with budget.of(min(piece.working_bytes, IN_FLIGHT_BYTES)):
                finished = journal.finished.get(index)
                if finished is not None and finished == tuple(_digest(*place(r), r.nbytes) for r in piece.regions):
                    return finished
                digest = _write(piece, place)
                journal.record(index, digest)
                return digest

        checker = stack.enter_context(ThreadPoolExecutor(max_workers=1, thread_name_prefix="check"))
        # a thread per core, as the work is copying and hashing
        writers = ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1), thread_name_prefix="weights")
        # cancelling what is not begun also ends a check that waits for it
        stack.callback(writers.shutdown, cancel_futures=True)
        written = [writers.submit(work, index) for index in range(len(pieces))]
        checked = checker.submit(check_weights, plan, stored, folder, lambda i: written[i].result(), progress)
        everything: list[Future[Any]] = [*written, checked]
        for future in as_completed(everything):
            future.result()
        return checked.result()


def _write(piece: Piece, place: Callable[[Region], tuple[int, int]]) -> tuple[str, ...]:
    digests = []
    for region, array in zip(piece.regions, piece.produce(), strict=True):
        data = array.reshape(-1).view(np.uint8).data
        if len(data) != region.nbytes:
            raise ExportError(
                f"a piece of {region.initializer} has another size",
                seen=f"{len(data)} bytes",
                expected=f"{region.nbytes} bytes",
            )
        digests.append(xxhash.xxh3_128_hexdigest(data))
        file, offset = place(region)
        done = 0
        while done < len(data):
            done += os.pwrite(file, data[done:], offset + done)
    return tuple(digests)


def _digest(file: int, offset: int, nbytes: int) -> str:
    digest = xxhash.xxh3_128()
    block = memoryview(bytearray(min(_BLOCK, nbytes)))
    end = offset + nbytes
    while offset < end:
        count = os.preadv(file, [block[: end - offset]], offset)
        if not count:
            break
        digest.update(block[:count])
        offset += count
    return digest.hexdigest()


class _Budget:
    """Bytes that threads may hold together; who asks for more than is free waits, and all who come later with it."""

    def __init__(self, nbytes: int) -> None:
        self._free = nbytes
        self._turn = threading.Lock()
        self._changed = threading.Condition()

    @contextmanager
    def of(self, nbytes: int) -> Iterator[None]:
        with self._turn, self._changed:
            self._changed.wait_for(lambda: self._free >= nbytes)
            self._free -= nbytes
        try:
            yield
        finally:
            with self._changed:
                self._free += nbytes
                self._changed.notify_all()


def layout_of(model: ir.Model, plan: WeightPlan, folder: Path) -> Layout:
    """Where a graph that was read back says its initializers lie.

    Raises ExportError for a planned initializer that is not in the graph, that nothing reads, of another type, or
    that does not lie in a file of `folder`, or not in its place in the checkpoint's.
    """
    places: dict[str, Place] = {}
    for wanted in (*plan.initializers, *(initializer for initializer, _ in plan.in_place.values())):
        value = model.graph.initializers.get(wanted.name)
        if value is None or value.const_value is None or not value.uses():
            raise ExportError("a parameter is not in the graph, or nothing reads it", seen=wanted.name)
        tensor = value.const_value
        if not isinstance(tensor, ir.ExternalTensor) or not (folder / tensor.location).is_file():
            raise ExportError(f"{wanted.name} does not lie in a weight file", seen=str(tensor)[:200])
        seen = (tensor.dtype, tuple(tensor.shape), tensor.length)
        if seen != (wanted.dtype, wanted.shape, wanted.nbytes):
            raise ExportError(
                f"{wanted.name} is stored with another type",
                seen=f"{tensor.dtype.name} {list(tensor.shape)}, {tensor.length} bytes",
                expected=f"{wanted.dtype.name} {list(wanted.shape)}, {wanted.nbytes} bytes",
            )
        place = Place(str(tensor.location), tensor.offset or 0)
        if wanted.name not in plan.in_place:
            places[wanted.name] = place
            continue
        span = plan.in_place[wanted.name][1]
        if place != Place(span.tensor.file, span.offset):
            raise ExportError(
                f"{wanted.name} does not lie where the checkpoint has it",
                seen=str(place),
                expected=str(Place(span.tensor.file, span.offset)),
            )
    files = sorted({place.file for place in places.values()})
    return Layout(places, {name: (folder / name).stat().st_size for name in files})


def check_weights(
    plan: WeightPlan, layout: Layout, folder: Path, digests: Digests, progress: Callable[[int], None]
) -> dict[str, str]:
    """Read every weight file once, from its beginning: every region has its digest. Returns the sha256 of each file.

    Comparing counts, names or shapes would miss a dropped or swapped expert. `progress` is called with the bytes read.
    Raises ExportError naming the first initializer whose bytes differ.
    """
    segments: dict[str, list[_Segment]] = {name: [] for name in layout.sizes}
    for index, piece in enumerate(plan.pieces):
        for number, region in enumerate(piece.regions):
            place = layout.places[region.initializer]
            start = place.offset + region.offset
            segments[place.file].append(_Segment(start, start + region.nbytes, region, index, number))
    return {name: _check_file(folder / name, sorted(parts), digests, progress) for name, parts in segments.items()}


class _Segment(NamedTuple):
    """Bytes `start` to `end` of a file that `region`, the one of that `number` of a piece, should fill."""

    start: int
    end: int
    region: Region
    piece: int
    number: int


def _check_file(path: Path, segments: Sequence[_Segment], digests: Digests, progress: Callable[[int], None]) -> str:
    """The file's sha256, computed beside the segments' digests by a second thread, so that it is read once."""
    whole = hashlib.sha256()
    with path.open("rb", buffering=0) as file, ThreadPoolExecutor(max_workers=1) as pool:
        pending: deque[Future[None]] = deque()
        # one block is being filled while the others wait for the second thread
        buffers = cycle([memoryview(bytearray(_BLOCK)) for _ in range(_BLOCKS_AHEAD + 1)])
        flushed = 0

        def blocks(end: int) -> Iterator[memoryview]:
            nonlocal flushed
            while (left := end - file.tell()) > 0:
                if len(pending) == _BLOCKS_AHEAD:
                    pending.popleft().result()
                buffer = next(buffers)
                count = file.readinto(buffer[: min(_BLOCK, left)])
                if not count:
                    break
                block = buffer[:count]
                pending.append(pool.submit(whole.update, block))
                if file.tell() - flushed >= _FLUSHED_BYTES:
                    _flush(file.fileno(), flushed, file.tell())
                    flushed = file.tell()
                progress(count)
                yield block

        for segment in segments:
            for _ in blocks(segment.start):
                pass
            expected = digests(segment.piece)[segment.number]
            digest = xxhash.xxh3_128()
            for block in blocks(segment.end):
                digest.update(block)
            if digest.hexdigest() != expected:
                raise ExportError(
                    f"{segment.region.initializer} holds other values than the checkpoint",
                    seen=f"bytes {segment.region.offset} to {segment.region.offset + segment.region.nbytes} differ",
                    fix="export again",
                )
        for _ in blocks(path.stat().st_size):
            pass
    return whole.hexdigest()


def _flush(file: int, start: int, end: int) -> None:
    """Let the disk begin with bytes `start` to `end`, and drop those of the step before that it has by now.

    The advice starts writing of what is dirty and drops what is not; nothing waits. Left to itself the system begins
    when a tenth of the memory is dirty, and all of that is then waited for at the end.
    """
    start = max(0, start - _FLUSHED_BYTES)
    done_with(file, start, end - start)
