"""prefill(T) = prefill(t1) then prefill(t2) = T decodes, whatever the order of threads and the split over blocks."""

import numpy as np
import pytest

from .cases import GATES, check, make_case, oracle
from .device import run_kernel

OF_STEPS = ("qkv", "decay", "beta", "output_gate")


def continued(device, calls, arrays, attributes):
    """The sequence of (mode, steps) `calls`, each on the states of the one before; outputs joined."""
    arrays = dict(arrays)
    outputs, start = [], 0
    for mode, steps in calls:
        part = {name: np.ascontiguousarray(arrays[name][:, start : start + steps]) for name in OF_STEPS}
        result = run_kernel(device, mode, arrays | part, attributes, in_place=True)
        for state in ("conv_state", "recurrent_state"):
            arrays[f"past_{state}"] = result[f"present_{state}"]
        outputs.append(result["output"])
        start += steps
    return result | {"output": np.concatenate(outputs, axis=1)}


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize(
    "calls",
    [
        (("prefill", 32), ("decode", 18)),
        (("decode", 1),) * 4 + (("prefill", 45), ("decode", 1)),
    ],
)
def test_a_split_run_is_the_whole_run(device, calls, gate):
    arrays, attributes = make_case(batch=2, steps=50, gate=gate, distribution="slow")
    check(continued(device, calls, arrays, attributes), oracle(arrays, attributes), "kda_prefill_bfloat16")


def test_a_run_split_at_a_tile_has_the_same_bits(device):
    arrays, attributes = make_case(steps=70)
    whole = run_kernel(device, "prefill", arrays, attributes)
    parts = continued(device, (("prefill", 32), ("prefill", 38)), arrays, attributes)
    for name, array in whole.items():
        np.testing.assert_array_equal(array, parts[name])


def test_decode_steps_have_the_bits_of_one_long_decode(device):
    arrays, attributes = make_case(batch=2, steps=6, dtype="float32")
    whole = run_kernel(device, "decode", arrays, attributes)
    parts = continued(device, (("decode", 1),) * 6, arrays, attributes)
    for name, array in whole.items():
        np.testing.assert_allclose(array, parts[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dim", [64, 128])
def test_the_split_over_blocks_changes_no_bit(device, dim):
    arrays, attributes = make_case(steps=35, dim=dim)
    results = [
        run_kernel(device, "prefill", arrays, attributes, value_splits=splits) for splits in (1, 2, 4, dim // 16, 0)
    ]
    for other in results[1:]:
        for name, array in results[0].items():
            np.testing.assert_array_equal(array, other[name])


@pytest.mark.parametrize("mode", ["decode", "prefill"])
@pytest.mark.parametrize("in_place", [False, True])
def test_no_order_of_threads_changes_a_bit(device, mode, in_place):
    """Emulated: shuffled blocks, threads and copies. On a GPU: repeated runs."""
    arrays, attributes = make_case(batch=2, steps=20, heads=2)
    arrays["sequence_lengths"] = np.array([20, 7], np.int32)
    results = []
    for seed in (1, 2, 3):
        device.set_seed(seed)
        results.append(run_kernel(device, mode, arrays, attributes, in_place=in_place))
    device.set_seed(1)
    for other in results[1:]:
        for name, array in results[0].items():
            np.testing.assert_array_equal(array.view(np.uint8), other[name].view(np.uint8))
