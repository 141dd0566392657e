"""A state is plain data: it can be copied, moved, inspected, and goes on bit-identically."""

import gc

import numpy as np
import pytest

from kimi_deploy.errors import StateError
from kimi_deploy.runtime.history import SnapshotHistory
from kimi_deploy.runtime.ort_runner import OrtRunner
from tests.runtime.conftest import greedy, random_ids, state_bytes

START = np.array([3, 5])


def filled(runner: OrtRunner, batch: int = 2, steps: int = 9, capacity: int = 40):
    state = runner.new_state(batch, capacity)
    runner.forward(random_ids(batch, steps), state)
    return state


def test_a_restored_state_goes_on_bit_identically(any_runner: OrtRunner) -> None:
    state = filled(any_runner)
    snapshot = state.snapshot()
    expected = greedy(any_runner, state, START, 8)
    state.restore(snapshot)
    np.testing.assert_array_equal(greedy(any_runner, state, START, 8), expected)


def test_a_state_is_written_in_one_line(runner: OrtRunner) -> None:
    state = filled(runner)
    assert repr(state) == f"State(batch=2, capacity=40, lengths=[9, 9], {state.nbytes / 1e6:.2f} MB)"
    many = runner.new_state(100, 40)
    assert repr(many).startswith("State(batch=100, capacity=40, lengths=[0, 0, 0, 0, 0, 0, 0, 0, ...], ")


def test_a_snapshot_does_not_change_when_the_state_goes_on(runner: OrtRunner) -> None:
    state = filled(runner)
    snapshot = state.snapshot()
    before = {n: t.copy() for n, t in snapshot.tensors.items()}
    greedy(runner, state, START, 4)
    assert snapshot.lengths.tolist() == [9, 9]
    for name, tensor in snapshot.tensors.items():
        np.testing.assert_array_equal(tensor, before[name])


def test_a_state_resumed_with_other_capacity_goes_on_bit_identically(any_runner: OrtRunner) -> None:
    state = filled(any_runner, batch=1)
    resumed = any_runner.resume(state.snapshot(), capacity=17)
    assert resumed.capacity == 17
    np.testing.assert_array_equal(greedy(any_runner, resumed, START[:1], 8), greedy(any_runner, state, START[:1], 8))


def test_restoring_replaces_what_the_old_state_left_in_the_cache(runner: OrtRunner) -> None:
    fresh = filled(runner)
    used = runner.new_state(2, 40)
    runner.forward(random_ids(2, 30, seed=1), used)
    for tensor in used.tensors().values():
        tensor.fill(np.nan)
    used.restore(fresh.snapshot())
    np.testing.assert_array_equal(greedy(runner, used, START, 8), greedy(runner, fresh, START, 8))


def test_forks_are_independent_and_bit_identical(runner: OrtRunner) -> None:
    state = filled(runner, batch=1)
    fork = state.fork(3)
    assert fork.batch == 3
    assert fork.lengths.tolist() == [9, 9, 9]
    before = state_bytes(state)
    runner.forward(random_ids(3, 2, seed=5), fork)
    assert state_bytes(state) == before
    again = state.fork(1)
    np.testing.assert_array_equal(greedy(runner, again, START[:1], 4), greedy(runner, state, START[:1], 4))


def test_selected_rows_are_copies_in_the_asked_order(runner: OrtRunner) -> None:
    state = filled(runner)
    swapped = state.select([1, 0, 1])
    for name, tensor in state.tensors().items():
        np.testing.assert_array_equal(swapped.tensors()[name], tensor[[1, 0, 1]])
    with pytest.raises(StateError, match="rows cannot be selected"):
        state.select([2])
    with pytest.raises(StateError, match="rows cannot be selected"):
        state.select([])


def test_views_outlive_the_state(runner: OrtRunner) -> None:
    tensors = filled(runner).tensors()
    expected = {n: t.copy() for n, t in tensors.items()}
    gc.collect()
    noise = [np.full(tensors[n].shape, np.nan, np.float32) for n in tensors for _ in range(50)]
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(tensor, expected[name])
    assert len(noise) == 50 * len(tensors)


@pytest.mark.parametrize("method", ["crop", "rewind"])
def test_a_crop_is_refused_with_the_reason(runner: OrtRunner, method: str) -> None:
    state = filled(runner)
    before = state_bytes(state)
    with pytest.raises(StateError, match="recurrent") as error:
        getattr(state, method)(4)
    assert "snapshot" in error.value.fix
    assert state_bytes(state) == before


def test_memory_adds_up_and_names_the_growing_part(runner: OrtRunner) -> None:
    state = filled(runner, batch=2, capacity=40)
    memory = {(m.layer, m.kind): m for m in state.memory()}
    assert memory[0, "recurrent_state"].nbytes == 2 * 2 * 8 * 8 * 4
    assert memory[0, "recurrent_state"].bytes_per_token == 0
    assert memory[1, "latent"].nbytes == 2 * 40 * 6 * 4
    assert memory[1, "latent"].bytes_per_token == 2 * 6 * 4
    fixed = sum(m.nbytes for m in state.memory() if m.kind != "latent")
    assert state.nbytes == 2 * fixed + memory[1, "latent"].nbytes  # fixed states are double-buffered


@pytest.mark.parametrize(
    ("name", "index", "words"),
    [
        ("past_key_values.0.recurrent_state", (1, 1, 3, 4), ["layer 0", "recurrent_state", "batch row 1, head 1"]),
        ("past_key_values.0.conv_state", (0, 25, 1), ["layer 0", "conv_state", "batch row 0, k of head 1"]),
        ("past_key_values.0.conv_state", (1, 40, 2), ["layer 0", "conv_state", "batch row 1, v of head 1"]),
        ("past_key_values.1.latent", (1, 8, 2), ["layer 1", "latent", "batch row 1, token 8"]),
    ],
)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_the_finite_check_names_layer_kind_row_and_head(
    any_runner: OrtRunner, name: str, index: tuple[int, ...], words: list[str], value: float
) -> None:
    state = filled(any_runner)
    state.check_finite()
    state.tensors()[name][index] = value
    with pytest.raises(StateError) as error:
        state.check_finite()
    text = str(error.value)
    assert all(w in text for w in [*words, "1 of", str(list(index))]), text


def test_cached_tokens_past_the_length_are_not_part_of_the_state(runner: OrtRunner) -> None:
    state = filled(runner)
    state.tensors()["past_key_values.1.latent"][0, 9:] = np.nan
    state.check_finite()


def test_a_state_of_another_model_is_refused(runner: OrtRunner, any_runner: OrtRunner, tmp_path) -> None:
    from tests.runtime.hand_made_graph import write_hand_made_model

    other = OrtRunner(write_hand_made_model(tmp_path, seed=1) / "model.onnx", threads=1)
    with pytest.raises(StateError, match="another model of the same shape"):
        other.forward(random_ids(2, 1), filled(runner))
    with pytest.raises(StateError, match="another model of the same shape"):
        other.resume(filled(runner).snapshot())
    if any_runner.contract.dtype != "float32":
        with pytest.raises(StateError, match="other states"):
            any_runner.resume(filled(runner).snapshot())


def test_a_state_of_another_runner_of_the_same_model_moves_by_snapshot(runner: OrtRunner, model_path) -> None:
    twin = OrtRunner(model_path, threads=1)
    state = filled(runner)
    with pytest.raises(StateError, match="another runner") as error:
        twin.forward(random_ids(2, 1), state)
    assert "resume" in error.value.fix
    moved = twin.resume(state.snapshot())
    np.testing.assert_array_equal(greedy(twin, moved, START, 4), greedy(runner, state, START, 4))


def test_a_snapshot_that_does_not_fit_is_refused_before_anything_is_written(runner: OrtRunner) -> None:
    snapshot = filled(runner).snapshot()
    for target in (runner.new_state(2, 8), runner.new_state(1, 40)):
        before = state_bytes(target)
        with pytest.raises(StateError, match="does not fit"):
            target.restore(snapshot)
        assert state_bytes(target) == before


@pytest.mark.parametrize(("batch", "capacity"), [(0, 4), (1, 0), (1, 2**60)])
def test_a_state_of_impossible_size_is_refused(runner: OrtRunner, batch: int, capacity: int) -> None:
    with pytest.raises(StateError):
        runner.new_state(batch, capacity)


def test_history_rewinds_to_kept_lengths_only(runner: OrtRunner) -> None:
    state = runner.new_state(1, 64)
    history = SnapshotHistory(state, every=4, keep=3)
    expected = {}
    for step in range(20):
        expected[step] = state_bytes(state)
        runner.forward(random_ids(1, 1, seed=step), state)
        history.observe()
    assert history.lengths == [[12], [16], [20]]
    with pytest.raises(StateError, match="cannot be rewound to 14") as error:
        history.rewind(14)
    assert "[12]" in error.value.seen
    history.rewind(12)
    assert state_bytes(state) == expected[12]
    assert history.lengths == [[12]]


def test_history_recovers_the_last_finite_state(runner: OrtRunner) -> None:
    state = runner.new_state(1, 64)
    history = SnapshotHistory(state, every=2)
    runner.forward(random_ids(1, 2), state)
    history.observe()
    good = state_bytes(state)
    assert history.recover() is False
    runner.forward(random_ids(1, 1), state)
    state.tensors()["past_key_values.0.recurrent_state"][0, 1] = np.nan
    state.tensors()["past_key_values.1.latent"][0, 1] = np.inf
    runner.forward(random_ids(1, 1), state)
    with pytest.raises(StateError, match="layer 0: recurrent_state"):
        history.observe()
    assert history.recover() is True
    assert state_bytes(state) == good
    assert np.isfinite(runner.forward(random_ids(1, 1), state)).all()


@pytest.mark.parametrize("arguments", [{"every": 0}, {"every": 1, "keep": 0}])
def test_history_refuses_impossible_intervals(runner: OrtRunner, arguments: dict[str, int]) -> None:
    with pytest.raises(StateError, match="cannot be kept"):
        SnapshotHistory(runner.new_state(1, 4), **arguments)
