"""Parity of a runner with the PyTorch source model: logits, every state tensor, every way to split the work."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import numpy as np

from kimi_deploy.runtime.base import Runner
from kimi_deploy.runtime.torch_runner import TorchRunner
from kimi_deploy.validate.checks import Checks
from kimi_deploy.validate.greedy import generate, judge_tokens
from kimi_deploy.validate.judging import Judge, Place
from kimi_deploy.validate.observation import run_in_pieces
from kimi_deploy.validate.prompts import Prompt, longest
from kimi_deploy.validate.reference import Reference
from kimi_deploy.validate.report import Curves, Report, Row
from kimi_deploy.validate.selection import Selection
from kimi_deploy.validate.tolerances import Tolerance

Advance = Callable[[int], None]
SCATTERED = 400
"""Pairs of logits drawn for the scatter plot."""
CHOSEN = 64
"""Greedy steps in which the candidate picks the token itself."""


class Parity:
    """Runs the checks of one candidate against the float32 source model.

    `greedy_tokens` is how many tokens the greedy check generates; with `exact_greedy` they must be identical,
    otherwise a difference must be a near tie of the reference. `same_dtype` is the source model in the candidate's
    dtype, where that is not float32: its distance from the reference is the noise that the candidate's is measured by.
    """

    def __init__(
        self,
        reference: TorchRunner,
        candidate: Runner,
        tolerance: Tolerance,
        *,
        greedy_tokens: int,
        exact_greedy: bool,
        same_dtype: Runner | None = None,
    ) -> None:
        self.reference = Reference(reference, tolerance)
        self.candidate = candidate
        self.tolerance = tolerance
        self.greedy_tokens = greedy_tokens
        self.exact_greedy = exact_greedy
        self.same_dtype = same_dtype

    def run(
        self,
        prompts: Sequence[Prompt],
        backend: str,
        advance: Advance = lambda n: None,
        greedy_prompt: Prompt | None = None,
        selection: Selection | None = None,
    ) -> Report:
        """Every selected check on every selected prompt; those that take one prompt on the longest.

        `greedy_prompt` is the one that greedy generation begins with, the longest by default. `advance(1)` is called
        `steps(prompts)` times.
        """
        chosen = selection or Selection()
        judge = Judge(self.reference, self.tolerance, chosen.layer)
        checks = Checks(judge, self.candidate, self.same_dtype)
        report = Report(backend, self.tolerance)

        def rows_of(name: str, rows: Iterator[Row], index: int | None) -> None:
            if name in chosen.checks and (index is None or chosen.prompt in (None, index)):
                report.add(r for r in rows if chosen.prompt in (None, r.prompt_index))
            advance(1)

        for name, check in (
            ("reference-forms", checks.reference_forms),
            ("reference-dtype", checks.reference_dtype),
            ("prefill", checks.prefill),
            ("split-prefill", checks.split_prefill),
            ("decode-steps", checks.decode_steps),
        ):
            for index, prompt in enumerate(prompts):
                rows_of(name, check(index, prompt), index)
        rows_of("ragged-batch", checks.ragged_batch(prompts), None)
        rows_of("padding", checks.padding(prompts), None)
        for name, check, prompt in (
            ("chunk-boundaries", checks.chunk_boundaries, longest(prompts)),
            ("resume", checks.resume, longest(prompts)),
            ("full-cache", checks.full_cache, longest(prompts)),
        ):
            index = prompts.index(prompt) if chosen.prompt is None else chosen.prompt
            rows_of(name, check(index, prompts[index]), index)
        index = prompts.index(greedy_prompt or longest(prompts)) if chosen.prompt is None else chosen.prompt
        rows_of("greedy", self._greedy(judge, index, prompts[index], report), index)
        self._judge_noise(report)
        return report

    @staticmethod
    def steps(prompts: Sequence[Prompt]) -> int:
        """How many times `run` calls `advance`."""
        return 5 * len(prompts) + 6

    def _greedy(self, judge: Judge, index: int, prompt: Prompt, report: Report) -> Iterator[Row]:
        """The candidate in single steps along the reference's greedy tokens: values, choices, and drift."""
        start, count = len(prompt.ids), self.greedy_tokens
        tokens, steps = generate(self.reference.runner, prompt.ids, count)
        ids = np.concatenate([prompt.ids, tokens[:-1]])
        seen = run_in_pieces(self.candidate, ids, range(start, len(ids)))
        followed = self.reference.follow(ids, seen)
        place = Place("greedy", index, prompt.name)
        yield from judge.rows(place, seen, followed)
        expected = followed.observation.logits[start - 1 :]
        actual = seen.logits[start - 1 :]
        passed, note = judge_tokens(actual, tokens, expected, self.tolerance, exact=self.exact_greedy)
        yield Row("greedy", prompt.name, "tokens", None, passed, note, index)
        yield self._choice(index, prompt, tokens, actual)
        peak = float(np.abs(expected).max())
        scatter = np.random.default_rng(0).integers(0, expected.size, SCATTERED)
        pairs = zip(expected.ravel()[scatter].tolist(), actual.ravel()[scatter].tolist(), strict=True)
        report.curves = Curves(
            drift=(np.abs(actual - expected).max(-1) / peak).tolist(),
            # the steps were taken with the reference's own choices
            drift_noise=[] if followed.choices else (np.abs(steps - expected).max(-1) / peak).tolist(),
            scatter=list(pairs),
        )

    def _choice(self, index: int, prompt: Prompt, tokens: np.ndarray, logits: np.ndarray) -> Row:
        """The tokens that the candidate itself picks, which a device may do apart from the logits [count, vocab]."""
        count = min(CHOSEN, len(tokens))
        state = self.candidate.new_state(batch=1, capacity=len(prompt.ids) + count)
        fed = [prompt.ids, *tokens[: count - 1, None]]
        chosen = np.array([self.candidate.forward_greedy(ids[None], state)[0][0] for ids in fed])
        own = logits[:count]
        short = own.max(-1) - own[np.arange(count), chosen]
        # computed twice, for all steps and for the last alone: not to the bit
        wrong = np.flatnonzero(~(short <= self.tolerance.peak * np.abs(own).max(-1)))
        note = ""
        if len(wrong):
            at = int(wrong[0])
            note = f"token {chosen[at]} chosen at step {at + 1}, its own logits are highest for {own[at].argmax()}"
        return Row("greedy", prompt.name, "choice", None, not len(wrong), note, index)

    def _judge_noise(self, report: Report) -> None:
        """Where a tolerance says how many times PyTorch's own noise is allowed, judge each prefill's logits by that."""
        noise, allowed = report.noise(), self.tolerance.noise
        if self.same_dtype is None or not noise or allowed is None:
            return
        report.rows = [
            replace(row, passed=False, note=f"{row.rms / noise:.1f} times PyTorch's own noise, {allowed:g} allowed")
            if row.check == "prefill" and row.tensor == "logits" and row.passed and row.rms > allowed * noise
            else row
            for row in report.rows
        ]
