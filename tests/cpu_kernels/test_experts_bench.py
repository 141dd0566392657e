"""`bench kernels --cpu` compares two computations of the same."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from kimi_deploy.bench import experts
from kimi_deploy.bench.floors import Rates
from kimi_deploy.runtime.ort_kernels import OrtKernels
from kimi_deploy.runtime.ort_session import open_session
from tests.ops.body_cases import assert_close


@pytest.mark.parametrize("name", ["float32", "int4, float32 inputs"])
def test_the_kernel_and_the_body_of_its_model_agree(
    library: OrtKernels, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(experts, "LAYERS", 1)
    graph = experts.layers_model(name)
    x = np.random.default_rng(0).standard_normal((1, 3, experts.HIDDEN), np.float32)
    kernel, body = (
        open_session(Path(), "cpu", 1, 0, graph=graph, kernels=kernels).run(None, {"hidden_states": x})[0]
        for kernels in (library, None)
    )
    assert not np.array_equal(kernel, body), "both ran the same"
    assert_close(kernel, body.astype(np.float64))


def test_every_number_of_tokens_is_measured(library: OrtKernels, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(experts, "LAYERS", 1)
    monkeypatch.setattr(experts, "TOKENS", (1, 2))
    for kernels in (str(library.path), "none"):
        times = experts.measure(experts.Task("int8", kernels, threads=1, repeats=1))
        assert times.keys() == {"1", "2"}
        assert all(seconds > 0 for seconds in times.values())


def test_the_floor_is_what_takes_longer_of_reading_and_multiplying() -> None:
    rates = Rates(read_bytes=1e9, multiply_adds=1e9)
    one = experts.TOP_K * experts.WEIGHTS
    assert experts.floor_seconds("float32", 1, rates) == pytest.approx(4 * one / 1e9)
    assert experts.floor_seconds("int4", 512, rates) == pytest.approx(512 * one / 1e9)
