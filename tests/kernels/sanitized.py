"""Runs small cases of every feature on a sanitised library: `python -m tests.kernels.sanitized LIBRARY FOLDER`.

In a process of its own, since AddressSanitizer must be loaded before everything else.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np

from kimi_deploy.kernels.kda import KdaKernels
from kimi_deploy.kernels.library import KernelLibrary

from .build import ROOT, run
from .cases import make_case
from .device import Device, EmulatedDevice, run_kernel
from .moe_cases import moe_case, run_moe
from .standard_cases import causal_conv_case, linear_attention_case, run_causal_conv, run_linear_attention


def run_cases(device: Device, folder: Path) -> None:
    """Writes the outputs of every case to `folder`, as bytes."""
    folder.mkdir(exist_ok=True)
    for name, results in cases(device):
        for output, array in results.items():
            np.save(folder / f"{name}.{output}.npy", array.view(np.uint8))


def cases(device: Device):
    """Every kernel and every optional argument, small."""
    for dtype in ("float32", "bfloat16"):
        arrays, attributes = make_case(batch=3, steps=2, dtype=dtype, entries=4)
        arrays |= {"slots": np.array([3, -1, 0], np.int32), "sequence_lengths": np.array([2, 2, 1], np.int32)}
        yield f"decode_{dtype}", run_kernel(device, "decode", arrays, attributes, in_place=True)
    arrays, attributes = make_case(dim=128, steps=1, dtype="float16", gate="bounded")
    yield "decode_one", run_kernel(device, "decode", arrays, attributes)

    arrays, attributes = make_case(steps=67, gate="bounded", dtype="float16")
    yield "prefill", run_kernel(device, "prefill", arrays, attributes, snapshots=1, in_place=True)
    arrays, attributes = make_case(steps=20, dim=128, heads=2, entries=3)
    arrays["cu_seqlens"] = np.array([0, 17, 17, 20], np.int32)
    yield "packed", run_kernel(device, "prefill", arrays, attributes, value_splits=4)
    arrays["cu_seqlens"] = np.array([-3, 40, 7, 2**31 - 1], np.int32)
    run_kernel(device, "prefill", arrays, attributes)

    for dtype, steps in (("float32", 2), ("bfloat16", 3), ("float32", 70), ("float16", 70)):
        arrays, attributes = moe_case(steps=steps, hidden=72, inner=24, groups=4, kept_groups=2, dtype=dtype)
        yield f"moe_{dtype}_{steps}", {"output": run_moe(device, arrays, attributes)}

    for rule, key_dim, value_dim in (("linear", 3, 5), ("gated", 64, 64), ("delta", 100, 6), ("gated_delta", 512, 12)):
        arrays, attributes = linear_attention_case(
            rule=rule, key_dim=key_dim, value_dim=value_dim, q_heads=4, steps=3, dtype="bfloat16", state_dtype="float16"
        )
        yield f"attention_{rule}", run_linear_attention(device, arrays, attributes, in_place=rule == "gated")
    arrays, attributes = linear_attention_case(q_heads=1, key_heads=1, decay="head", shared_beta=True, state_dtype=None)
    yield "attention_shared", run_linear_attention(device, arrays, attributes)
    for steps, width in ((0, 4), (1, 4), (33, 4), (2, 7), (40, 1)):
        arrays, attributes = causal_conv_case(steps=steps, width=width, dtype="float16")
        yield f"conv_{steps}_{width}", run_causal_conv(device, arrays, attributes, in_place=steps % 2 == 1)


def run_sanitized(library: Path, folder: Path) -> subprocess.CompletedProcess[str]:
    """This module in a fresh process under AddressSanitizer."""
    runtime = run("g++", "-print-file-name=libasan.so").strip()
    environment = os.environ | {
        "LD_PRELOAD": runtime,
        # Python itself leaks, and its threads have no annotated stacks
        "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "OPENBLAS_NUM_THREADS": "1",
    }
    return subprocess.run(
        [sys.executable, "-m", "tests.kernels.sanitized", str(library), str(folder)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


if __name__ == "__main__":
    run_cases(EmulatedDevice(KdaKernels(KernelLibrary.open(sys.argv[1]))), Path(sys.argv[2]))
