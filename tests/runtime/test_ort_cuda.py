"""ONNX Runtime's CUDA provider: the CPU's results, with states that stay in device memory."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import get_args

import numpy as np
import pytest

from kimi_deploy.checkpoint.synth import synthesize
from kimi_deploy.contract import Dtype
from kimi_deploy.onnx.export import export_model
from kimi_deploy.ops.flavours import Flavour
from kimi_deploy.runtime.ort_runner import OrtRunner
from kimi_deploy.runtime.ort_storage import OrtStorage
from kimi_deploy.validate.compare import compare
from kimi_deploy.validate.run import validate_export
from kimi_deploy.validate.tolerances import tolerance
from tests.capabilities import needs_cuda, needs_cuda_provider
from tests.graph.conftest import export, no_progress
from tests.runtime.conftest import state_bytes
from tests.validate.test_verdict_on_demo_model import DEMO, QUICK

pytestmark = [pytest.mark.gpu, needs_cuda, needs_cuda_provider]
CLOSE = tolerance("graph_float32")
STANDARD_BODIES: tuple[Flavour, ...] = ("onnx", "primitive")
IDS = np.random.default_rng(0).integers(0, 200, (2, 150))


def runner(folder: Path, provider: str) -> OrtRunner:
    output = folder / "export"
    if not output.exists():
        synthesize("tiny", folder / "model", overwrite=True)
        export_model(folder / "model", output, dtype="float32", flavour="onnx", overwrite=True, progress=no_progress)
    return OrtRunner(output, provider=provider)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cuda")


@pytest.fixture(scope="module")
def cuda(folder: Path) -> OrtRunner:
    return runner(folder, "cuda")


@pytest.fixture(scope="module")
def cpu(folder: Path) -> OrtRunner:
    return runner(folder, "cpu")


def test_prefill_steps_and_padding_equal_the_cpu_provider(cuda: OrtRunner, cpu: OrtRunner) -> None:
    states = [r.new_state(2, 256) for r in (cuda, cpu)]
    calls = [(IDS[:, :140], np.array([140, 17])), *((IDS[:, i : i + 1], np.array([1, i % 2])) for i in range(140, 150))]
    for ids, lengths in calls:
        seen, wanted = (r.forward(ids, s, sequence_lengths=lengths) for r, s in zip((cuda, cpu), states, strict=True))
        assert compare(seen, wanted).within(CLOSE)
    seen_state, wanted_state = (s.snapshot() for s in states)
    for name, tensor in wanted_state.tensors.items():
        assert compare(seen_state.tensors[name], tensor).within(CLOSE), name


def test_states_stay_in_device_memory(cuda: OrtRunner) -> None:
    storage = cuda.new_state(1, 64).storage
    assert isinstance(storage, OrtStorage)
    values = [buffer._value for buffers in storage._buffers.values() for buffer in buffers]
    assert {value.device_name() for value in values} == {"cuda"}


def test_a_snapshot_resumes_to_the_bit(cuda: OrtRunner) -> None:
    state = cuda.new_state(2, 256)
    cuda.forward(IDS[:, :100], state)
    resumed = cuda.resume(state.snapshot())
    for i in range(100, 110):
        a, b = (cuda.forward(IDS[:, i : i + 1], s) for s in (state, resumed))
        assert np.array_equal(a, b)
    assert state_bytes(state) == state_bytes(resumed)


def test_an_idle_row_keeps_its_state_to_the_bit(cuda: OrtRunner) -> None:
    state = cuda.new_state(2, 64)
    cuda.forward(IDS[:, :20], state)
    before = {name: tensor[1].copy() for name, tensor in state.snapshot().tensors.items()}
    cuda.forward(IDS[:, 20:25], state, sequence_lengths=np.array([5, 0]))
    # a snapshot's caches are as long as its longest row
    after = {name: tensor[1][: len(before[name])] for name, tensor in state.snapshot().tensors.items()}
    assert all(np.array_equal(after[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize("dtype", get_args(Dtype))
@pytest.mark.parametrize("body", STANDARD_BODIES)
def test_the_demo_model_is_valid_on_the_gpu(body: Flavour, dtype: Dtype, tmp_path: Path) -> None:
    exported = export(DEMO, tmp_path / "export", dtype, body)
    report = validate_export(DEMO, exported, replace(QUICK, provider="cuda"), no_progress)
    assert report.passed, report.failure
