"""KimiDeltaAttention's CPU kernel, run by ONNX Runtime, computes the op: the cases that the function bodies pass."""

from __future__ import annotations

import numpy as np
import onnxruntime
import pytest

from kimi_deploy.ops.kimi_delta_attention.spec import SPEC
from kimi_deploy.runtime.ort_kernels import OrtKernels
from tests.cpu_kernels.instruction_sets import each_instruction_set
from tests.ops.body_cases import (
    REGIMES,
    Arrays,
    assert_close,
    kda_arrays,
    kda_attributes,
    kda_reference,
    padding_is_zero,
    poisoned,
)
from tests.ops.op_model import op_model, run, session
from tests.ops.test_kda_body import GATES, PADDED, STEPS

STATES = {"past_conv_state": "present_conv_state", "past_recurrent_state": "present_recurrent_state"}


def kernel(library: OrtKernels, arrays: Arrays, gate: str = "softplus", **sizes: int) -> onnxruntime.InferenceSession:
    """A session of one node without a function body."""
    attributes = kda_attributes(gate, **sizes)
    return session(op_model(SPEC, [], attributes, "float32", arrays), threads=2, kernels=library)


# sizes that are whole vectors, halves of them and both, of every instruction set; 64 and 128 are models'
@pytest.mark.parametrize("size", [8, 16, 24, 64, 128])
@pytest.mark.parametrize("gate", GATES)
def test_any_head_size_length_and_batch_matches_the_float64_recurrence(
    library: OrtKernels, gate: str, size: int
) -> None:
    attributes = kda_attributes(gate, size=size)
    for regime in REGIMES:
        built = None
        for steps in STEPS if regime == "mixed" and size < 64 else (1, 33, 65):
            for lengths in ([steps], [0, steps // 2, steps]):
                arrays = kda_arrays(attributes, lengths, steps, regime)
                built = built or kernel(library, arrays, gate, size=size)
                expected, expected_conv, expected_state = kda_reference(arrays, attributes)
                for _ in each_instruction_set(library):
                    output, conv, state = run(built, poisoned(arrays, PADDED)).values()
                    assert_close(output, expected)
                    assert_close(state, expected_state)
                    assert np.array_equal(conv, expected_conv)
                    assert padding_is_zero(output, lengths)


def test_a_slow_decay_is_still_right_after_four_thousand_steps(library: OrtKernels) -> None:
    attributes, steps = kda_attributes(heads=1, size=8), 4096
    arrays = kda_arrays(attributes, [steps], steps, "slow")
    arrays["decay"][:] = -9.0
    results = run(kernel(library, arrays, heads=1, size=8), arrays).values()
    for actual, wanted in zip(results, kda_reference(arrays, attributes), strict=True):
        assert_close(actual, wanted)


@pytest.mark.parametrize("width", [2, 3, 7])
def test_any_convolution_width_runs(library: OrtKernels, width: int) -> None:
    for steps in (1, width - 1, 9):
        arrays = kda_arrays(kda_attributes(), [steps], steps, width=width)
        results = run(kernel(library, arrays), arrays).values()
        for actual, wanted in zip(results, kda_reference(arrays, kda_attributes()), strict=True):
            assert_close(actual, wanted)


def test_absent_lengths_mean_every_step(library: OrtKernels) -> None:
    arrays = kda_arrays(kda_attributes(), [5, 5], 5)
    without = {name: a for name, a in arrays.items() if name != "sequence_lengths"}
    expected = run(kernel(library, arrays), arrays)
    actual = run(kernel(library, without), without)
    assert all(np.array_equal(actual[name], value) for name, value in expected.items())


def test_a_row_without_a_step_keeps_its_states_to_the_bit(library: OrtKernels) -> None:
    arrays = kda_arrays(kda_attributes(), [0, 20], 20)
    arrays["past_recurrent_state"][0, 0, 0, 0] = -0.0
    results = run(kernel(library, arrays), poisoned(arrays, PADDED))
    for past, present in STATES.items():
        assert results[present][0].tobytes() == arrays[past][0].tobytes()


def test_steps_of_a_split_prefill_end_in_the_same_states(library: OrtKernels) -> None:
    steps = 70
    arrays = kda_arrays(kda_attributes(), [steps], steps)
    built = kernel(library, arrays)
    whole = run(built, arrays)
    for cuts in ([33, steps], list(range(1, steps + 1))):
        outputs, states, begin = [], arrays, 0
        for end in cuts:
            piece = {n: a[:, begin:end] if n in PADDED else a for n, a in states.items()}
            piece["sequence_lengths"] = np.array([end - begin], np.int32)
            results = run(built, piece)
            states = {**states, **{past: results[present] for past, present in STATES.items()}}
            outputs.append(results["output"])
            begin = end
        assert_close(np.concatenate(outputs, axis=1), whole["output"].astype(np.float64))
        assert np.array_equal(results["present_conv_state"], whole["present_conv_state"])
        assert_close(results["present_recurrent_state"], whole["present_recurrent_state"].astype(np.float64))


@pytest.mark.parametrize("steps", [1, 40])
def test_states_bound_as_past_and_present_are_updated_in_place(library: OrtKernels, steps: int) -> None:
    arrays = kda_arrays(kda_attributes(size=64), [0, steps, max(1, steps // 2)], steps)
    built = kernel(library, arrays, size=64)
    expected = run(built, arrays)
    binding = built.io_binding()
    states = {past: onnxruntime.OrtValue.ortvalue_from_numpy(arrays[past].copy()) for past in STATES}
    for name in [i.name for i in built.get_inputs()]:
        if name in STATES:
            binding.bind_ortvalue_input(name, states[name])
            binding.bind_ortvalue_output(STATES[name], states[name])
        else:
            binding.bind_cpu_input(name, arrays[name])
    binding.bind_output("output")
    built.run_with_iobinding(binding)
    for past, present in STATES.items():
        assert np.array_equal(states[past].numpy(), expected[present])


def test_a_length_out_of_range_is_refused(library: OrtKernels) -> None:
    arrays = kda_arrays(kda_attributes(), [3, 3], 3)
    built = kernel(library, arrays)
    for length in (-1, 4):
        arrays["sequence_lengths"] = np.array([3, length], np.int32)
        with pytest.raises(Exception, match=f"sequence_lengths.*row 1; seen: {length}; bound: 3"):
            run(built, arrays)


@pytest.mark.parametrize("size", [4, 12, 20])
def test_a_head_that_is_not_whole_vectors_is_refused(library: OrtKernels, size: int) -> None:
    """Its tail would be computed, and written, beyond the row."""
    arrays = kda_arrays(kda_attributes(size=size), [3], 3)
    built = kernel(library, arrays, size=size)
    for _ in each_instruction_set(library):
        with pytest.raises(Exception, match=f"head_dim is no multiple of 8.*seen: {size}; bound: 8"):
            run(built, arrays)
