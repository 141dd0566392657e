"""What the CUDA kernels take beyond the cases that all implementations share (`test_matrix.py`)."""

import numpy as np
import pytest

from .cases import DISTRIBUTIONS, GATES, check, make_case, oracle
from .device import run_kernel


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_prefill_in_float16(device, distribution, dim):
    arrays, attributes = make_case(steps=40, heads=2, dim=dim, dtype="float16", distribution=distribution)
    check(run_kernel(device, "prefill", arrays, attributes), oracle(arrays, attributes), "kda_prefill_float16")


@pytest.mark.parametrize("gate", GATES)
def test_prefill_with_heads_of_128(device, gate):
    arrays, attributes = make_case(batch=2, steps=33, heads=3, dim=128, gate=gate)
    check(run_kernel(device, "prefill", arrays, attributes), oracle(arrays, attributes), "kda_prefill_bfloat16")


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_decode_of_hostile_inputs(device, distribution):
    arrays, attributes = make_case(steps=40, dtype="float32", distribution=distribution)
    check(run_kernel(device, "decode", arrays, attributes), oracle(arrays, attributes), "kda_decode_float32")


def test_the_state_survives_many_slow_steps(device):
    """The state is float32 from step to step: 200 calls of one token lose nothing that one long run would keep."""
    arrays, attributes = make_case(steps=200, dtype="bfloat16", distribution="slow")
    expected = oracle(arrays, attributes)
    state = {name: arrays[name] for name in ("past_conv_state", "past_recurrent_state")}
    for t in range(200):
        token = {k: a[:, t : t + 1] for k, a in arrays.items() if k in ("qkv", "decay", "beta", "output_gate")}
        result = run_kernel(device, "decode", arrays | token | state, attributes)
        state = {name: result[name.replace("past", "present")] for name in state}
        np.testing.assert_allclose(
            result["output"].astype(float),
            expected["output"][:, t : t + 1],
            atol=2e-2 * np.abs(expected["output"]).max(),
        )
    result["output"] = expected["output"]
    check(result, expected, "kda_decode_bfloat16")
