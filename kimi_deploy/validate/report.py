"""The result of a validation: every comparison, the verdict, and both as a table or as plain data."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from kimi_deploy.validate.compare import Difference
from kimi_deploy.validate.logits import LogitsDifference
from kimi_deploy.validate.tolerances import Tolerance

REPORT_VERSION = 2
"""Goes up when a key changes its meaning or is gone; a key more is no new version."""


@dataclass(frozen=True)
class Row:
    """One comparison: of which check and prompt, which tensor, how far, and whether that is allowed.

    `prompt_index` counts the prompts of the run from 0; `position` is the first wrong token where there is one;
    `choices` is how many expert choices the reference took over; a row that is not `judged` is the reference's own
    noise.
    """

    check: str
    prompt: str
    tensor: str
    difference: Difference | LogitsDifference | None
    passed: bool
    note: str = ""
    prompt_index: int | None = None
    position: int | None = None
    choices: int = 0
    judged: bool = True

    @property
    def peak(self) -> float:
        """Error over the expected peak; 0 where the row compares tokens, not values."""
        return self._values.peak if self._values is not None else 0.0

    @property
    def rms(self) -> float:
        """Rms error over the expected rms; 0 where the row compares tokens, not values."""
        return self._values.rms if self._values is not None else 0.0

    @property
    def _values(self) -> Difference | None:
        return self.difference.difference if isinstance(self.difference, LogitsDifference) else self.difference

    def to_dict(self) -> dict[str, Any]:
        return {
            "check": self.check,
            "prompt": self.prompt,
            "prompt_index": self.prompt_index,
            "tensor": self.tensor,
            "passed": self.passed,
            "judged": self.judged,
            "note": self.note,
            "position": self.position,
            "choices": self.choices,
            **(self.difference.to_dict() if self.difference is not None else {}),
        }


@dataclass(frozen=True)
class Failure:
    """The first tensor that differs, where in the model that points to, and the command that shows just that."""

    row: Row
    where_to_look: str
    command: str

    def to_dict(self) -> dict[str, Any]:
        return {**self.row.to_dict(), "where_to_look": self.where_to_look, "command": self.command}


@dataclass
class Curves:
    """What the plots show.

    `drift`: the largest logit error of each generated token over the peak, `drift_noise` that of the reference's own
    steps against its one pass; `scatter`: pairs (reference's logit, candidate's).
    """

    drift: list[float] = field(default_factory=list)
    drift_noise: list[float] = field(default_factory=list)
    scatter: list[tuple[float, float]] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        return {
            "drift": [_short(v) for v in self.drift],
            "drift_noise": [_short(v) for v in self.drift_noise],
            "scatter": [[_short(a), _short(b)] for a, b in self.scatter],
        }


def plain(value: Any) -> Any:
    """The same data for JSON, which has no NaN and no infinity: they become null."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _short(value: float) -> float:
    return float(f"{value:.5g}")


@dataclass
class Report:
    """All rows of one validation against `tolerance`."""

    backend: str
    tolerance: Tolerance
    rows: list[Row] = field(default_factory=list)
    curves: Curves = field(default_factory=Curves)
    failure: Failure | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    """What was compared: names, hashes and settings, for whoever reads the report alone."""

    def add(self, rows: Iterable[Row]) -> None:
        """Append rows in the order they were computed."""
        self.rows += rows

    @property
    def passed(self) -> bool:
        """Whether every judged row passed; a report without rows has proven nothing and did not pass."""
        return bool(self.rows) and all(r.passed for r in self.rows if r.judged)

    @property
    def first_failure(self) -> Row | None:
        """Of the first check that failed, the first wrong tensor in the model's order, of whichever prompt.

        Every later layer inherits an error, and so do the logits: the first tensor is where to look.
        """
        failed = next((r for r in self.rows if r.judged and not r.passed), None)
        return None if failed is None else self._first_wrong(failed.check)

    def _first_wrong(self, check: str) -> Row:
        """Of a check that failed, the first wrong tensor in the model's order."""
        rows = [r for r in self.rows if r.check == check]
        order = {name: at for at, name in enumerate(dict.fromkeys(r.tensor for r in rows if r.tensor != "logits"))}
        wrong = [r for r in rows if not r.passed]
        return min(wrong, key=lambda r: order.get(r.tensor, len(order)))

    def noise(self) -> float | None:
        """The largest rms error of the reference's own logits, over their rms; None where it was not measured."""
        rows = [r for r in self.rows if not r.judged] or [r for r in self.rows if r.check == "reference-forms"]
        return max((r.rms for r in rows if r.tensor == "logits"), default=None)

    def summary(self) -> list[dict[str, Any]]:
        """One line per check: worst logits, worst state and where, agreement, verdict."""
        lines = []
        for check in dict.fromkeys(r.check for r in self.rows):
            rows = [r for r in self.rows if r.check == check]
            logits = [r.difference for r in rows if isinstance(r.difference, LogitsDifference)]
            states = [r for r in rows if isinstance(r.difference, Difference)]
            worst = max(states, key=lambda r: r.peak, default=None)
            passed = all(r.passed for r in rows)
            if passed or not all(r.judged for r in rows):
                note = next((r.note for r in rows if r.note and r.passed == passed), "")
            else:
                wrong = self._first_wrong(check)
                # quantised checks compare no tensor by name
                note = f"{wrong.tensor}: {wrong.note}" if wrong.note and wrong.difference is not None else wrong.note
                note = note or wrong.tensor
            lines.append(
                {
                    "check": check,
                    "comparisons": len(rows),
                    "logits_peak": max((d.difference.peak for d in logits), default=None),
                    "logits_rms": max((d.difference.rms for d in logits), default=None),
                    "kl": max((d.kl for d in logits), default=None),
                    "top1": min((d.top1 for d in logits), default=None),
                    "top5": min((d.top5 for d in logits), default=None),
                    "top10": min((d.top10 for d in logits), default=None),
                    "state_peak": worst.peak if worst else None,
                    "worst_state": worst.tensor if worst else None,
                    "choices": sum(r.choices for r in rows),
                    "judged": all(r.judged for r in rows),
                    "passed": passed,
                    "note": note,
                }
            )
        return lines

    def to_dict(self) -> dict[str, Any]:
        """The report as plain data, of version REPORT_VERSION; docs/validation.md says what each key means."""
        return {
            "report_version": REPORT_VERSION,
            "backend": self.backend,
            **self.facts,
            "tolerance": {
                "name": self.tolerance.name,
                "peak": self.tolerance.peak,
                "cosine": self.tolerance.cosine,
                "router_gap": self.tolerance.router_gap,
                "noise": self.tolerance.noise,
            },
            "passed": self.passed,
            "noise": self.noise(),
            "first_failure": self.failure.to_dict() if self.failure else None,
            "summary": self.summary(),
            "rows": [r.to_dict() for r in self.rows],
            "curves": self.curves.to_dict(),
        }
