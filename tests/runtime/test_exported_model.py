"""The runner's properties on real exports, against the PyTorch source model behind the same interface."""

import shutil
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from kimi_deploy.checkpoint.synth import synthesize
from kimi_deploy.config import KimiLinearConfig
from kimi_deploy.contract import Dtype, GraphContract
from kimi_deploy.errors import BackendError, NotFiniteError, StateError, UsageError
from kimi_deploy.inspection import inspect_folder
from kimi_deploy.manifest import Manifest
from kimi_deploy.onnx.export import export_model
from kimi_deploy.ops.flavours import Flavour
from kimi_deploy.runtime.base import Runner
from kimi_deploy.runtime.generation import generate, prefill
from kimi_deploy.runtime.open import open_runner
from kimi_deploy.runtime.ort_runner import OrtRunner
from kimi_deploy.runtime.sampling import Sampling
from kimi_deploy.runtime.text_generation import TextGenerator
from kimi_deploy.runtime.torch_runner import TorchRunner
from kimi_deploy.runtime.trt_runner import TrtRunner
from kimi_deploy.validate.compare import compare
from kimi_deploy.validate.faults.fake_tensorrt import FakeDevice, FakeSession, profile
from kimi_deploy.validate.tolerances import tolerance
from tests.runtime.conftest import state_bytes
from tests.runtime.test_example_script import run_script

CLOSE = tolerance("graph_float32")
PROMPT = list(b"A state is plain data.")
LATENT = "past_key_values.3.latent"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "tiny"
    synthesize("tiny", folder)
    return folder


def export(checkpoint: Path, dtype: Dtype, flavour: Flavour) -> Path:
    output = checkpoint.parent / f"{flavour}-{dtype}"
    quiet = lambda *_: nullcontext(lambda n: None)  # noqa: E731
    export_model(checkpoint, output, dtype=dtype, flavour=flavour, overwrite=True, progress=quiet)
    return output


@pytest.fixture(scope="module")
def export_folder(checkpoint: Path) -> Path:
    return export(checkpoint, "float32", "ort")


@pytest.fixture(scope="module")
def ort_runner(export_folder: Path) -> OrtRunner:
    return OrtRunner(export_folder, threads=1)


@pytest.fixture(scope="module")
def torch_runner(checkpoint: Path) -> TorchRunner:
    return TorchRunner(checkpoint, threads=1)


@pytest.fixture(scope="module")
def trt_runner(export_folder: Path) -> TrtRunner:
    """On host memory, with the export as its engine; prompts of over 32 tokens are cut."""
    device = FakeDevice()
    profiles = (profile("prefill", 0, 3, 32, 80, 4), profile("decode", 1, 3, 1, 80, 1))
    fingerprint = Manifest.read(export_folder).source["checkpoint"]
    return TrtRunner(FakeSession(export_folder / "model.onnx", device, profiles, fingerprint), device)


@pytest.fixture(scope="module", params=["ort", "torch", "trt"])
def either(request: pytest.FixtureRequest) -> Runner:
    runner: Runner = request.getfixturevalue(f"{request.param}_runner")
    return runner


def ids(batch: int, steps: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (batch, steps))


def test_every_cache_is_updated_from_its_input_into_its_output(export_folder: Path, tmp_path: Path) -> None:
    # anything between would be a copy of the whole cache at every token
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    ort.InferenceSession(export_folder / "model.onnx", options, providers=["CPUExecutionProvider"])
    nodes = onnx.load(tmp_path / "optimized.onnx", load_external_data=False).graph.node
    seen = [(node.input[0], node.output[0]) for node in nodes if node.op_type == "TensorScatter"]
    config = KimiLinearConfig.from_folder(export_folder)
    states = [s for s in GraphContract.of(config, "float32").states if s.kind == "latent"]
    assert states
    assert sorted(seen) == sorted((s.past_name, s.present_name) for s in states)


def test_a_state_moves_between_pytorch_and_onnx_runtime(
    ort_runner: OrtRunner, torch_runner: TorchRunner, tmp_path: Path
) -> None:
    whole = generate(torch_runner, [PROMPT], max_new_tokens=40).tokens[0]
    assert generate(ort_runner, [PROMPT], max_new_tokens=40).tokens[0] == whole
    for first, second in ((ort_runner, torch_runner), (torch_runner, ort_runner)):
        begun = generate(first, [PROMPT], max_new_tokens=15)
        begun.state.save(tmp_path / "state")
        state = second.load_state(tmp_path / "state", capacity=80)
        rest = generate(second, [begun.pending], max_new_tokens=25, state=state)
        assert begun.tokens[0] + rest.tokens[0] == whole


def test_resumed_is_bit_identical(either: Runner, tmp_path: Path) -> None:
    whole = generate(either, [PROMPT], max_new_tokens=30, capacity=80)
    begun = generate(either, [PROMPT], max_new_tokens=12)
    begun.state.save(tmp_path / "state")
    for state in (
        either.load_state(tmp_path / "state", capacity=80),
        either.resume(begun.state.snapshot(), capacity=80),
        either.resume(begun.state.fork(1).snapshot(), capacity=80),
    ):
        rest = generate(either, [begun.pending], max_new_tokens=18, state=state)
        assert begun.tokens[0] + rest.tokens[0] == whole.tokens[0]
        assert state_bytes(rest.state) == state_bytes(whole.state)


def test_ragged_batch_equals_single_rows(either: Runner) -> None:
    tokens, lengths = ids(3, 70), np.array([70, 3, 41], np.int32)
    state = either.new_state(3, 80)
    logits = either.forward(tokens, state, lengths)
    for row, length in enumerate(lengths):
        alone = either.new_state(1, 80)
        assert compare(logits[row], either.forward(tokens[row : row + 1, :length], alone)[0]).within(CLOSE)
        of_row = state.select([row]).snapshot()
        for name, tensor in alone.snapshot().tensors.items():
            assert compare(of_row.tensors[name], tensor).within(CLOSE), name


@pytest.mark.parametrize("chunk", [1, 16, 50])
def test_chunked_prefill_equals_one_shot(either: Runner, chunk: int) -> None:
    tokens, lengths = ids(2, 50), np.array([50, 20], np.int32)
    whole, chunked = either.new_state(2, 50), either.new_state(2, 50)
    expected = either.forward(tokens, whole, lengths)[:, 0]
    assert compare(prefill(either, tokens, chunked, lengths, chunk), expected).within(CLOSE)
    for name, tensor in whole.snapshot().tensors.items():
        assert compare(chunked.snapshot().tensors[name], tensor).within(CLOSE), name


def test_an_idle_row_keeps_its_state_bit_identical_even_when_full(either: Runner) -> None:
    state = either.new_state(2, 20)
    either.forward(ids(2, 20), state, np.array([20, 6], np.int32))
    before = state_bytes(state.select([0]))
    either.forward(ids(2, 9), state, np.array([0, 9], np.int32))
    assert state_bytes(state.select([0])) == before


def test_overflow_raises_before_anything_is_written(either: Runner) -> None:
    state = either.new_state(1, 10)
    either.forward(ids(1, 8), state)
    before = {n: t.tobytes() for n, t in state.tensors().items()}
    with pytest.raises(StateError, match="full"):
        either.forward(ids(1, 3), state)
    assert {n: t.tobytes() for n, t in state.tensors().items()} == before


@pytest.mark.parametrize(("flavour", "dtype"), [("ort", "float32"), ("onnx", "float16"), ("primitive", "float32")])
def test_every_flavour_writes_the_cache_in_place(
    checkpoint: Path, export_folder: Path, flavour: Flavour, dtype: Dtype
) -> None:
    folder = export_folder if flavour == "ort" else export(checkpoint, dtype, flavour)
    runner = OrtRunner(folder, threads=1)
    state = runner.new_state(1, 64)
    runner.forward(ids(1, 20), state)
    latent = state.tensors()[LATENT]
    latent[0, 22:] = np.nan  # whoever reads or moves what is not in use spoils the result
    address, old = latent.ctypes.data, latent[0, :20].copy()
    logits = runner.forward(ids(1, 2, seed=1), state)
    assert np.isfinite(logits).all()
    after = state.tensors()[LATENT]
    assert after.ctypes.data == address
    np.testing.assert_array_equal(after[0, :20], old)
    assert np.isfinite(after[0, :22]).all()
    assert np.isnan(after[0, 22:]).all()


def test_pytorch_states_are_views_on_the_cpu(checkpoint: Path) -> None:
    for dtype in ("float32", "bfloat16"):
        state = TorchRunner(checkpoint, dtype=dtype).new_state(1, 8)
        for name, tensor in state.tensors().items():
            assert state.tensors()[name].ctypes.data == tensor.ctypes.data
            assert tensor.shape == next(state.shape(s) for s in state.contract.states if s.past_name == name)


def test_the_folder_decides_the_backend(checkpoint: Path, export_folder: Path) -> None:
    assert isinstance(open_runner(export_folder, threads=1), OrtRunner)
    assert isinstance(open_runner(checkpoint, threads=1), TorchRunner)
    with pytest.raises(UsageError, match="backend ort cannot run this folder"):
        open_runner(checkpoint, "ort")


def test_ort_bodies_are_refused_on_the_cuda_provider(export_folder: Path) -> None:
    with pytest.raises(BackendError, match="`ort` bodies") as error:
        OrtRunner(export_folder, provider="cuda")
    assert "--body onnx" in error.value.fix


def test_cuda_without_a_device_is_refused(checkpoint: Path) -> None:
    import torch

    if torch.cuda.is_available():
        assert TorchRunner(checkpoint, device="cuda").new_state(1, 4).batch == 1
        return
    with pytest.raises(BackendError, match="no CUDA device"):
        TorchRunner(checkpoint, device="cuda")


def test_the_example_script_drives_the_export(export_folder: Path, ort_runner: OrtRunner) -> None:
    expected = generate(ort_runner, [PROMPT], max_new_tokens=16).tokens[0]
    out = run_script(export_folder, "--ids", ",".join(map(str, PROMPT)), "--max-new-tokens", "16")
    assert [int(i) for i in out.split(",")] == expected


def test_damaged_weights_of_the_right_size_are_told_how_to_be_found(export_folder: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged"
    shutil.copytree(export_folder, damaged)
    (damaged / "weights.bin").write_bytes(b"\xff" * (damaged / "weights.bin").stat().st_size)
    generator = TextGenerator(damaged)
    with pytest.raises(NotFiniteError, match="logits are not finite") as error:
        generator.complete(OrtRunner(damaged, threads=1), [PROMPT], max_new_tokens=2, sampling=Sampling())
    assert f"kimi-deploy inspect {damaged}" in error.value.fix
    assert inspect_folder(damaged)["problems"]
