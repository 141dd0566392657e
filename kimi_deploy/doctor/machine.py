"""Python, disk and memory."""

from __future__ import annotations

import os
import platform
import shutil
import sys
from pathlib import Path

from kimi_deploy.doctor.check import Check
from kimi_deploy.memory import machine_memory


def python() -> list[Check]:
    good = (3, 11) <= sys.version_info[:2] <= (3, 12)
    fix = "" if good else "use Python 3.11 or 3.12"
    return [Check("python", "ok" if good else "problem", platform.python_version(), fix)]


def disk(folder: Path) -> list[Check]:
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free / 1e9
    fix = "" if free > 5 else "an export needs as much as the checkpoint, an engine a little more"
    return [Check("disk", "ok" if free > 5 else "warning", f"{free:.1f} GB free at {folder}", fix)]


def memory() -> list[Check]:
    total = machine_memory() / 1e9
    fix = "" if total > 4 else "small models only: building an engine takes four times its weights"
    return [Check("memory", "ok" if total > 4 else "warning", f"{total:.1f} GB with swap, {os.cpu_count()} CPUs", fix)]
