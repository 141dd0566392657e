"""The GPU suite runs every GPU test: a file that it does not list would never run anywhere."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_every_file_with_a_gpu_test_is_in_the_gpu_suite() -> None:
    text = (ROOT / "scripts" / "gpu_suite.sh").read_text()
    call = text[text.index("-m pytest -m gpu") :].split("||")[0]
    listed = [ROOT / path for path in re.findall(r"tests/[\w/.]+", call)]
    assert listed
    assert all(path.exists() for path in listed)
    # a mark in a conftest is for the tests of its folder
    marked = [
        path.parent if path.name == "conftest.py" else path
        for path in (ROOT / "tests").rglob("*.py")
        if path != Path(__file__) and "mark.gpu" in path.read_text()
    ]
    assert len(marked) > 10
    missing = [path for path in marked if not any(path.is_relative_to(known) for known in listed)]
    assert missing == []
