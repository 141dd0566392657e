"""What the Triton kernels take beyond the cases that all implementations share (`tests/kernels/test_matrix.py`)."""

from __future__ import annotations

import pytest
import torch

from tests.ops.torch_cases import kda_attributes, kda_inputs
from tests.ops.triton_cases import DEVICES, REGIMES, assert_accurate, prepared, regime_inputs, run

pytestmark = pytest.mark.parametrize("device", DEVICES)
FLOATS = (torch.float32, torch.float16, torch.bfloat16)


@pytest.mark.parametrize("steps", [5, 100])
@pytest.mark.parametrize("regime", REGIMES)
def test_any_decay_and_any_keys(device: str, regime: str, steps: int) -> None:
    attributes = kda_attributes(heads=1, head_dim=64)
    for dtype in FLOATS:
        tensors = prepared(regime_inputs(regime, 1, steps, attributes), dtype)
        assert_accurate(run(tensors, attributes, device), tensors, attributes, regime)


@pytest.mark.parametrize("steps", [3, 40])
@pytest.mark.parametrize("head_dim", [8, 24, 128])
def test_any_head_size_that_is_a_multiple_of_eight(device: str, head_dim: int, steps: int) -> None:
    attributes = kda_attributes(heads=3, head_dim=head_dim)
    for dtype in FLOATS:
        tensors = prepared(kda_inputs(1, steps, attributes), dtype)
        assert_accurate(run(tensors, attributes, device), tensors, attributes)


@pytest.mark.parametrize("steps", [4, 20])
@pytest.mark.parametrize("width", [2, 3, 5])
def test_any_width_of_the_convolution(device: str, width: int, steps: int) -> None:
    attributes = kda_attributes()
    tensors = prepared(kda_inputs(2, steps, attributes, width=width), torch.float32)
    assert_accurate(run(tensors, attributes, device), tensors, attributes)


@pytest.mark.parametrize("steps", [2, 50])
def test_a_state_of_sixteen_bits(device: str, steps: int) -> None:
    attributes = kda_attributes(head_dim=16)
    tensors = prepared(kda_inputs(2, steps, attributes), torch.float16)
    tensors["past_recurrent_state"] = tensors["past_recurrent_state"].half()
    actual = run(tensors, attributes, device)
    assert actual[2].dtype == torch.float16
    assert_accurate((actual[0], actual[1], run_wide(tensors, attributes, device)), tensors, attributes)
    assert torch.equal(actual[2], run_wide(tensors, attributes, device).half())


def run_wide(tensors: dict[str, torch.Tensor], attributes: dict[str, object], device: str) -> torch.Tensor:
    """The state from the same numbers, kept in float32."""
    wide = tensors | {"past_recurrent_state": tensors["past_recurrent_state"].float()}
    return run(wide, attributes, device)[2]
