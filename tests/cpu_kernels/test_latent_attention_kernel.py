"""LatentAttention's CPU kernel, run by ONNX Runtime, computes the op: the cases that the function bodies pass."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnxruntime
import pytest

from kimi_deploy.ops.latent_attention.spec import SPEC
from kimi_deploy.ops.spec import AttributeValue
from kimi_deploy.runtime.ort_kernels import OrtKernels
from tests.cpu_kernels.instruction_sets import each_instruction_set
from tests.ops.body_cases import (
    Arrays,
    assert_close,
    mla_arrays,
    mla_attributes,
    mla_reference,
    padding_is_zero,
    poisoned,
)
from tests.ops.op_model import op_model, run, session
from tests.ops.test_mla_body import CASES, PADDED, case_arrays, check_pieces_fill_the_same_cache

MODELS = {
    "demo": {
        "num_heads": 4,
        "qk_nope_head_dim": 48,
        "qk_rope_head_dim": 16,
        "v_head_dim": 48,
        "kv_lora_rank": 64,
        "scale": 64**-0.5,
    },
    "odd": {
        "num_heads": 3,
        "qk_nope_head_dim": 7,
        "qk_rope_head_dim": 5,
        "v_head_dim": 9,
        "kv_lora_rank": 37,
        "scale": 12**-0.5,
    },
    "no rope": {**mla_attributes(), "qk_rope_head_dim": 0},
}
"""Sizes that are whole vectors, and such that are no multiple of anything."""


def kernel(
    library: OrtKernels, arrays: Arrays, attributes: Mapping[str, AttributeValue]
) -> onnxruntime.InferenceSession:
    return session(op_model(SPEC, [], attributes, "float32", arrays), threads=2, kernels=library)


def check(
    library: OrtKernels,
    built: onnxruntime.InferenceSession,
    arrays: Arrays,
    attributes: Mapping[str, AttributeValue],
) -> None:
    expected, cache = mla_reference(arrays, attributes)
    for _ in each_instruction_set(library):
        results = run(built, poisoned(arrays, PADDED))
        assert_close(results["output"], expected)
        assert np.array_equal(results["present_latent"], cache)
        assert padding_is_zero(results["output"], arrays["sequence_lengths"])


@pytest.mark.parametrize("steps", [1, 2, 3, 15, 16, 17, 64, 65, 130])
def test_any_length_batch_and_capacity_matches_expanded_attention_in_float64(library: OrtKernels, steps: int) -> None:
    built = None
    for past, lengths, spare in CASES:
        arrays = case_arrays(steps, past, lengths, spare)
        built = built or kernel(library, arrays, mla_attributes())
        check(library, built, arrays, mla_attributes())


@pytest.mark.parametrize("model", MODELS)
def test_sizes_of_every_kind_match_float64(library: OrtKernels, model: str) -> None:
    attributes = MODELS[model]
    built = None
    for steps, past in ((1, 0), (1, 200), (5, 70), (70, 0), (70, 33)):
        arrays = mla_arrays(attributes, [past], [steps], steps, past + steps + 3)
        built = built or kernel(library, arrays, attributes)
        check(library, built, arrays, attributes)


# a cache of half a megabyte a row is read by all heads together; a block of the expanded form has 512 steps
@pytest.mark.parametrize(("steps", "past"), [(1, [9000]), (5, [2900, 0]), (30, [3000]), (600, [100]), (1030, [0])])
def test_a_long_context_matches_float64(library: OrtKernels, steps: int, past: list[int]) -> None:
    arrays = mla_arrays(mla_attributes(), past, [steps] * len(past), steps, max(past) + steps + 2)
    check(library, kernel(library, arrays, mla_attributes()), arrays, mla_attributes())


@pytest.mark.parametrize("steps", [1, 70])
def test_rows_past_the_valid_length_are_never_read(library: OrtKernels, steps: int) -> None:
    arrays = case_arrays(steps, [2, 6], None, 20)
    stale = {**arrays, "past_latent": arrays["past_latent"].copy()}
    for row, past in enumerate((2, 6)):
        stale["past_latent"][row, past:] = np.nan
    built = kernel(library, arrays, mla_attributes())
    assert np.array_equal(run(built, stale)["output"], run(built, arrays)["output"])


@pytest.mark.parametrize("steps", [1, 4, 70])
def test_one_buffer_bound_as_past_and_present_is_written_in_place(library: OrtKernels, steps: int) -> None:
    arrays = case_arrays(steps, [3, 8], [steps, steps // 2], 11)
    built = kernel(library, arrays, mla_attributes())
    expected = run(built, arrays)
    cache = onnxruntime.OrtValue.ortvalue_from_numpy(arrays["past_latent"].copy())
    binding = built.io_binding()
    for name in [i.name for i in built.get_inputs()]:
        if name == "past_latent":
            binding.bind_ortvalue_input(name, cache)
        else:
            binding.bind_cpu_input(name, arrays[name])
    binding.bind_output("output")
    binding.bind_ortvalue_output("present_latent", cache)
    built.run_with_iobinding(binding)
    assert np.array_equal(binding.get_outputs()[0].numpy(), expected["output"])
    assert np.array_equal(cache.numpy(), expected["present_latent"])


def test_a_split_prefill_and_single_steps_fill_the_same_cache(library: OrtKernels) -> None:
    steps = 70
    arrays = mla_arrays(mla_attributes(), [0], [steps], steps, steps)
    check_pieces_fill_the_same_cache(kernel(library, arrays, mla_attributes()), arrays)


@pytest.mark.parametrize("steps", [3, 70])
@pytest.mark.parametrize("larger", ["past", "own"])
def test_a_part_that_outweighs_the_other_beyond_float32_hides_it_and_no_more(
    library: OrtKernels, larger: str, steps: int
) -> None:
    past = 3500 if steps == 3 else 90
    arrays = case_arrays(steps, [past], None, 0)
    # scores of hundreds: in the sum over both parts the smaller one underflows
    grown = arrays["past_latent"][:, :past] if larger == "past" else arrays["latent"]
    grown *= 100
    # of the best instruction set alone: without fused products, sums of such scores lie at the bound (1.01e-5)
    output = run(kernel(library, arrays, mla_attributes()), arrays)["output"]
    assert_close(output, mla_reference(arrays, mla_attributes())[0])


@pytest.mark.parametrize(
    ("past", "length", "message"),
    [(-1, 3, "past_lengths is negative"), (0, 4, "sequence_lengths"), (6, 3, "no room.*seen: 9; bound: 8")],
)
def test_lengths_that_do_not_fit_are_refused(library: OrtKernels, past: int, length: int, message: str) -> None:
    arrays = case_arrays(3, [0], None, 5)
    built = kernel(library, arrays, mla_attributes())
    arrays["past_lengths"][0], arrays["sequence_lengths"][0] = past, length
    with pytest.raises(Exception, match=message):
        run(built, arrays)


@pytest.mark.parametrize(("steps", "past"), [(1, 100), (1, 3200), (70, 64)])
def test_scores_that_are_no_numbers_are_not_hidden_by_those_of_other_tiles(
    library: OrtKernels, steps: int, past: int
) -> None:
    arrays = mla_arrays(mla_attributes(), [past], [steps], steps, past + steps)
    # the first tile, and of it the key part that the heads share, which is in scores and in no value
    arrays["past_latent"][0, :64, -1] = np.nan
    built = kernel(library, arrays, mla_attributes())
    for _ in each_instruction_set(library):
        assert np.isnan(run(built, arrays)["output"]).all()
