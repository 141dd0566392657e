#!/usr/bin/env python3
"""Measure the resident memory of an export on ONNX Runtime's CPU provider against what `kimi-deploy plan` says.

    kimi-deploy export MODEL -o EXPORT --quantize int4
    python scripts/measure_resident.py EXPORT --context 514,2050

For each context a process of its own opens EXPORT, prefills so many tokens drawn at random, less one, in steps of 512,
takes one decode step, and reads /proc/self/smaps. A JSON line per context: `measured` bytes in all, of which `mapped`
are pages of weight files; `peak`, which loading may have reached; `planned` with its packed and mapped weights;
`planned_over_measured`. The exit code is 1 when that is off by more than 15 %.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

from kimi_deploy.config import KimiLinearConfig
from kimi_deploy.manifest import Manifest
from kimi_deploy.plan.report import Request
from kimi_deploy.quantization.scheme import recorded_scheme
from kimi_deploy.runtime.generation import DEFAULT_CHUNK

ALLOWED = 0.15


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("export", type=Path, metavar="EXPORT")
    parser.add_argument("--context", default="514,2050", metavar="TOKENS", help="comma-separated")
    parser.add_argument("--threads", type=int, default=1, metavar="N")
    parser.add_argument("--kernels", default="none", metavar="auto|none|FILE", help="the library of CPU kernels")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    contexts = [int(c) for c in arguments.context.split(",")]
    if arguments.here:
        print(json.dumps(run(arguments.export, contexts[0], arguments.threads, arguments.kernels)))
        return 0
    worst = 0.0
    for context in contexts:
        command = [sys.executable, __file__, str(arguments.export), "--here", "--context", str(context)]
        command += ["--threads", str(arguments.threads), "--kernels", arguments.kernels]
        measured = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
        planned = plan(arguments.export, context, arguments.kernels != "none")
        ratio = planned["planned"] / measured["measured"]
        worst = max(worst, abs(ratio - 1))
        print(json.dumps({"context": context, **measured, **planned, "planned_over_measured": round(ratio, 3)}))
    return int(worst > ALLOWED)


def plan(export: Path, context: int, kernels: bool) -> dict[str, int]:
    """What `kimi-deploy plan` says of the export for one sequence."""
    details = Manifest.read(export).details
    config = KimiLinearConfig.from_folder(export)
    request = Request(config, details["dtype"], context, batch=1, scheme=recorded_scheme(details))
    weights = request.cpu_weights(kernels)
    return {
        "planned": request.cpu_memory(kernels).total,
        "planned_packed_weights": weights.packed,
        "planned_mapped_weights": weights.mapped,
    }


def run(export: Path, context: int, threads: int, kernels: str) -> dict[str, int]:
    """Prefill `context` - 1 tokens and decode one, here; the memory of this process afterwards."""
    import numpy as np

    from kimi_deploy.runtime.generation import prefill
    from kimi_deploy.runtime.ort_runner import OrtRunner

    runner = OrtRunner(export, threads=threads, kernels=kernels)
    state = runner.new_state(1, context)
    ids = np.random.default_rng(0).integers(0, runner.contract.vocab_size, (1, context))
    prefill(runner, ids[:, :-1], state, chunk=DEFAULT_CHUNK)
    runner.forward(ids[:, -1:], state)
    return resident(export)


def resident(export: Path) -> dict[str, int]:
    """Bytes of this process in memory, those that are pages of files in `export`, and the most it ever had."""
    total = mapped = 0
    in_export = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first, *rest = line.split()
        if not first.endswith(":"):
            in_export = str(export.resolve()) in line
        elif first == "Rss:":
            total += int(rest[0]) * 1024
            mapped += int(rest[0]) * 1024 * in_export
    status = Path("/proc/self/status").read_text().splitlines()
    peak = next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))
    return {"measured": total, "mapped": mapped, "peak": peak}


if __name__ == "__main__":
    sys.exit(main())
