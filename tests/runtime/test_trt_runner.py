"""The TensorRT runner's own work: buffers, profiles, graphs, the greedy choice. The engine is ONNX Runtime's graph."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kimi_deploy.contract import CAPACITY
from kimi_deploy.errors import BackendError, EngineError, StateError
from kimi_deploy.runtime import trt_runner as trt_runner_module
from kimi_deploy.runtime.generation import generate
from kimi_deploy.runtime.ort_runner import OrtRunner
from kimi_deploy.runtime.state import State
from kimi_deploy.runtime.trt_runner import TrtRunner
from kimi_deploy.runtime.trt_session import ProfileLimits
from kimi_deploy.validate.compare import compare
from kimi_deploy.validate.faults.fake_tensorrt import FakeContext, FakeDevice, FakeSession, profile
from kimi_deploy.validate.tolerances import tolerance
from tests.runtime.conftest import greedy, random_ids, state_bytes
from tests.runtime.hand_made_graph import write_hand_made_model

PROFILES = (profile("prefill", 0, 4, 16, 300, 8), profile("decode", 1, 4, 1, 300, 1))
RECURRENT = "past_key_values.0.recurrent_state"
CONV = "past_key_values.0.conv_state"
ALIASED = frozenset({RECURRENT, CONV})
# one graph in one runtime, but for the length of the cache that a product sums over
CLOSE: Any = {"rtol": 1e-4, "atol": 1e-5}


def trt_runner(model: Path, fingerprint: str, aliased: frozenset[str] = frozenset(), **options: Any) -> TrtRunner:
    graphs = options.pop("graphs", True)
    device = FakeDevice(**options)
    return TrtRunner(FakeSession(model, device, PROFILES, fingerprint, aliased), device, graphs=graphs)


@pytest.fixture(params=["two buffers", "aliased"])
def trt(request: pytest.FixtureRequest, model_path: Path, runner: OrtRunner) -> TrtRunner:
    return trt_runner(model_path, runner.fingerprint, ALIASED if request.param == "aliased" else frozenset())


def device_of(runner: TrtRunner) -> FakeDevice:
    device = runner._device
    assert isinstance(device, FakeDevice)
    return device


def session_of(runner: TrtRunner) -> FakeSession:
    session = runner._session
    assert isinstance(session, FakeSession)
    return session


def assert_same_state(state: State, expected: State) -> None:
    for name, tensor in expected.snapshot().tensors.items():
        np.testing.assert_allclose(state.snapshot().tensors[name], tensor, **CLOSE)


def decode(runner: Any, state: State, steps: int) -> np.ndarray:
    return greedy(runner, state, np.arange(state.batch), steps)


@pytest.mark.parametrize("batch", [1, 3])
def test_200_replayed_steps_equal_200_eager_ones(
    trt: TrtRunner, runner: OrtRunner, model_path: Path, batch: int
) -> None:
    """To the bit, logits and states; ONNX Runtime's own runner shows that both are right."""
    eager = trt_runner(model_path, runner.fingerprint, session_of(trt).aliased, graphs=False)
    states = [r.new_state(batch, 256) for r in (trt, eager, runner)]
    logits = []
    for one, state in zip((trt, eager, runner), states, strict=True):
        one.forward(random_ids(batch, 9), state)
        logits.append(decode(one, state, 200))
    np.testing.assert_array_equal(logits[0], logits[1])
    assert state_bytes(states[0]) == state_bytes(states[1])
    np.testing.assert_allclose(logits[0], logits[2], **CLOSE)
    assert_same_state(states[0], states[2])
    # one step warms up, one graph per side of the buffers
    assert (device_of(trt).captures, device_of(trt).launches) == (2, 199)
    assert (device_of(eager).captures, device_of(eager).launches) == (0, 0)
    assert session_of(trt).runs == session_of(eager).runs == ["prefill"] + ["decode"] * 200


def test_recording_a_graph_does_not_advance_the_state(trt: TrtRunner, runner: OrtRunner) -> None:
    state, expected = trt.new_state(2, 40), runner.new_state(2, 40)
    for step in range(5):
        trt.forward(random_ids(2, 1, step), state)
        runner.forward(random_ids(2, 1, step), expected)
        assert state_bytes(state) == state_bytes(expected), f"step {step}"
        assert len(session_of(trt).runs) == step + 1


def test_a_capture_that_ran_the_step_would_be_seen(model_path: Path, runner: OrtRunner) -> None:
    """The two tests above can fail: with aliased states a step done twice is a state decayed twice."""
    wrong = trt_runner(model_path, runner.fingerprint, ALIASED, capture_runs=True)
    state, expected = wrong.new_state(1, 40), runner.new_state(1, 40)
    for step in range(2):
        wrong.forward(random_ids(1, 1, step), state)
        runner.forward(random_ids(1, 1, step), expected)
    assert len(session_of(wrong).runs) == 3
    assert state_bytes(state) != state_bytes(expected)


def test_a_device_that_cannot_record_decodes_all_the_same(
    model_path: Path, runner: OrtRunner, caplog: pytest.LogCaptureFixture
) -> None:
    trt = trt_runner(model_path, runner.fingerprint, capture_fails=True)
    state, expected = trt.new_state(1, 40), runner.new_state(1, 40)
    np.testing.assert_array_equal(decode(trt, state, 6), decode(runner, expected, 6))
    assert state_bytes(state) == state_bytes(expected)
    assert sum("without CUDA graphs" in r.message for r in caplog.records) == 1


def test_graphs_are_kept_per_batch_size_and_taken_over_by_the_next_state(trt: TrtRunner, runner: OrtRunner) -> None:
    device = device_of(trt)
    for _ in range(2):
        for batch in (1, 3):
            state, expected = trt.new_state(batch, 40), runner.new_state(batch, 40)
            np.testing.assert_array_equal(decode(trt, state, 6), decode(runner, expected, 6))
            assert state_bytes(state) == state_bytes(expected)
            del state
            gc.collect()
    # two sides of two sizes; the second round records nothing
    assert device.captures == 4
    assert device.launches == 5 + 5 + 6 + 6


def test_two_states_of_one_size_have_memory_and_graphs_of_their_own(trt: TrtRunner, runner: OrtRunner) -> None:
    states, expected = [trt.new_state(1, 40) for _ in range(2)], [runner.new_state(1, 40) for _ in range(2)]
    for step in range(8):
        for which in range(2):
            ids = random_ids(1, 1, 10 * which + step)
            seen, correct = trt.forward(ids, states[which]), runner.forward(ids, expected[which])
            np.testing.assert_allclose(seen, correct, **CLOSE)
    for state, other in zip(states, expected, strict=True):
        assert_same_state(state, other)
    assert device_of(trt).captures == 4


@pytest.mark.parametrize("wanted", ["last", "some", "all"])
@pytest.mark.parametrize("steps", [1, 7, 16, 17, 45])
def test_a_call_larger_than_a_profile_is_cut_and_its_logits_put_together(
    trt: TrtRunner, runner: OrtRunner, wanted: str, steps: int
) -> None:
    lengths = np.array([steps, steps // 2, 0], np.int32)
    indices: Any = {"last": None, "some": np.array([[0, steps - 1]] * 3), "all": "all"}[wanted]
    state, expected = trt.new_state(3, 60), runner.new_state(3, 60)
    ids = random_ids(3, steps)
    seen = trt.forward(ids, state, lengths, indices)
    correct = runner.forward(ids, expected, lengths, indices)
    valid = (np.arange(steps) < lengths[:, None]) if wanted == "all" else np.array([[True], [steps > 1], [False]])
    valid = np.broadcast_to(valid, seen.shape[:2]).copy()
    if wanted == "some":
        valid[1, 1] = False
    np.testing.assert_allclose(seen[valid], correct[valid], **CLOSE)
    assert_same_state(state, expected)
    largest = 8 if wanted == "all" and steps > 8 else 16
    assert len(session_of(trt).runs) == -(-steps // largest)


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Slots of the caches in every run; from 16 on, so that short states have several sizes."""
    monkeypatch.setattr(trt_runner_module, "SMALLEST_SHOWN", 16)
    sizes: list[int] = []
    run = FakeContext._run

    def watched(self: FakeContext, named: dict[str, int], *rest: Any) -> None:
        sizes.append(named[CAPACITY])
        run(self, named, *rest)

    monkeypatch.setattr(FakeContext, "_run", watched)
    return sizes


@pytest.mark.parametrize("lengths", [[20], [20, 20], [3, 20, 11]])
def test_rows_are_shown_no_more_of_their_cache_than_the_longest_fills(
    trt: TrtRunner, runner: OrtRunner, lengths: list[int], shown: list[int]
) -> None:
    """In prefill and in replayed steps, with the results of the whole cache."""
    batch = len(lengths)
    state, expected = trt.new_state(batch, 100), runner.new_state(batch, 100)
    ids, valid = random_ids(batch, 20), np.array(lengths, np.int32)
    np.testing.assert_allclose(trt.forward(ids, state, valid), runner.forward(ids, expected, valid), **CLOSE)
    difference = compare(decode(trt, state, 60), decode(runner, expected, 60))
    assert difference.within(tolerance("graph_float32")), difference
    assert_same_state(state, expected)
    # pieces of 16 and 4 tokens, then a token a step
    filled = [16, 20, *range(21, 81)]
    assert shown == [min(1 << (n - 1).bit_length(), 100) for n in filled]
    assert device_of(trt).launches == 60 - len(set(shown[2:]))
    # what was stored before and after a step of fewer slots is there when a later one is shown more
    saved = state.snapshot()
    trt.forward(random_ids(batch, 1, 5), state)
    state.restore(saved)
    assert_same_state(state, expected)


def test_rows_keep_what_they_stored_whatever_is_done_between_steps(
    trt: TrtRunner, runner: OrtRunner, shown: list[int]
) -> None:
    """Written, forked, seen by another library, and taken back to fewer slots, at every size they are laid out in."""
    state, expected = trt.new_state(2, 100), runner.new_state(2, 100)
    early = None
    for step in range(50):
        ids, valid = random_ids(2, 2, step), np.array([2, step % 3 > 0], np.int32)
        trt.forward(ids, state, valid)
        runner.forward(ids, expected, valid)
        if step == 9:
            early = (state.snapshot(), expected.snapshot())
        if step % 7 == 3:
            state, expected = state.select([1, 0]), expected.select([1, 0])
        if step % 5 == 2:
            latent = next(s.past_name for s in trt.contract.states if s.kind == "latent")
            view = np.from_dlpack(trt.device_tensor(state, latent))
            np.testing.assert_array_equal(view, state.tensors()[latent])
        assert_same_state(state, expected)
        for tensor, other in zip(state.tensors().values(), expected.tensors().values(), strict=True):
            np.testing.assert_allclose(tensor, other, err_msg="behind what a row has stored too", **CLOSE)
    assert set(shown) == {16, 32, 64, 100}
    assert early is not None
    for one, other in zip((state, expected), early, strict=True):
        one.restore(other)
    np.testing.assert_allclose(decode(trt, state, 4), decode(runner, expected, 4), **CLOSE)
    assert shown[-1] == 32, "a shorter state is shown less again"
    assert_same_state(state, expected)


@pytest.mark.parametrize("reason", ["profiles begin higher", "a cache in one buffer"])
def test_rows_are_shown_all_of_their_cache_where_less_cannot_be(
    reason: str, model_path: Path, runner: OrtRunner, shown: list[int]
) -> None:
    """A profile's smallest capacity is kept to; rows of a cache that has no second buffer are not moved."""
    device, profiles, aliased = FakeDevice(), PROFILES, frozenset[str]()
    if reason == "profiles begin higher":
        profiles = tuple(ProfileLimits(p.name, p.index, dict(p.ranges) | {CAPACITY: (50, 300)}) for p in PROFILES)
    else:
        aliased = frozenset(s.past_name for s in runner.contract.states if s.kind == "latent")
    trt = TrtRunner(FakeSession(model_path, device, profiles, "f", aliased), device)
    state, expected = trt.new_state(2, 100), runner.new_state(2, 100)
    np.testing.assert_allclose(decode(trt, state, 60), decode(runner, expected, 60), **CLOSE)
    assert_same_state(state, expected)
    assert set(shown) == ({64, 100} if reason == "profiles begin higher" else {100})


def test_each_profile_has_its_own_work(trt: TrtRunner) -> None:
    state = trt.new_state(2, 40)
    trt.forward(random_ids(2, 9), state)
    decode(trt, state, 3)
    trt.forward(random_ids(2, 2), state)
    assert session_of(trt).runs == ["prefill"] + ["decode"] * 3 + ["prefill"]
    assert session_of(trt).contexts == ["prefill", "decode"]


@pytest.mark.parametrize(("batch", "capacity"), [(5, 40), (1, 301)])
def test_a_state_beyond_the_profiles_is_refused(trt: TrtRunner, batch: int, capacity: int) -> None:
    with pytest.raises(StateError, match=r"(?s)no profile.*capacity 1 to 300"):
        trt.new_state(batch, capacity)


def test_a_call_outside_every_profile_is_refused_before_anything_is_written(model_path: Path) -> None:
    device = FakeDevice()
    long = ProfileLimits("prefill", 0, dict(PROFILES[0].ranges) | {"sequence": (4, 16)})
    trt = TrtRunner(FakeSession(model_path, device, (long,), "f"), device)
    state = trt.new_state(1, 40)
    trt.forward(random_ids(1, 5), state)
    before = state_bytes(state)
    # a single step; a prompt whose last piece is a single step
    for steps in (1, 17):
        with pytest.raises(EngineError, match=r"(?s)no profile.*sequence 1,.*sequence 4 to 16.*--prefill"):
            trt.forward(random_ids(1, steps), state)
        assert state_bytes(state) == before
    assert session_of(trt).runs == ["prefill"]


def test_an_engine_of_single_steps_takes_a_prompt_token_by_token(model_path: Path, runner: OrtRunner) -> None:
    device = FakeDevice()
    trt = TrtRunner(FakeSession(model_path, device, PROFILES[1:], runner.fingerprint), device)
    state, expected = trt.new_state(2, 40), runner.new_state(2, 40)
    ids = random_ids(2, 5)
    np.testing.assert_allclose(trt.forward(ids, state), runner.forward(ids, expected), **CLOSE)
    assert_same_state(state, expected)


def test_the_greedy_choice_is_the_argmax_and_all_that_comes_back(trt: TrtRunner, runner: OrtRunner) -> None:
    state, expected = trt.new_state(3, 40), runner.new_state(3, 40)
    trt.forward(random_ids(3, 9), state)
    runner.forward(random_ids(3, 9), expected)
    token = np.array([1, 2, 3])
    for step in range(6):
        active = np.array([1, 1, step % 2], np.int32)
        before = device_of(trt).downloaded
        best, value = trt.forward_greedy(token[:, None], state, active)
        assert device_of(trt).downloaded - before == 3 * (8 + 4)
        logits = runner.forward(token[:, None], expected, active)[:, 0]
        np.testing.assert_array_equal(best[active > 0], logits.argmax(-1)[active > 0])
        np.testing.assert_array_equal(value[active > 0], logits.max(-1)[active > 0])
        token = best
    assert state_bytes(state) == state_bytes(expected)
    assert trt.forward_greedy(random_ids(3, 4), state)[0].shape == (3,)


def test_generation_is_that_of_onnx_runtime(trt: TrtRunner, runner: OrtRunner) -> None:
    prompts = [[5, 6, 7], list(range(30)), [9]]
    stop = generate(runner, prompts, max_new_tokens=30).tokens[1][11]
    expected = generate(runner, prompts, max_new_tokens=30, stop_ids=[stop])
    seen = generate(trt, prompts, max_new_tokens=30, stop_ids=[stop])
    assert (seen.tokens, seen.finish_reasons, seen.pending) == (
        expected.tokens,
        expected.finish_reasons,
        expected.pending,
    )
    assert "stop" in seen.finish_reasons


def test_a_nan_is_reported_with_its_layer(trt: TrtRunner) -> None:
    state = trt.new_state(1, 40)
    trt.forward(random_ids(1, 9), state)
    value = state.tensors()[RECURRENT]
    value[0, 1] = np.nan
    state.storage.write(RECURRENT, value)
    with pytest.raises(StateError, match=r"(?s)logits are not finite.*layer 0: recurrent_state"):
        generate(trt, [[3]], max_new_tokens=4, state=state)


def test_states_move_between_runtimes_are_forked_saved_and_resumed(
    trt: TrtRunner, runner: OrtRunner, tmp_path: Path
) -> None:
    expected = runner.new_state(2, 60)
    runner.forward(random_ids(2, 9), expected, np.array([9, 4], np.int32))
    expected.save(tmp_path / "from_ort")
    state = trt.load_state(tmp_path / "from_ort")
    assert state_bytes(state) == state_bytes(expected)
    decode(trt, state, 5)
    decode(runner, expected, 5)
    state.save(tmp_path / "from_trt")
    assert state_bytes(runner.load_state(tmp_path / "from_trt")) == state_bytes(expected)
    forked, twin = state.fork(2), expected.fork(2)
    np.testing.assert_array_equal(decode(trt, forked, 4), decode(runner, twin, 4))
    snapshot = state.snapshot()
    after = decode(trt, state, 4)
    state.restore(snapshot)
    np.testing.assert_array_equal(decode(trt, state, 4), after)


def test_an_aliased_state_has_one_buffer(model_path: Path, runner: OrtRunner) -> None:
    two, one = (trt_runner(model_path, runner.fingerprint, a).new_state(1, 40) for a in (frozenset(), ALIASED))
    fixed = sum(m.nbytes for m in two.memory() if m.kind != "latent")
    assert two.nbytes - one.nbytes == fixed


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_other_libraries_see_a_state_without_a_copy(dtype: Any, tmp_path: Path) -> None:
    folder = write_hand_made_model(tmp_path / dtype, dtype)
    trt = trt_runner(folder / "model.onnx", "f")
    state = trt.new_state(2, 40)
    trt.forward(random_ids(2, 9), state)
    for name, expected in state.tensors().items():
        tensor = trt.device_tensor(state, name)
        view = torch.from_dlpack(tensor)
        assert view.data_ptr() == tensor.address
        np.testing.assert_array_equal(view.numpy(), expected)
        np.testing.assert_array_equal(np.from_dlpack(tensor), expected)
    view = torch.from_dlpack(trt.device_tensor(state, RECURRENT))
    kept = view.clone()
    address = view.data_ptr()
    del state, tensor
    gc.collect()
    # the view owns the memory: no other state may get it
    others = [trt.new_state(2, 40) for _ in range(2)]
    assert address not in {a for s in others for a in (s.storage.device_tensor(RECURRENT).address,)}
    assert torch.equal(view, kept)
    del view
    gc.collect()
    from kimi_deploy.runtime import dlpack

    assert not dlpack._lent


def test_a_capsule_that_nobody_takes_is_given_back(trt: TrtRunner) -> None:
    from kimi_deploy.runtime import dlpack

    capsule = trt.device_tensor(trt.new_state(1, 8), RECURRENT).__dlpack__()
    assert len(dlpack._lent) == 1
    del capsule
    gc.collect()
    assert not dlpack._lent


def test_all_memory_is_given_back_with_the_runner(model_path: Path) -> None:
    trt = trt_runner(model_path, "f")
    device = device_of(trt)
    state = trt.new_state(1, 40)
    decode(trt, state, 4)
    del trt, state
    gc.collect()
    assert device.memory == {}


def test_idle_buffers_make_room_before_a_state_is_refused(model_path: Path) -> None:
    trt = trt_runner(model_path, "f")
    device = device_of(trt)
    state = trt.new_state(1, 40)
    size = sum(m.nbytes for m in device.memory.values())
    device.limit = size + 100
    del state
    gc.collect()
    kept = trt.new_state(1, 39)
    with pytest.raises(StateError, match="not enough memory"):
        trt.new_state(1, 40)
    assert kept.batch == 1


def test_a_failed_step_leaves_the_state_as_it_was_or_says_that_it_is_lost(model_path: Path, runner: OrtRunner) -> None:
    trt = trt_runner(model_path, runner.fingerprint)
    state = trt.new_state(1, 60)
    decode(trt, state, 4)
    before, snapshot = state_bytes(state), state.snapshot()
    session_of(trt).fail_after = len(session_of(trt).runs)
    for steps in (1, 10):
        with pytest.raises(BackendError, match="stopped"):
            trt.forward(random_ids(1, steps), state)
        assert state_bytes(state) == before
    # the first of two pieces is done
    session_of(trt).fail_after = len(session_of(trt).runs) + 1
    with pytest.raises(BackendError, match="stopped"):
        trt.forward(random_ids(1, 30), state)
    session_of(trt).fail_after = None
    with pytest.raises(StateError, match="lost"):
        trt.forward(random_ids(1, 1), state)
    state.restore(snapshot)
    assert state_bytes(state) == before
    expected = runner.resume(snapshot)
    np.testing.assert_array_equal(decode(trt, state, 3), decode(runner, expected, 3))


def test_rows_that_were_moved_in_part_are_lost_until_they_are_restored(
    model_path: Path, runner: OrtRunner, shown: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    trt = trt_runner(model_path, runner.fingerprint)
    state = trt.new_state(2, 60)
    decode(trt, state, 16)
    snapshot = state.snapshot()

    def stop(*arguments: object) -> None:
        raise BackendError("the GPU has stopped")

    with monkeypatch.context() as broken:
        broken.setattr(FakeDevice, "copy", stop)
        with pytest.raises(BackendError, match="stopped"):
            trt.forward(random_ids(2, 1), state)
    with pytest.raises(StateError, match="lost"):
        trt.forward(random_ids(2, 1), state)
    state.restore(snapshot)
    np.testing.assert_allclose(decode(trt, state, 3), decode(runner, runner.resume(snapshot), 3), **CLOSE)


def test_a_failed_step_over_aliased_states_loses_them(model_path: Path) -> None:
    trt = trt_runner(model_path, "f", ALIASED)
    state = trt.new_state(1, 60)
    decode(trt, state, 4)
    session_of(trt).fail_after = 0
    with pytest.raises(BackendError, match="stopped"):
        trt.forward(random_ids(1, 1), state)
    with pytest.raises(StateError, match="lost"):
        trt.forward(random_ids(1, 1), state)
