"""Ragged batches in every layout: each sequence gives what it gives alone, and nothing else is read or written."""

import numpy as np
import pytest

from .cases import make_case
from .device import run_kernel

OF_STEPS = ("qkv", "decay", "beta", "output_gate")
OF_SEQUENCES = ("past_conv_state", "past_recurrent_state")
STATES = ("present_conv_state", "present_recurrent_state")
LENGTHS = (17, 0, 1, 40, 16)


def alone(arrays, rows, entry):
    """One sequence by itself: its steps `rows` of `arrays`, its state `entry`."""
    sequence, steps = rows
    part = {name: arrays[name][sequence : sequence + 1, steps] for name in OF_STEPS}
    return arrays | part | {name: arrays[name][entry : entry + 1] for name in OF_SEQUENCES}


def bits(array):
    return np.ascontiguousarray(array).view(np.uint8)


@pytest.mark.parametrize("mode", ["decode", "prefill"])
def test_an_idle_row_keeps_its_state_to_the_bit(device, mode):
    """Negative zeros, subnormals and NaN payloads included."""
    arrays, attributes = make_case(batch=1, steps=1)
    rng = np.random.default_rng(5)
    for name in OF_SEQUENCES:
        raw = rng.integers(0, 256, arrays[name].nbytes, dtype=np.uint8)
        arrays[name] = raw.view(arrays[name].dtype).reshape(arrays[name].shape)
    arrays["sequence_lengths"] = np.zeros(1, np.int32)
    result = run_kernel(device, mode, arrays, attributes)
    for state in STATES:
        np.testing.assert_array_equal(bits(result[state]), bits(arrays[state.replace("present", "past")]))
    assert (result["output"] == 0).all()


def test_lengths_past_the_row_are_clamped(device):
    arrays, attributes = make_case(batch=2, steps=5)
    plain = run_kernel(device, "prefill", arrays, attributes)
    hostile = arrays | {"sequence_lengths": np.array([2**31 - 1, -7], np.int32)}
    result = run_kernel(device, "prefill", hostile, attributes)
    np.testing.assert_array_equal(bits(result["output"][0]), bits(plain["output"][0]))
    assert (result["output"][1] == 0).all()


def packed_case(lengths, heads=2, seed=0):
    arrays, attributes = make_case(batch=1, steps=sum(lengths), heads=heads, entries=len(lengths), seed=seed)
    arrays["cu_seqlens"] = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    return arrays, attributes


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("lengths", [LENGTHS, (0, 0, 3, 0), (1,) * 9, (64, 1, 15)])
def test_packed_sequences_are_as_alone(device, lengths, in_place):
    arrays, attributes = packed_case(lengths)
    result = run_kernel(device, "prefill", arrays, attributes, in_place=in_place)
    cu_seqlens = arrays.pop("cu_seqlens")
    for n, length in enumerate(lengths):
        steps = slice(cu_seqlens[n], cu_seqlens[n + 1])
        if length == 0:
            for state in STATES:
                np.testing.assert_array_equal(bits(result[state][n]), bits(arrays[state.replace("present", "past")][n]))
            continue
        expected = run_kernel(device, "prefill", alone(arrays, (0, steps), n), attributes)
        np.testing.assert_array_equal(bits(result["output"][:, steps]), bits(expected["output"]))
        for state in STATES:
            np.testing.assert_array_equal(bits(result[state][n]), bits(expected[state][0]))


def test_steps_outside_every_packed_sequence_stay_untouched(device):
    arrays, attributes = make_case(batch=1, steps=30, entries=1)
    arrays["cu_seqlens"] = np.array([4, 20], np.int32)
    result = run_kernel(device, "prefill", arrays, attributes)
    outside = np.r_[result["output"][0, :4], result["output"][0, 20:]].astype(float)
    assert np.isnan(outside).all()
    assert np.isfinite(result["output"][0, 4:20].astype(float)).all()


@pytest.mark.parametrize("boundaries", [(50, 10, 5), (-5, 7, 2**31 - 1)])
def test_hostile_boundaries_stay_inside_memory(device, boundaries):
    """Guards around every array, and AddressSanitizer in the sanitised run, watch this."""
    arrays, attributes = make_case(batch=1, steps=20, entries=2)
    arrays["cu_seqlens"] = np.array(boundaries, np.int32)
    run_kernel(device, "prefill", arrays, attributes)


@pytest.mark.parametrize("mode", ["decode", "prefill"])
@pytest.mark.parametrize("in_place", [False, True])
def test_slots_choose_entries_of_a_pool(device, mode, in_place):
    arrays, attributes = make_case(batch=4, steps=3, entries=6)
    slots = np.array([4, -1, 0, 6], np.int32)
    result = run_kernel(device, mode, arrays | {"slots": slots}, attributes, in_place=in_place)
    for n, slot in enumerate(slots):
        if not 0 <= slot < 6:
            assert (result["output"][n] == 0).all()
            continue
        expected = run_kernel(device, mode, alone(arrays, (n, slice(None)), slot), attributes)
        np.testing.assert_array_equal(bits(result["output"][n]), bits(expected["output"][0]))
        for state in STATES:
            np.testing.assert_array_equal(bits(result[state][slot]), bits(expected[state][0]))
    for state in STATES:
        idle = result[state][[1, 2, 3, 5]]
        kept = arrays[state.replace("present", "past")][[1, 2, 3, 5]]
        if in_place:
            np.testing.assert_array_equal(bits(idle), bits(kept))
        else:
            assert np.isnan(idle.astype(float)).all()


def test_packed_sequences_with_slots(device):
    arrays, attributes = packed_case((5, 18, 2))
    slots = np.array([2, -1, 0], np.int32)
    result = run_kernel(device, "prefill", arrays | {"slots": slots}, attributes)
    assert (result["output"][0, 5:23] == 0).all()
    del arrays["cu_seqlens"]
    for slot, steps in ((2, slice(0, 5)), (0, slice(23, 25))):
        expected = run_kernel(device, "prefill", alone(arrays, (0, steps), slot), attributes)
        np.testing.assert_array_equal(bits(result["output"][:, steps]), bits(expected["output"]))
        np.testing.assert_array_equal(result["present_recurrent_state"][slot], expected["present_recurrent_state"][0])


def test_snapshots_are_the_states_after_every_64_steps(device):
    arrays, attributes = make_case(batch=2, steps=130)
    arrays["sequence_lengths"] = np.array([130, 64], np.int32)
    result = run_kernel(device, "prefill", arrays, attributes, snapshots=4)
    snapshots = result["state_snapshots"].reshape(2, 2, *result["state_snapshots"].shape[1:])
    for n, count in ((0, 2), (1, 1)):
        for i in range(count):
            part = alone(arrays, (n, slice(0, 64 * (i + 1))), n)
            del part["sequence_lengths"]
            expected = run_kernel(device, "prefill", part, attributes)
            np.testing.assert_array_equal(snapshots[n, i], expected["present_recurrent_state"][0])
    assert np.isnan(snapshots[1, 1]).all()


def test_snapshots_of_packed_sequences(device):
    lengths = (70, 1, 128, 60)
    arrays, attributes = packed_case(lengths, heads=1)
    result = run_kernel(device, "prefill", arrays, attributes, snapshots=sum(lengths) // 64)
    cu_seqlens = arrays.pop("cu_seqlens")
    written = set()
    for n, length in enumerate(lengths):
        for i in range(length // 64):
            row = cu_seqlens[n] // 64 + i
            written.add(row)
            steps = slice(cu_seqlens[n], cu_seqlens[n] + 64 * (i + 1))
            expected = run_kernel(device, "prefill", alone(arrays, (0, steps), n), attributes)
            np.testing.assert_array_equal(result["state_snapshots"][row], expected["present_recurrent_state"][0])
    untouched = [r for r in range(sum(lengths) // 64) if r not in written]
    assert np.isnan(result["state_snapshots"][untouched]).all()
