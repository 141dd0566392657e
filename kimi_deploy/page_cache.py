"""Advice to the operating system about file pages. Where it takes none, as on macOS, everything is only slower."""

from __future__ import annotations

import os

TAKES_ADVICE = hasattr(os, "posix_fadvise")


def will_need(file: int, offset: int, nbytes: int) -> None:
    """Have bytes of the open `file` read into memory, while the caller does something else."""
    if TAKES_ADVICE:
        os.posix_fadvise(file, offset, nbytes, os.POSIX_FADV_WILLNEED)


def done_with(file: int, offset: int, nbytes: int) -> None:
    """Begin to write what is dirty of these bytes, and drop from memory what is not; waits for nothing."""
    if TAKES_ADVICE:
        os.posix_fadvise(file, offset, nbytes, os.POSIX_FADV_DONTNEED)
