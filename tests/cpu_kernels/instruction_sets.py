"""The instruction sets that kernels are compiled for, those of this machine in turn."""

from __future__ import annotations

from collections.abc import Iterator

from kimi_deploy.runtime.ort_kernels import OrtKernels

INSTRUCTION_SETS = ("x86-64-v2", "x86-64-v3", "x86-64-v4", "x86-64-v4 with VNNI", "native")


def each_instruction_set(library: OrtKernels) -> Iterator[OrtKernels]:
    """The library with every instruction set that this machine has in turn, the best one last."""
    best = library.instruction_set
    for name in INSTRUCTION_SETS:
        if library.choose(name):
            try:
                yield library
            finally:
                assert library.choose(best)
