"""Compile the Triton kernels ahead of time for one architecture; prints a JSON object per kernel.

A process of its own: under the interpreter's switch there is nothing to compile. `python -m tests.ops.triton_compile
90`: kernel, dtype, bytes of cubin, registers, bytes of stack (spilled registers) and shared memory.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kimi_deploy.ops.kimi_delta_attention.triton.chain import kda_chain
from kimi_deploy.ops.kimi_delta_attention.triton.decode import kda_decode
from kimi_deploy.ops.kimi_delta_attention.triton.gated_norm import kda_gated_norm
from kimi_deploy.ops.kimi_delta_attention.triton.prep import kda_prep
from kimi_deploy.ops.kimi_delta_attention.triton.tiling import prefill_tiling

FLOAT32 = {"A_log", "dt_bias", "past_state", "present_state", "u_out", "u_in", "total_out", "total_in", "o_out", "o_in"}
SCALARS = {"norm_eps": "fp32", "scale": "fp32", "lower_bound": "fp32", "l2_eps": "fp32"} | dict.fromkeys(
    ("steps", "start", "chunks", "window", "H"), "i32"
)
COBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


def compiled(kernel: Any, capability: int, data: str, constants: dict[str, Any], **options: int) -> dict[str, Any]:
    """What the kernel became."""
    signature = {
        name: "constexpr"
        if name in constants
        else "*i32"
        if name == "lengths"
        else SCALARS.get(name) or ("*fp32" if name in FLOAT32 else f"*{data}")
        for name in kernel.arg_names
    }
    aligned = {(i,): [["tt.divisibility", 16]] for i, kind in enumerate(signature.values()) if kind[0] == "*"}
    source = ASTSource(kernel, signature=signature, constexprs=constants, attrs=aligned)
    cubin = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options).asm["cubin"]
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(COBJDUMP), "--dump-resource-usage", file.name]
        report = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    used = {name.lower(): int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", report)}
    return {"kernel": kernel.__name__, "data": data, "bytes": len(cubin), **used}


def main(capability: int) -> None:
    tiling = prefill_tiling(128, torch.empty(0, dtype=torch.bfloat16))
    chunk = tiling.chunk
    common = {"D": 128, "BLOCK": 128, "RAGGED": True}
    conv = {"WIDTH": 4, "COLUMNS": 4}
    unit = {"UNIT": tl.float16, "VALUE": tl.float32, "PRECISION": "tf32"}
    kernels: list[tuple[Any, dict[str, Any], dict[str, int]]] = [
        (kda_decode, {**common, **conv, "BOUNDED": False}, {"num_warps": 4}),
        (
            kda_prep,
            {**common, **unit, "WIDTH": 4, "BOUNDED": True, "CHUNK": chunk, "LEVELS": chunk.bit_length() - 1},
            {"num_warps": tiling.prep_warps},
        ),
        (
            kda_chain,
            {
                **common,
                **conv,
                "CHUNK": chunk,
                "BLOCK_V": tiling.block_v,
                "LAST": True,
                "PRECISION": "tf32",
                "STAGES": tiling.stages,
            },
            {"num_warps": tiling.chain_warps},
        ),
        (kda_gated_norm, {**common, "ROWS": 16}, {"num_warps": 4}),
    ]
    for kernel, constants, options in kernels:
        print(json.dumps(compiled(kernel, capability, "bf16", constants, **options)), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]))
