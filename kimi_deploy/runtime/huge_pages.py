"""Huge pages under a session's weights: a decode step reads each weight once, and 4 kB pages slow that down.

On two cores a step of "mini-62m" takes 6.5 ms so, 7.3 ms without. Only the speed depends on it.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
from pathlib import Path

import numpy as np

MOST_BYTES = 512 << 20
"""New memory up to which it is done: the kernel copies some 250 MB a second, and loading must stay quick."""
_MAPS = Path("/proc/self/maps")
_HUGE_PAGE = 2 << 20
_MADV_COLLAPSE = 25  # linux/mman.h; kernels before 6.1 answer EINVAL


def huge_buffer(size: int) -> np.ndarray:
    """Zeroed memory of `size` bytes, uint8, from the start of a huge page on, and on such where the kernel has them."""
    if sys.platform == "linux":
        memory = mmap.mmap(-1, size + _HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        memory.madvise(mmap.MADV_HUGEPAGE)
    else:
        memory = mmap.mmap(-1, size + _HUGE_PAGE)
    whole = np.frombuffer(memory, np.uint8)
    return whole[-whole.ctypes.data % _HUGE_PAGE :][:size]


def private_memory() -> dict[int, int]:
    """Start and end addresses of this process's anonymous writable mappings; empty where there is no /proc."""
    if sys.platform != "linux" or not _MAPS.is_file():
        return {}
    found = {}
    for line in _MAPS.read_text().splitlines():
        addresses, access, _, _, _, *path = line.split(maxsplit=5)
        if access == "rw-p" and path in ([], ["[heap]"]):
            start, end = (int(address, 16) for address in addresses.split("-"))
            found[start] = end
    return found


def collapse_new(before: dict[int, int]) -> int:
    """Put memory mapped since `before` (of `private_memory`) on huge pages; returns the bytes that were asked for.

    Only whole huge pages. What the kernel refuses stays as it is.
    """
    ranges = []
    for start, end in private_memory().items():
        first = -(-max(start, before.get(start, 0)) // _HUGE_PAGE) * _HUGE_PAGE
        size = end // _HUGE_PAGE * _HUGE_PAGE - first
        if size > 0:
            ranges.append((first, size))
    total = sum(size for _, size in ranges)
    if not 0 < total <= MOST_BYTES:
        return 0
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    for first, size in ranges:
        madvise(first, size, _MADV_COLLAPSE)
    return total
