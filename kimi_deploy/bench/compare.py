"""Two reports of one benchmark: what became slower."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from kimi_deploy.bench.run import PHASES, SCHEMA_VERSION
from kimi_deploy.errors import UsageError

Verdict = Literal["same", "slower", "faster"]


@dataclass(frozen=True)
class Change:
    """A runtime's median over the floor of its own run, before and after; `change` 0.1 is 10 % slower."""

    runtime: str
    phase: str
    before: float
    after: float
    change: float
    verdict: Verdict

    def to_dict(self) -> dict[str, object]:
        return asdict(self)


def read_report(path: Path) -> dict[str, Any]:
    """A report of `bench MODEL EXPORT -o`. Raises UsageError for a file that is none, or of another schema."""
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError("the report cannot be read", seen=f"{path}: {error}") from error
    version = report.get("schema_version") if isinstance(report, dict) else None
    if version != SCHEMA_VERSION or "times_of_floor" not in report:
        raise UsageError(
            "this is not a report that can be compared",
            seen=f"{path}: schema version {version}",
            expected=f"a file that `bench MODEL EXPORT -o FILE` wrote, schema version {SCHEMA_VERSION}",
            fix="measure again with this version",
        )
    return report


def compare_reports(before: dict[str, Any], after: dict[str, Any], threshold: float) -> list[Change]:
    """Every runtime that both reports have, prefill and decode; beyond `threshold` it is slower, or faster.

    Raises UsageError for reports of different work or without a common runtime.
    """
    for key in ("prompt", "threads"):
        if before["task"][key] != after["task"][key]:
            raise UsageError(
                f"the reports are of different work: {key}",
                seen=f"{before['task'][key]} and {after['task'][key]}",
                fix="measure both with the same options",
            )
    common = [name for name in before["times_of_floor"] if name in after["times_of_floor"]]
    if not common:
        raise UsageError(
            "the reports have no runtime in common", seen=f"{list(before['results'])}, {list(after['results'])}"
        )
    rows = []
    for name in common:
        for phase in PHASES:
            old, new = (report["times_of_floor"][name][phase] for report in (before, after))
            change = new / old - 1
            verdict: Verdict = "slower" if change > threshold else "faster" if change < -threshold else "same"
            rows.append(Change(name, phase, old, new, change, verdict))
    return rows
