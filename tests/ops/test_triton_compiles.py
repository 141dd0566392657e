"""The Triton kernels compile for every architecture, without a GPU, and keep their tiles in registers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

# bytes of stack per thread that spilled registers may take: none in the serial kernel, where each would be waited for
STACK = {"kda_chain": 0, "kda_gated_norm": 0, "kda_decode": 128, "kda_prep": 192}


@pytest.mark.parametrize("capability", [80, 90, 100, 120])
def test_every_kernel_compiles_for(capability: int, tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    found = subprocess.run(
        [sys.executable, "-m", "tests.ops.triton_compile", str(capability)],
        env=environment | {"TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 0, found.stderr
    kernels = {k["kernel"]: k for k in map(json.loads, found.stdout.splitlines())}
    assert kernels.keys() == STACK.keys()
    for name, kernel in kernels.items():
        assert kernel["bytes"] > 0
        assert kernel["local"] == 0
        assert kernel["stack"] <= STACK[name], kernel
