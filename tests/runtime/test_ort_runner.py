"""The runner's calls: any split gives the same result, nothing is written by a call that is refused."""

from dataclasses import replace

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from kimi_deploy.errors import BackendError, ContractError, ManifestError, StateError
from kimi_deploy.manifest import Manifest
from kimi_deploy.ops.registry import OPS
from kimi_deploy.runtime.ort_runner import OrtRunner
from kimi_deploy.validate.compare import compare
from kimi_deploy.validate.tolerances import tolerance
from tests.runtime.conftest import random_ids, state_bytes
from tests.runtime.export_folder import write_export_folder
from tests.runtime.hand_made_graph import VOCAB, hand_made_model

CLOSE = tolerance("float32")


def test_prefill_equals_split_prefill_equals_decode(runner: OrtRunner) -> None:
    ids = random_ids(2, 12)
    whole, split, steps = (runner.new_state(2, 20) for _ in range(3))
    expected = runner.forward(ids, whole, logits_indices="all")
    in_two = [runner.forward(part, split, logits_indices="all") for part in (ids[:, :5], ids[:, 5:])]
    one_by_one = [runner.forward(ids[:, i : i + 1], steps) for i in range(12)]
    for parts, state in ((in_two, split), (one_by_one, steps)):
        assert compare(np.concatenate(parts, 1), expected).within(CLOSE)
        assert state.lengths.tolist() == [12, 12]
        for name, tensor in whole.tensors().items():
            assert compare(state.tensors()[name], tensor).within(CLOSE), name


def test_the_capacity_does_not_change_the_result(any_runner: OrtRunner) -> None:
    ids = random_ids(1, 10)
    tight, roomy = any_runner.new_state(1, 10), any_runner.new_state(1, 500)
    for part in (ids[:, :6], ids[:, 6:7], ids[:, 7:]):
        np.testing.assert_array_equal(any_runner.forward(part, tight), any_runner.forward(part, roomy))
    assert state_bytes(tight) == state_bytes(roomy)


def test_ragged_rows_equal_single_rows(runner: OrtRunner) -> None:
    ids, lengths = random_ids(3, 9), np.array([9, 4, 1], np.int32)
    state = runner.new_state(3, 20)
    logits = runner.forward(ids, state, lengths)
    more = runner.forward(ids[:, :2], state)
    for row, length in enumerate(lengths):
        alone = runner.new_state(1, 20)
        assert compare(logits[row : row + 1], runner.forward(ids[row : row + 1, :length], alone)).within(CLOSE)
        assert compare(more[row : row + 1], runner.forward(ids[row : row + 1, :2], alone)).within(CLOSE)
        of_row = state.select([row]).snapshot()
        assert of_row.lengths.tolist() == alone.lengths.tolist()
        for name, tensor in alone.snapshot().tensors.items():
            assert compare(of_row.tensors[name], tensor).within(CLOSE), name


def test_padding_tokens_have_no_influence(runner: OrtRunner) -> None:
    ids, lengths = random_ids(2, 7), np.array([3, 7], np.int32)
    poisoned = ids.copy()
    poisoned[0, 3:] = VOCAB - 1
    states = [runner.new_state(2, 10) for _ in range(2)]
    results = [runner.forward(i, s, lengths) for i, s in zip((ids, poisoned), states, strict=True)]
    np.testing.assert_array_equal(*results)
    assert state_bytes(states[0]) == state_bytes(states[1])


def test_a_row_of_length_zero_keeps_its_state_bit_identical_even_when_full(any_runner: OrtRunner) -> None:
    state = any_runner.new_state(2, 8)
    any_runner.forward(random_ids(2, 8), state, np.array([8, 3], np.int32))
    idle = state_bytes(state.select([0]))
    any_runner.forward(random_ids(2, 4), state, np.array([0, 4], np.int32))
    assert state_bytes(state.select([0])) == idle
    assert state.lengths.tolist() == [8, 7]


@pytest.mark.parametrize("batch", [1, 2])
def test_overflow_raises_before_anything_is_written(runner: OrtRunner, batch: int) -> None:
    state = runner.new_state(batch, 10)
    runner.forward(random_ids(batch, 8), state)
    before = {n: t.tobytes() for n, t in state.tensors().items()}
    with pytest.raises(StateError, match="full") as error:
        runner.forward(random_ids(batch, 3), state)
    assert "8 tokens cached, 3 more" in error.value.seen
    assert "at most 10" in error.value.expected
    assert {n: t.tobytes() for n, t in state.tensors().items()} == before
    assert state.lengths.tolist() == [8] * batch
    runner.forward(random_ids(batch, 2), state)
    assert state.lengths.tolist() == [10] * batch


def test_padding_that_does_not_fit_is_refused(runner: OrtRunner) -> None:
    state = runner.new_state(2, 10)
    runner.forward(random_ids(2, 8), state, np.array([8, 2], np.int32))
    before = state_bytes(state)
    with pytest.raises(StateError, match="padded steps need room"):
        runner.forward(random_ids(2, 4), state, np.array([1, 4], np.int32))
    assert state_bytes(state) == before


def test_the_cache_is_written_in_place_and_only_in_the_new_rows(any_runner: OrtRunner) -> None:
    state = any_runner.new_state(1, 16)
    latent = state.tensors()["past_key_values.1.latent"]
    address = latent.ctypes.data
    any_runner.forward(random_ids(1, 5), state)
    marked = latent[0, 8:].copy()
    marked[...] = 7
    latent[0, 8:] = marked
    old = latent[0, :5].copy()
    any_runner.forward(random_ids(1, 3), state)
    assert state.tensors()["past_key_values.1.latent"].ctypes.data == address
    np.testing.assert_array_equal(latent[0, :5], old)
    np.testing.assert_array_equal(latent[0, 8:], marked)


def test_logits_of_one_call_survive_the_next(runner: OrtRunner) -> None:
    state = runner.new_state(1, 16)
    first = runner.forward(random_ids(1, 1), state)
    copy = first.copy()
    for seed in range(3):
        runner.forward(random_ids(1, 1, seed), state)
    np.testing.assert_array_equal(first, copy)


def test_a_bad_single_step_is_refused_as_a_bad_prefill_is(any_runner: OrtRunner) -> None:
    state = any_runner.new_state(2, 4)
    any_runner.forward(random_ids(2, 3), state)
    before = state_bytes(state)
    for ids, seen in (
        (np.array([[1], [-1]]), "-1 at [1, 0]"),
        (np.array([[VOCAB], [1]]), f"{VOCAB} at [0, 0]"),
        (np.array([[1]]), "(1, 1)"),
        (np.array([[1.0], [1.0]]), "float64"),
    ):
        with pytest.raises(ContractError) as error:
            any_runner.forward(ids, state)
        assert seen in str(error.value.seen)
        assert state_bytes(state) == before
    any_runner.forward(random_ids(2, 1), state)
    full = state_bytes(state)
    with pytest.raises(StateError, match="full"):
        any_runner.forward(random_ids(2, 1), state)
    assert state.lengths.tolist() == [4, 4]
    assert state_bytes(state) == full


def test_steps_of_every_form_of_ids_and_arguments_agree(any_runner: OrtRunner) -> None:
    ids = random_ids(1, 6)
    plain, other = any_runner.new_state(1, 8), any_runner.new_state(1, 8)
    one, first = np.array([1], np.int32), np.array([[0]])
    for i, arguments in enumerate(((), (one,), (None, first), (one, first), (), ())):
        token = ids[:, i : i + 1]
        expected = any_runner.forward(token, plain)
        form = token.astype(np.int32) if i % 2 else token
        np.testing.assert_array_equal(any_runner.forward(form, other, *arguments), expected)
        assert state_bytes(other) == state_bytes(plain)


def test_wanted_logits_are_those_of_the_asked_steps(runner: OrtRunner) -> None:
    ids = random_ids(2, 6)
    every = runner.forward(ids, runner.new_state(2, 8), logits_indices="all")
    assert every.shape == (2, 6, VOCAB)
    some = runner.forward(ids, runner.new_state(2, 8), logits_indices=np.array([[5, 0], [2, 3]]))
    assert compare(some, np.stack([every[0, [5, 0]], every[1, [2, 3]]])).within(CLOSE)


BAD_CALLS = {
    "id at the vocabulary size": (np.full((1, 2), VOCAB), {}),
    "negative id": (np.array([[0, -1]]), {}),
    "id that wraps in 64 bits": (np.array([[2**64 - 1]], np.uint64), {}),
    "float ids": (np.zeros((1, 2)), {}),
    "a list": ([[1, 2]], {}),
    "ids of rank 1": (np.array([1, 2]), {}),
    "another batch": (np.zeros((2, 2), np.int64), {}),
    "no step": (np.zeros((1, 0), np.int64), {}),
    "length above the steps": (np.zeros((1, 2), np.int64), {"sequence_lengths": np.array([3])}),
    "negative length": (np.zeros((1, 2), np.int64), {"sequence_lengths": np.array([-1])}),
    "length that wraps in 32 bits": (np.zeros((1, 2), np.int64), {"sequence_lengths": np.array([2**32 + 1])}),
    "lengths of another batch": (np.zeros((1, 2), np.int64), {"sequence_lengths": np.array([1, 1])}),
    "logits of a step that is not there": (np.zeros((1, 2), np.int64), {"logits_indices": np.array([[2]])}),
    "unknown word": (np.zeros((1, 2), np.int64), {"logits_indices": "some"}),
}


@pytest.mark.parametrize("case", BAD_CALLS)
def test_bad_arguments_are_refused_before_anything_is_written(runner: OrtRunner, case: str) -> None:
    ids, arguments = BAD_CALLS[case]
    state = runner.new_state(1, 8)
    before = state_bytes(state)
    with pytest.raises(ContractError):
        runner.forward(ids, state, **arguments)
    assert state_bytes(state) == before


def test_a_provider_that_is_not_there_is_named_with_the_next_step(model_path) -> None:
    if "CUDAExecutionProvider" in ort.get_available_providers():
        assert OrtRunner(model_path, provider="cuda").new_state(1, 4).batch == 1
        return
    with pytest.raises(BackendError, match="no CUDAExecutionProvider") as error:
        OrtRunner(model_path, provider="cuda")
    assert "pip install onnxruntime-gpu" in error.value.fix


@pytest.mark.parametrize(
    ("body", "op", "expected", "fix"),
    [
        ("ort", "MixtureOfExperts", "with `ort` bodies", "--body onnx"),
        ("onnx", "QuantizedMixtureOfExperts", "4 or 8 bits", "without --quantize"),
    ],
)
def test_what_the_cuda_provider_cannot_compute_is_refused_before_it_is_loaded(
    body: str, op: str, expected: str, fix: str, tmp_path
) -> None:
    folder = write_export_folder(tmp_path)
    manifest = Manifest.read(folder)
    replace(manifest, op_abi={op: OPS[op].abi}, details={**manifest.details, "body": body}).write(folder)
    with pytest.raises(BackendError, match=expected) as error:
        OrtRunner(folder, provider="cuda")
    assert fix in str(error.value)


def test_a_dtype_that_the_provider_cannot_compute_is_refused_with_the_next_step(tmp_path) -> None:
    text = '<ir_version: 10, opset_import: ["": 24]> g (bfloat16[2,2] a) => (bfloat16[2,2] y) { y = MatMul(a, a) }'
    onnx.save(onnx.parser.parse_model(text), tmp_path / "model.onnx")
    with pytest.raises(BackendError, match="cannot load") as error:
        OrtRunner(tmp_path / "model.onnx")
    assert "--dtype float32" in error.value.fix


def test_a_graph_without_a_contract_is_refused(tmp_path) -> None:
    model = hand_made_model()
    del model.metadata_props[:]
    (tmp_path / "model.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(ContractError, match="no contract"):
        OrtRunner(tmp_path / "model.onnx")


def test_a_graph_that_differs_from_its_contract_is_refused(tmp_path) -> None:
    model = hand_made_model()
    model.metadata_props[0].value = model.metadata_props[0].value.replace("present.1.latent", "present.1.cache")
    model.metadata_props[0].value = model.metadata_props[0].value.replace('"kind": "latent"', '"kind": "cache"')
    (tmp_path / "model.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(ContractError, match="not those of its contract"):
        OrtRunner(tmp_path / "model.onnx")


def test_a_damaged_graph_is_a_backend_error(tmp_path) -> None:
    (tmp_path / "model.onnx").write_bytes(hand_made_model().SerializeToString()[:-700])
    with pytest.raises(BackendError, match="cannot load") as error:
        OrtRunner(tmp_path / "model.onnx")
    assert "--dtype" not in error.value.fix
    assert "export again" in error.value.fix


def test_a_folder_without_a_manifest_is_refused(model_path) -> None:
    with pytest.raises(ManifestError, match="no manifest"):
        OrtRunner(model_path.parent)
