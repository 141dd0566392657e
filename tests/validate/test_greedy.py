"""The greedy check: identical text passes, another token only when 16 bits explain it by a near tie."""

from types import SimpleNamespace

import numpy as np
import pytest

from kimi_deploy.validate.greedy import generate, judge_tokens
from kimi_deploy.validate.prompts import Prompt, longest
from kimi_deploy.validate.tolerances import tolerance

TOKENS, DIVERGES_AT = 6, 3


class TableRunner:
    """Logits come from a table by how many tokens have been consumed."""

    def __init__(self, table: np.ndarray) -> None:
        self.table = table

    def new_state(self, batch: int, capacity: int) -> SimpleNamespace:
        assert batch == 1
        return SimpleNamespace(length=0, capacity=capacity, fed=[])

    def forward(self, input_ids: np.ndarray, state: SimpleNamespace) -> np.ndarray:
        state.length += input_ids.shape[1]
        assert state.length <= state.capacity
        return self.table[None, state.length - 1][None]


def test_generation_feeds_each_best_token_and_returns_its_logits() -> None:
    table = np.eye(8, dtype=np.float32)
    tokens, logits = generate(TableRunner(table), np.array([1, 2]), TOKENS)
    assert tokens.tolist() == [1, 2, 3, 4, 5, 6]
    np.testing.assert_array_equal(logits, table[1 : 1 + TOKENS])


def greedy(gap: float, *, exact: bool, diverge: bool) -> tuple[bool, str]:
    """The reference prefers token 5 to 6 by `gap` of its peak at generated token DIVERGES_AT; the candidate may not."""
    expected = np.eye(TOKENS, 8, dtype=np.float32)
    expected[DIVERGES_AT] = 0.0
    expected[DIVERGES_AT, 5], expected[DIVERGES_AT, 6] = 1.0, 1.0 - gap
    actual = expected.copy()
    if diverge:
        actual[DIVERGES_AT, 6] = 1.1
    tokens = expected.argmax(-1)
    return judge_tokens(actual, tokens, expected, tolerance("graph_float16"), exact=exact)


NEAR, FAR = 0.5 * tolerance("graph_float16").peak, 0.5


@pytest.mark.parametrize("exact", [True, False])
def test_identical_tokens_pass(exact: bool) -> None:
    assert greedy(FAR, exact=exact, diverge=False) == (True, f"{TOKENS} of {TOKENS} tokens identical")


@pytest.mark.parametrize(
    ("gap", "exact", "passed"), [(NEAR, False, True), (NEAR, True, False), (FAR, False, False), (FAR, True, False)]
)
def test_other_tokens_pass_only_in_16_bits_and_on_a_near_tie(gap: float, exact: bool, passed: bool) -> None:
    seen, note = greedy(gap, exact=exact, diverge=True)
    assert seen is passed
    assert note.startswith(f"{TOKENS - 1} of {TOKENS} tokens identical")
    assert f"number {DIVERGES_AT + 1}" in note
    assert f"{gap:.2e}" in note


def test_the_longest_prompt_is_the_first_of_the_longest() -> None:
    prompts = [Prompt(name, np.zeros(n)) for name, n in (("a", 1), ("b", 3), ("c", 3))]
    assert longest(prompts).name == "b"
