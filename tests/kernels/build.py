"""Building the kernel libraries for the tests; CMake rebuilds only what changed."""

from __future__ import annotations

import fcntl
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[2]
PLUGINS = ROOT / "plugins"


def build(folder: str, *options: str, targets: tuple[str, ...] = ()) -> Path:
    """Configures plugins/ into build/`folder` and builds `targets` (all if none). Returns that folder.

    A lock lets parallel test workers share one build.
    """
    where = ROOT / "build" / folder
    where.mkdir(parents=True, exist_ok=True)
    with open(where / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        run("cmake", "-S", str(PLUGINS), "-B", str(where), "-DKIMI_WERROR=ON", *options)
        run("cmake", "--build", str(where), "--parallel", "2", *(("--target", *targets) if targets else ()))
    return where


def run(*command: str) -> str:
    """Runs a tool; a failure is a test failure with the tool's whole output."""
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}\n{done.stderr}"
    return done.stdout + done.stderr
