"""Comparators: what they measure, and what they must not let through."""

import numpy as np
import pytest

from kimi_deploy.validate.compare import compare
from kimi_deploy.validate.logits import compare_logits
from kimi_deploy.validate.tolerances import tolerance

LOOSE = tolerance("graph_float32")


def test_equal_tensors_have_no_difference() -> None:
    x = np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32)
    assert compare(x, x.copy()).within(tolerance("exact"))


def test_an_error_is_measured_against_the_peak() -> None:
    expected = np.array([1.0, -4.0, 2.0])
    difference = compare(expected + np.array([0.0, 0.0, 0.2]), expected)
    assert difference.max_abs == pytest.approx(0.2)
    assert difference.peak == pytest.approx(0.05)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_not_finite_never_passes(bad: float) -> None:
    x = np.ones(4)
    y = np.array([1.0, 1.0, bad, 1.0])
    assert not compare(y, x).within(LOOSE)
    assert not compare(y, y).within(LOOSE)
    assert not compare_logits(y[None], x[None], LOOSE).within(LOOSE)


def test_shapes_must_be_equal_not_merely_broadcast() -> None:
    with pytest.raises(ValueError, match="shapes differ"):
        compare(np.ones((1, 4)), np.ones((3, 4)))


def test_both_bounds_must_hold() -> None:
    expected = np.zeros(10000)
    expected[0] = 1.0
    # each element is far below the peak bound, together they are another direction
    noise = np.full(10000, 5e-5)
    difference = compare(expected + noise, expected)
    assert difference.peak <= LOOSE.peak
    assert not difference.within(LOOSE)


def test_a_zero_expectation_is_no_licence() -> None:
    assert compare(np.full(3, 1.0), np.zeros(3)).peak == 1.0


def test_a_changed_best_token_fails_unless_the_reference_is_tied() -> None:
    expected = np.array([[5.0, 4.0, 1.0]])
    changed = compare_logits(np.array([[4.0, 5.0, 1.0]]), expected, LOOSE)
    assert changed.flips == 1
    assert changed.top1 == 0.0
    tied = np.array([[5.0, 5.0 - 1e-6, 1.0]])
    assert compare_logits(np.array([[5.0, 5.0 + 1e-6, 1.0]]), tied, LOOSE).flips == 0


def test_kl_is_the_divergence_from_the_reference() -> None:
    p, q = np.array([0.5, 0.25, 0.25]), np.array([0.25, 0.5, 0.25])
    measured = compare_logits(np.log(q)[None], np.log(p)[None], LOOSE)
    assert measured.kl == pytest.approx(float(np.sum(p * np.log(p / q))))


@pytest.mark.parametrize("name", ["transformers", "graph_float32"])
def test_the_promised_float32_bounds_are_not_loosened(name: str) -> None:
    assert tolerance(name).peak == 1e-4
    assert tolerance(name).cosine == 1e-7
    assert tolerance(name).router_gap == 0.0


def test_every_tolerance_has_bounds_and_a_reason() -> None:
    from kimi_deploy.validate.tolerances import _entries

    for entry in _entries().values():
        assert 0 <= entry.peak < 1
        assert 0 < entry.cosine < 1
        assert 0 <= entry.router_gap <= 0.05
        assert len(entry.reason) > 20
    with pytest.raises(KeyError, match="graph_float32"):
        tolerance("no such thing")
