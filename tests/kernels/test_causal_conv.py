"""The standard's CausalConvWithState against its definition in float64, its state to the bit."""

import numpy as np
import pytest

from .standard_cases import causal_conv_case, causal_conv_oracle, check_causal_conv, run_causal_conv

STEPS = (1, 2, 3, 17, 31, 32, 64, 130)


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("width", [1, 2, 4, 7, 40])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_every_length_and_width(device, steps, width, dtype):
    arrays, attributes = causal_conv_case(steps=steps, width=width, dtype=dtype, seed=steps)
    check_causal_conv(run_causal_conv(device, arrays, attributes), causal_conv_oracle(arrays, attributes))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("past", [False, True])
@pytest.mark.parametrize("activation", ["none", "silu", "swish"])
@pytest.mark.parametrize("steps", [2, 40])
def test_every_optional_part(device, bias, past, activation, steps):
    arrays, attributes = causal_conv_case(bias=bias, past=past, activation=activation, steps=steps)
    check_causal_conv(run_causal_conv(device, arrays, attributes), causal_conv_oracle(arrays, attributes))


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("width", [4, 40])
def test_the_present_state_may_be_the_past(device, steps, width):
    """More channels than one block has threads for; every order of threads gives the same."""
    arrays, attributes = causal_conv_case(batch=3, channels=100, steps=steps, width=width)
    expected = causal_conv_oracle(arrays, attributes)
    for seed in (1, 2):
        device.set_seed(seed)
        check_causal_conv(run_causal_conv(device, arrays, attributes, in_place=True), expected)
    device.set_seed(1)


@pytest.mark.parametrize("in_place", [False, True])
def test_no_steps_keep_the_state_to_the_bit(device, in_place):
    """Negative zeros, subnormals and NaN payloads included."""
    arrays, attributes = causal_conv_case(steps=0, dtype="bfloat16")
    raw = np.random.default_rng(5).integers(0, 256, arrays["past_state"].nbytes, dtype=np.uint8)
    arrays["past_state"] = raw.view(arrays["past_state"].dtype).reshape(arrays["past_state"].shape)
    results = run_causal_conv(device, arrays, attributes, in_place=in_place)
    assert results["present_state"].tobytes() == arrays["past_state"].tobytes()


@pytest.mark.parametrize("width", [2, 4, 9])
@pytest.mark.parametrize("parts", [(17, 33), (1, 2, 47), (1,) * 5 + (45,)])
def test_a_split_run_has_the_bits_of_the_whole(device, width, parts):
    arrays, attributes = causal_conv_case(steps=50, width=width, dtype="float16")
    whole = run_causal_conv(device, arrays, attributes)
    state, outputs, start = arrays["past_state"], [], 0
    for steps in parts:
        part = np.ascontiguousarray(arrays["input"][:, :, start : start + steps])
        results = run_causal_conv(device, arrays | {"input": part, "past_state": state}, attributes, in_place=True)
        state, start = results["present_state"], start + steps
        outputs.append(results["output"])
    assert np.concatenate(outputs, axis=2).tobytes() == whole["output"].tobytes()
    assert state.tobytes() == whole["present_state"].tobytes()


def test_the_activation_sees_extremes(device):
    arrays, attributes = causal_conv_case(steps=40, width=1, bias=False, past=False)
    arrays["weight"][:] = 1
    arrays["input"][0, 0, :4] = (1e4, -1e4, 0.0, -0.0)
    result = run_causal_conv(device, arrays, attributes)["output"][0, 0, :4]
    np.testing.assert_array_equal(result, np.array((1e4, 0, 0, 0), np.float32))
