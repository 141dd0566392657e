"""Builds engines of "mini-62m" in every dtype and says what the plans hold beside the weights; fails above the bounds.

    python scripts/engine_sizes.py [--dtype float16 ...]

Needs the extras torch and tensorrt-rtx, 2 GB of memory and about a minute. Time and peak memory are of each build
alone.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

# plan over weights: seen 1.16, 1.32 and 1.32; one more kernel per layer and profile is 0.01 and 0.02
BOUNDS = {"float32": 1.17, "float16": 1.34, "bfloat16": 1.34}
TEXT = re.compile(rb"[\t\n\r\x20-\x7e]{2000,}")


def kimi_deploy(*words: str) -> tuple[float, float]:
    """Run the command; returns its seconds and the GB of memory it held at its peak."""
    start = time.monotonic()
    process = subprocess.Popen([sys.executable, "-m", "kimi_deploy", *words], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"kimi-deploy {' '.join(words)} failed with status {status}")
    return time.monotonic() - start, usage.ru_maxrss * 1024 / 1e9


def main() -> int:
    """0 when every plan is within its bound, 1 when one is not."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", nargs="+", choices=BOUNDS, default=list(BOUNDS))
    failed = False
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model, export, engine = (str(folder / part) for part in ("model", "export", "engine"))
        kimi_deploy("synth", "--preset", "mini-62m", "-o", model)
        print("dtype     weights MB  plan MB  ratio  bound  kernels  kernel MB  other text MB  build s  peak GB")
        for dtype in parser.parse_args().dtype:
            kimi_deploy("export", model, "-o", export, "--dtype", dtype, "--force")
            seconds, peak = kimi_deploy(
                *("build-engine", export, "-o", engine, "--backend", "tensorrt-rtx", "--plugin", "python", "--force")
            )
            weights = (Path(export) / "weights.bin").stat().st_size
            plan = (Path(engine) / "engine.plan").read_bytes()
            texts = TEXT.findall(plan)
            kernels = [len(t) for t in texts if b"__global__" in t]
            other = sum(map(len, texts)) - sum(kernels)
            ratio = len(plan) / weights
            failed |= ratio > BOUNDS[dtype]
            print(
                f"{dtype:9} {weights / 1e6:10.1f} {len(plan) / 1e6:8.1f} {ratio:6.3f} {BOUNDS[dtype]:6.2f} "
                f"{len(kernels):8} {sum(kernels) / 1e6:10.1f} {other / 1e6:14.1f} {seconds:8.1f} {peak:8.2f}",
                flush=True,
            )
    if failed:
        print("a plan is larger than its bound", file=sys.stderr)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
