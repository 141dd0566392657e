"""What the CUDA compiler made: no kernel spills a register or keeps an array in local memory, no launch waits."""

import importlib
import itertools

from ..capabilities import needs_nvcc
from .build import PLUGINS, build, run

ARCHITECTURES = ("80", "90a")
DATA_TYPES = ("float32", "float16", "bfloat16")
KERNELS = {
    *(f"kda_decode<{t}, {d}, {one}>" for t in DATA_TYPES for d in (64, 128) for one in (0, 1)),
    *(
        f"kda_{kernel}<{t}, {d}>"
        for kernel, t, d in itertools.product(("prep", "chain", "output"), ("float16", "bfloat16"), (64, 128))
    ),
    *(
        f"moe_{kernel}<{t}>"
        for kernel, t in itertools.product(
            ("score", "choose", "few_gate_up", "few_down", "count", "place", "sum"), DATA_TYPES
        )
    ),
    *(f"moe_product_16<{t}, {first}>" for t, first in itertools.product(("float16", "bfloat16"), (0, 1))),
    *(f"moe_product_32<float32, {first}>" for first in (0, 1)),
    *(f"linear_attention<{t}, {rows}>" for t, rows in itertools.product(DATA_TYPES, (64, 128, 256, 512))),
    *(f"causal_conv<{t}, {lanes}, {width}>" for t, lanes, width in itertools.product(DATA_TYPES, (1, 32), (0, 4))),
}
RUNTIME_CALLS = {
    *("cudaDeviceGetAttribute", "cudaFuncSetAttribute", "cudaGetDevice"),
    *("cudaGetErrorName", "cudaGetErrorString", "cudaGetLastError"),
}


@needs_nvcc
def test_no_kernel_uses_local_memory(monkeypatch):
    monkeypatch.syspath_prepend(PLUGINS)
    report = importlib.import_module("ptxas_report")
    folder = build("kernels-report", "-DKIMI_EMULATED=OFF", f"-DKIMI_ARCHITECTURES={';'.join(ARCHITECTURES)}")
    kernels = report.read_report(folder)
    for architecture in ARCHITECTURES:
        found = {k.name for k in kernels if k.architecture == f"sm_{architecture}"}
        assert found == KERNELS
    assert [k for k in kernels if k.stack or k.stores or k.loads] == []


@needs_nvcc
def test_launches_neither_allocate_nor_wait():
    """What the host code calls of CUDA's runtime: nothing that allocates, copies or synchronises."""
    folder = build("kernels-report", "-DKIMI_EMULATED=OFF", f"-DKIMI_ARCHITECTURES={';'.join(ARCHITECTURES)}")
    objects = sorted(map(str, folder.glob("*.o")))
    called = {line.split()[-1] for line in run("nm", "--undefined-only", *objects).splitlines() if " U cuda" in line}
    assert "cudaFuncSetAttribute" in called
    assert called - RUNTIME_CALLS == set()
