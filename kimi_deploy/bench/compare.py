"""Two reports of one benchmark: what became slower."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Literal

from kimi_deploy.bench.report import Report, Result
from kimi_deploy.errors import UsageError
from kimi_deploy.runtime.base import ops_run_as

Verdict = Literal["same", "slower", "faster"]


@dataclass(frozen=True)
class Change:
    """A runtime's median over the floor of its own run, before and after; `change` 0.1 is 10 % slower.

    `spread` is the wider of the two runs' own, the 90th less the 10th percentile over the median: where it is above the
    threshold, times of one run differ by more than what is looked for, and the verdict may be chance.
    """

    runtime: str
    batch: int
    context: int
    phase: str
    before: float
    after: float
    change: float
    spread: float
    verdict: Verdict

    def to_dict(self) -> dict[str, object]:
        return asdict(self)


def compare_reports(before: Report, after: Report, threshold: float) -> list[Change]:
    """Every point and runtime that both reports have, prefill and decode; beyond `threshold` it is slower, or faster.

    Raises UsageError for reports of different work or without a common runtime at a common point.
    """
    for setting in ("threads", "steps"):
        values = [getattr(report.settings, setting) for report in (before, after)]
        if values[0] != values[1]:
            raise UsageError(
                f"the reports are of different work: {setting}",
                seen=f"{values[0]} and {values[1]}",
                fix="measure both with the same options",
            )
    old, new = ({(r, p.batch, p.context): p.results[r] for p in x.points for r in p.results} for x in (before, after))
    common = [key for key in old if key in new]
    if not common:
        names = ("; ".join(f"{r} at batch {b}, context {c}" for r, b, c in keys) for keys in (old, new))
        raise UsageError(
            "the reports have no runtime at the same batch and context in common", seen=" against ".join(names)
        )
    rows = []
    for key in common:
        for phase in ("prefill", "decode"):
            then, now = (getattr(results[key].times_of_floor, phase) for results in (old, new))
            change = now / then - 1
            verdict: Verdict = "slower" if change > threshold else "faster" if change < -threshold else "same"
            widths = [getattr(results[key], phase) for results in (old, new)]
            spread = max((s.p90 - s.p10) / s.median for s in widths)
            rows.append(Change(*key, phase, then, now, change, spread, verdict))
    return rows


def changed_kernels(before: Report, after: Report) -> list[tuple[str, str, str]]:
    """Runtimes of the first points that ran other kernels after than before: their names, and both in words."""
    old, new = ({name: _kernels(r) for name, r in x.points[0].results.items()} for x in (before, after))
    return [(name, then, new[name]) for name, then in old.items() if name in new and new[name] != then]


def _kernels(result: Result) -> str:
    return ops_run_as(None if result.kernels is None else result.kernels.model_dump())
