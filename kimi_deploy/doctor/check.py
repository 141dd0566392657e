"""One finding of the doctor."""

from __future__ import annotations

import importlib.metadata
from dataclasses import asdict, dataclass
from typing import Literal

Status = Literal["ok", "warning", "problem"]


@dataclass(frozen=True)
class Check:
    """`status`, what was `seen`, and for anything but ok the `fix`, or what does not work without it."""

    name: str
    status: Status
    seen: str
    fix: str = ""

    def to_dict(self) -> dict[str, str]:
        return asdict(self)


def installed_version(package: str) -> str | None:
    """The version of an installed distribution, without importing it."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
