"""Builds engines of "mini-62m" in every dtype and says what the plans hold beside the weights; fails above the bounds.

    python scripts/engine_sizes.py [--dtype float16 ...]

Each twice: with plugins for all ops that have one, which needs the kernel library (`make kernels`, or the emulated one
that the tests build), and with one for KimiDeltaAttention alone, as without that library. Needs the extras torch and
tensorrt-rtx, 2 GB of memory and about a minute. Time and peak memory are of each build alone.
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

from kimi_deploy.kernels.library import default_path

DTYPES = ("float32", "float16", "bfloat16")
# plan over weights, by the plugins: seen 1.04 and 1.16, in 16 bits 1.08 and 1.32
BOUNDS = {
    "all": {"float32": 1.05, "float16": 1.09, "bfloat16": 1.09},
    "attention": {"float32": 1.17, "float16": 1.34, "bfloat16": 1.34},
}
OPS = {"all": ["KimiDeltaAttention", "MixtureOfExperts"], "attention": ["KimiDeltaAttention"]}
# GB that a build may hold at its peak above the weights
PEAK_BOUND = 2.0
MAIN = "from kimi_deploy.cli.main import main; main()"
# no build runs a plugin: the emulated library says the same of workspaces as the CUDA one
EMULATED = """
from kimi_deploy.engine import plugin_executors
from kimi_deploy.kernels.library import KernelLibrary
executor = plugin_executors.KernelExecutor(KernelLibrary.open(kind="emulated"))
plugin_executors.default_executor = lambda: executor
"""
TEXT = re.compile(rb"[\t\n\r\x20-\x7e]{2000,}")


def kimi_deploy(*words: str) -> tuple[float, float]:
    """Run the command; returns its seconds and the GB of memory it held at its peak."""
    start = time.monotonic()
    code = MAIN if default_path("cuda").is_file() or not default_path("emulated").is_file() else EMULATED + MAIN
    process = subprocess.Popen([sys.executable, "-c", code, *words], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"kimi-deploy {' '.join(words)} failed with status {status}")
    return time.monotonic() - start, usage.ru_maxrss * 1024 / 1e9


def main() -> int:
    """0 when every plan is within its bound, 1 when one is not."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=list(DTYPES))
    failed = False
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model, export, engine = (str(folder / part) for part in ("model", "export", "engine"))
        kimi_deploy("synth", "--preset", "mini-62m", "-o", model)
        kernels = default_path("cuda").is_file() or default_path("emulated").is_file()
        sets = [name for name in BOUNDS if name == "attention" or kernels]
        if len(sets) < len(BOUNDS):
            print("without the kernel library (make kernels) there is no plugin of MixtureOfExperts", file=sys.stderr)
        print(
            "dtype     plugins   weights MB  plan MB  ratio  bound  kernels  kernel MB  other text MB  build s  peak GB"
        )
        for dtype in parser.parse_args().dtype:
            kimi_deploy("export", model, "-o", export, "--dtype", dtype, "--force")
            for plugins in sets:
                recipe = folder / "recipe.toml"
                recipe.write_text(f'backend = "tensorrt-rtx"\nplugin = "python"\nplugin_ops = {OPS[plugins]}\n')
                seconds, peak = kimi_deploy("build-engine", export, "-o", engine, "--recipe", str(recipe), "--force")
                weights = (Path(export) / "weights.bin").stat().st_size
                plan = (Path(engine) / "engine.plan").read_bytes()
                texts = TEXT.findall(plan)
                sources = [len(t) for t in texts if b"__global__" in t]
                other = sum(map(len, texts)) - sum(sources)
                ratio = len(plan) / weights
                bound = BOUNDS[plugins][dtype]
                failed |= ratio > bound or peak > weights / 1e9 + PEAK_BOUND
                print(
                    f"{dtype:9} {plugins:9} {weights / 1e6:10.1f} {len(plan) / 1e6:8.1f} {ratio:6.3f} {bound:6.2f} "
                    f"{len(sources):8} {sum(sources) / 1e6:10.1f} {other / 1e6:14.1f} {seconds:8.1f} {peak:8.2f}",
                    flush=True,
                )
    if failed:
        print("a plan is larger than its bound, or its build took too much memory", file=sys.stderr)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
