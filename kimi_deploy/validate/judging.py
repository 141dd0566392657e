"""What a run showed against what it should have shown: rows of the report."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from kimi_deploy.validate.compare import compare
from kimi_deploy.validate.diagnosis import describe, first_wrong_position
from kimi_deploy.validate.logits import compare_logits
from kimi_deploy.validate.observation import Observation
from kimi_deploy.validate.reference import Followed, Reference
from kimi_deploy.validate.report import Row
from kimi_deploy.validate.tolerances import Tolerance


@dataclass(frozen=True)
class Place:
    """Where a comparison stands in the report: its check, and the prompt by index and name."""

    check: str
    index: int
    prompt: str


@dataclass(frozen=True)
class Judge:
    """Compares with `reference` within `tolerance`; only the states of `layer`, where that is not None."""

    reference: Reference
    tolerance: Tolerance
    layer: int | None = None

    def against_reference(self, place: Place, ids: np.ndarray, seen: Observation) -> Iterator[Row]:
        """Rows for what a run of int64 ids [T] showed, with the same expert choices on both sides."""
        return self.rows(place, seen, self.reference.follow(ids, seen))

    def rows(
        self,
        place: Place,
        seen: Observation,
        followed: Followed,
        *,
        bound: Tolerance | None = None,
        judged: bool = True,
    ) -> Iterator[Row]:
        """Rows for the logits and every state; `bound` replaces the judge's tolerance."""
        bound, expected = bound or self.tolerance, followed.observation
        where = (place.check, place.prompt)
        if self.layer is None:
            logits = compare_logits(seen.logits, expected.logits, bound)
            at = first_wrong_position(seen.logits, expected.logits, bound.peak)
            note = "" if at is None else f"from token {at} of {len(seen.logits)} on"
            passed = logits.within(bound)
            yield Row(*where, "logits", logits, passed, note, place.index, at, followed.count, judged)
        if seen.length != expected.length:
            note = f"{seen.length} tokens consumed, {expected.length} expected"
            yield Row(*where, "lengths", None, False, note, place.index, judged=judged)
        for name, value in expected.states.items():
            layer, kind = name.split(".")
            if self.layer not in (None, int(layer)):
                continue
            actual = seen.states[name]
            difference = compare(actual, value)
            if difference.within(bound):
                yield Row(*where, name, difference, True, "", place.index, judged=judged)
                continue
            note = describe(kind, actual, value, bound.peak)
            at = first_wrong_position(actual, value, bound.peak) if kind == "latent" else None
            yield Row(*where, name, difference, False, note, place.index, at, judged=judged)
