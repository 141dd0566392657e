"""Huge pages change where memory lies, never what it holds."""

import numpy as np
import pytest

from kimi_deploy.runtime import huge_pages


def test_new_memory_is_found_and_keeps_its_content() -> None:
    before = huge_pages.private_memory()
    block = np.arange(8 << 20, dtype=np.int64)  # 64 MB: a mapping of its own
    # the allocator may have had some of it mapped already
    assert 0 < huge_pages.collapse_new(before) <= huge_pages.MOST_BYTES
    assert np.array_equal(block, np.arange(8 << 20))


def test_nothing_new_is_nothing_to_do() -> None:
    assert huge_pages.collapse_new({0: 1 << 62} | dict.fromkeys(huge_pages.private_memory(), 1 << 62)) == 0


def test_more_than_the_limit_stays_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huge_pages, "MOST_BYTES", 1 << 20)
    before = huge_pages.private_memory()
    block = np.zeros(8 << 20)
    assert huge_pages.collapse_new(before) == 0
    assert not block.any()


def test_where_there_is_no_proc_nothing_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huge_pages.sys, "platform", "darwin")
    assert huge_pages.private_memory() == {}
    assert huge_pages.collapse_new({}) == 0
