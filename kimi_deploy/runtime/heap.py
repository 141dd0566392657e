"""Memory that loading a graph has freed, given back to the system.

Folding constants makes and frees copies of weights, and glibc keeps what is freed in the middle of its heap: a process
with four latent attentions of the 48B model's size had 0.52 to 0.64 GB resident after loading, and 0.40 GB in use.
"""

from __future__ import annotations

import ctypes


def trim() -> None:
    """Give back whole free pages of the heap; in milliseconds, and where the C library can (glibc)."""
    release = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if release is not None:
        release(0)
