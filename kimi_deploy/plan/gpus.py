"""The table of GPUs."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from importlib.resources import files

from kimi_deploy.errors import UsageError


@dataclass(frozen=True)
class Gpu:
    """A GPU's memory in bytes, its bandwidth in bytes per second, and where both are published."""

    name: str
    memory: int
    bandwidth: int
    source: str


def gpu_table() -> dict[str, Gpu]:
    """Every known GPU by the name that a user types."""
    raw = tomllib.loads((files("kimi_deploy.plan") / "gpus.toml").read_text(encoding="utf-8"))
    return {
        name: Gpu(name, int(g["memory_gb"] * 1e9), int(g["bandwidth_gb_s"] * 1e9), g["source"])
        for name, g in raw.items()
    }


def find_gpu(name: str) -> Gpu:
    """The GPU of that name. Raises UsageError with the known names."""
    table = gpu_table()
    if name.lower() not in table:
        raise UsageError(
            "no such GPU in the table",
            seen=name,
            expected=", ".join(table),
            fix="give --memory, and --bandwidth for speeds, instead of --gpu",
        )
    return table[name.lower()]
