"""The one place where tolerances come from: `tolerances.toml` beside this file, a reason per entry."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Tolerance:
    """Bounds on a difference; both must hold.

    `peak`: largest absolute error over the largest magnitude of the expected tensor.
    `cosine`: one minus the cosine similarity of the flattened tensors.
    `router_gap`: how far apart the scores of two experts may be for one to be chosen in place of the other; see
    `reference.Reference`. `noise`: the largest rms error of logits, in units of PyTorch's own in the same dtype.
    """

    name: str
    peak: float
    cosine: float
    reason: str
    router_gap: float = 0.0
    noise: float | None = None


QUALITY = "quality_"


@dataclass(frozen=True)
class QualityBound:
    """What quantised weights may cost: `kl` nats against the unquantised model, `perplexity` as a factor on text, None
    where that says nothing."""

    name: str
    kl: float
    reason: str
    perplexity: float | None = None


@cache
def _raw() -> dict[str, dict[str, Any]]:
    return tomllib.loads((Path(__file__).parent / "tolerances.toml").read_text(encoding="utf-8"))


@cache
def _entries() -> dict[str, Tolerance]:
    raw = _raw()
    return {name: Tolerance(name, **entry) for name, entry in raw.items() if not name.startswith(QUALITY)}


def tolerance(name: str) -> Tolerance:
    """The entry called `name`; KeyError names the entries that exist."""
    entries = _entries()
    if name not in entries:
        raise KeyError(f"no tolerance {name!r}; there are {sorted(entries)}")
    return entries[name]


def quality_bound(name: str) -> QualityBound:
    """The entry `name`, which begins with `QUALITY`; KeyError when there is none."""
    return QualityBound(name, **_raw()[name])
