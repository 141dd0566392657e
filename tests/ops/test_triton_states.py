"""States, padding and repeatability of the Triton kernels."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from kimi_deploy.ops.kimi_delta_attention.triton.tiling import prefill_tiling
from tests.ops.torch_cases import Attributes, Tensors, assert_close, kda_attributes, kda_inputs, poison, row, same_bits
from tests.ops.triton_cases import DEVICES, GATES, Outputs, assert_accurate, prepared, run

pytestmark = pytest.mark.parametrize("device", DEVICES)
PER_STEP = ("qkv", "decay", "beta", "output_gate")


def in_pieces(tensors: Tensors, attributes: Attributes, lengths: list[int], device: str) -> Outputs:
    """Output and states after calls of `lengths` steps one after the other."""
    conv, state = tensors["past_conv_state"], tensors["past_recurrent_state"]
    outputs, start = [], 0
    for length in lengths:
        piece = tensors | {name: tensors[name][:, start : start + length] for name in PER_STEP}
        output, conv, state = run(piece | {"past_conv_state": conv, "past_recurrent_state": state}, attributes, device)
        outputs.append(output)
        start += length
    return torch.cat(outputs, dim=1), conv, state


@pytest.mark.parametrize("gate", GATES)
def test_a_prefill_is_two_prefills_is_single_steps(device: str, gate: str) -> None:
    attributes = kda_attributes(heads=1, gate=gate)
    tensors = prepared(kda_inputs(1, 35, attributes), torch.float32)
    whole = in_pieces(tensors, attributes, [35], device)
    # cuts inside a chunk, at its end, shorter than the convolution, and into single steps
    for lengths in ([17, 18], [32, 3], [33, 2], [1, 34], [2, 16, 17], [1] * 35):
        pieces = in_pieces(tensors, attributes, lengths, device)
        assert same_bits(pieces[1], whole[1])
        assert_close(pieces[0], whole[0], "float32", f"output {lengths}")
        assert_close(pieces[2], whole[2], "float32", f"state {lengths}")


@pytest.mark.parametrize("steps", [6, 66])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_padding_is_inert_whatever_it_holds(device: str, steps: int, dtype: torch.dtype) -> None:
    attributes = kda_attributes(heads=1)
    lengths = [0, 1, 2, steps // 2, steps - 1, steps]
    tensors = prepared(kda_inputs(len(lengths), steps, attributes, lengths=lengths), dtype)
    tensors["past_recurrent_state"][0, 0, 0, 0] = -0.0
    poisoned = poison(tensors, PER_STEP, float("nan"))
    actual = run(poisoned, attributes, device)
    assert_accurate(actual, tensors, attributes)
    for index, length in enumerate(lengths):
        assert same_bits(actual[0][index, length:], torch.zeros_like(actual[0][index, length:]))
        alone = run(row(tensors, index, length, PER_STEP), attributes, device) if length else None
        if alone and (length > 16) == (steps > 16):
            assert same_bits(actual[0][index : index + 1, :length], alone[0])
            assert same_bits(actual[2][index : index + 1], alone[2])
    assert same_bits(actual[1][0], tensors["past_conv_state"][0])
    assert same_bits(actual[2][0], tensors["past_recurrent_state"][0])


def test_a_long_prefill_in_several_passes_gives_the_same_bits(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    attributes = kda_attributes()
    lengths = [150, 0, 31, 97]
    tensors = prepared(kda_inputs(4, 150, attributes, lengths=lengths), torch.bfloat16)
    whole = run(tensors, attributes, device)
    tiling = prefill_tiling(attributes["head_dim"], tensors["qkv"].to(device))
    monkeypatch.setattr("kimi_deploy.ops.kimi_delta_attention.triton.tiling.WORKSPACE", 1)
    assert tiling.window(8) == tiling.chunk
    for a, e in zip(run(tensors, attributes, device), whole, strict=True):
        assert same_bits(a, e)


@pytest.mark.parametrize("change", [{"chunk": 32}, {"chunk": 64}, {"block_v": 64}, {"stages": 1}])
def test_every_tiling_computes_the_same(device: str, change: dict[str, int]) -> None:
    attributes = kda_attributes(heads=1, head_dim=40)
    tensors = prepared(kda_inputs(1, 90, attributes, lengths=[83]), torch.float16)
    tiling = dataclasses.replace(prefill_tiling(40, tensors["qkv"].to(device)), **change)
    assert_accurate(run(tensors, attributes, device, tiling=tiling), tensors, attributes)


def test_strided_inputs_are_read_as_they_are(device: str) -> None:
    attributes = kda_attributes()
    tensors = prepared(kda_inputs(2, 20, attributes), torch.float32)
    strided = {n: t.movedim(0, -1).contiguous().movedim(-1, 0) for n, t in tensors.items()}
    for a, e in zip(run(strided, attributes, device), run(tensors, attributes, device), strict=True):
        assert same_bits(a, e)
