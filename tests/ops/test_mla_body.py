"""LatentAttention's function bodies compute the op and write only where they may."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx.reference import ReferenceEvaluator

from kimi_deploy.ops.flavours import FLAVOURS, Flavour
from kimi_deploy.ops.latent_attention.body import body
from kimi_deploy.ops.latent_attention.operands import Sizes
from kimi_deploy.ops.latent_attention.spec import SPEC
from tests.ops.body_cases import (
    Arrays,
    assert_close,
    in_dtype,
    mla_arrays,
    mla_attributes,
    mla_reference,
    padding_is_zero,
    poisoned,
)
from tests.ops.op_model import check, executed, op_model, run, session

PADDED = ("query", "latent")
CASES = (
    # past, lengths, spare capacity: exact fit, a longer cache, ragged rows, rows without a step
    ([0], None, 0),
    ([5], None, 0),
    ([5], None, 50),
    ([0, 7, 40], None, 0),
    ([0, 7, 40], [0, -1, 1], 9),
    # as much cached as there are new steps, or more: what a long prefill attends to in tiles
    ([130], None, 0),
    ([150, 150, 150], [0, -1, 1], 9),
)


@cache
def mla_session(flavour: Flavour, dtype: str = "float32") -> onnxruntime.InferenceSession:
    attributes = mla_attributes()
    arrays = in_dtype(SPEC, mla_arrays(attributes, [0], [1], 1, 1), dtype)
    return session(op_model(SPEC, body(flavour, attributes, dtype), attributes, dtype, arrays))


def case_arrays(steps: int, past: list[int], lengths: list[int] | None, spare: int) -> Arrays:
    """Arrays of a case; a length of -1 means all steps but one."""
    full = [steps] * len(past)
    valid = [min(n, steps) if n >= 0 else max(steps - 1, 0) for n in lengths or full]
    return mla_arrays(mla_attributes(), past, valid, steps, max(past) + steps + spare)


@pytest.mark.parametrize("steps", [1, 2, 3, 15, 16, 17, 64, 65, 130])
@pytest.mark.parametrize("flavour", FLAVOURS)
def test_any_length_batch_and_capacity_matches_expanded_attention_in_float64(flavour: Flavour, steps: int) -> None:
    for past, lengths, spare in CASES:
        arrays = case_arrays(steps, past, lengths, spare)
        results = run(mla_session(flavour), poisoned(arrays, PADDED))
        expected, cache_ = mla_reference(arrays, mla_attributes())
        assert_close(results["output"], expected)
        assert np.array_equal(results["present_latent"], cache_)
        assert padding_is_zero(results["output"], arrays["sequence_lengths"])


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_stale_rows_past_the_valid_length_change_nothing(flavour: Flavour) -> None:
    arrays = case_arrays(3, [2, 6], None, 20)
    output = run(mla_session(flavour), arrays)["output"]
    stale = {**arrays, "past_latent": arrays["past_latent"].copy()}
    for row, past in enumerate((2, 6)):
        stale["past_latent"][row, past + 3 :] = 1e4
    assert np.array_equal(run(mla_session(flavour), stale)["output"], output)


def test_one_buffer_bound_as_past_and_present_is_written_in_place() -> None:
    built = mla_session("ort")
    arrays = case_arrays(4, [3, 8], [4, 2], 11)
    expected = run(built, arrays)
    cache_ = onnxruntime.OrtValue.ortvalue_from_numpy(arrays["past_latent"].copy())
    binding = built.io_binding()
    for name, array in arrays.items():
        if name == "past_latent":
            binding.bind_ortvalue_input(name, cache_)
        elif name != "kv_b_weight":
            binding.bind_cpu_input(name, array)
    binding.bind_output("output")
    binding.bind_ortvalue_output("present_latent", cache_)
    built.run_with_iobinding(binding)
    assert np.array_equal(binding.get_outputs()[0].numpy(), expected["output"])
    assert np.array_equal(cache_.numpy(), expected["present_latent"])


def check_pieces_fill_the_same_cache(built: onnxruntime.InferenceSession, arrays: dict[str, np.ndarray]) -> None:
    """A prefill of one row in one call, in two, and step by step: close outputs, and the cache to the bit."""
    steps = arrays["query"].shape[1]
    whole = run(built, arrays)
    for cuts in ([13, steps], list(range(1, steps + 1))):
        latent, begin, outputs = arrays["past_latent"], 0, []
        for end in cuts:
            piece = {n: a[:, begin:end] if n in PADDED else a for n, a in arrays.items()}
            piece |= {"past_latent": latent, "past_lengths": np.array([begin], np.int32)}
            piece["sequence_lengths"] = np.array([end - begin], np.int32)
            output, latent = run(built, piece).values()
            outputs.append(output)
            begin = end
        assert_close(np.concatenate(outputs, axis=1), whole["output"].astype(np.float64))
        assert np.array_equal(latent, whole["present_latent"])


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_a_split_prefill_and_single_steps_fill_the_same_cache(flavour: Flavour) -> None:
    steps = 21
    arrays = mla_arrays(mla_attributes(), [0], [steps], steps, steps)
    check_pieces_fill_the_same_cache(mla_session(flavour), arrays)


# ONNX Runtime's CPU has no bfloat16 products; the ort body makes none
@pytest.mark.parametrize(
    ("flavour", "dtype"),
    [("ort", "float16"), ("ort", "bfloat16"), ("onnx", "float16"), ("primitive", "float16")],
)
def test_half_precision_only_rounds(flavour: Flavour, dtype: str) -> None:
    for steps, past in ((1, [5, 0]), (19, [5, 0]), (66, [66, 66])):
        arrays = in_dtype(SPEC, case_arrays(steps, past, [steps, steps // 2], 7), dtype)
        results = run(mla_session(flavour, dtype), arrays)
        expected, cache_ = mla_reference(arrays, mla_attributes())
        assert_close(results["output"], expected, f"op_{dtype}")
        assert np.array_equal(results["present_latent"].astype(np.float64), cache_)


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_checker_and_strict_inference_accept_it_and_the_reference_evaluator_agrees(flavour: Flavour) -> None:
    for steps, past in ((1, [5, 0]), (18, [5, 0]), (66, [66, 66])):
        arrays = case_arrays(steps, past, [steps, steps // 2], 7)
        functions = body(flavour, mla_attributes(), "float32")
        model = op_model(SPEC, functions, mla_attributes(), "float32", arrays)
        check(model)
        fed = {i.name: arrays[i.name] for i in model.graph.input}
        output, cache_ = ReferenceEvaluator(model).run(None, fed)
        expected, expected_cache = mla_reference(arrays, mla_attributes())
        assert_close(output, expected)
        assert np.array_equal(cache_, expected_cache)


@pytest.mark.parametrize("larger", ["past", "own"])
def test_a_part_that_outweighs_the_other_beyond_float32_hides_it_and_no_more(larger: str) -> None:
    steps, past = 70, 90
    arrays = case_arrays(steps, [past], None, 0)
    # scores of hundreds: in the sum over both parts the smaller one underflows
    grown = arrays["past_latent"][:, :past] if larger == "past" else arrays["latent"]
    grown *= 100
    output = run(mla_session("ort"), arrays)["output"]
    assert_close(output, mla_reference(arrays, mla_attributes())[0])


def test_the_tiled_form_is_the_one_that_runs_once_as_much_is_cached(tmp_path: Path) -> None:
    attributes, steps = mla_attributes(), 70
    model = op_model(SPEC, body("ort", attributes, "float32"), attributes, "float32", case_arrays(steps, [0], None, 0))
    for past, tiled in (([69], False), ([70], True), ([70, 71], False), ([70, 70], True)):
        assert ("MultiHeadAttention" in kernels(model, case_arrays(steps, past, None, 5), tmp_path)) is tiled


def test_a_decode_step_makes_no_keys_of_the_cache_and_a_long_prefill_does(tmp_path: Path) -> None:
    attributes = mla_attributes()
    sizes = Sizes(*(int(attributes[a.name]) for a in SPEC.attributes if a.type == "int"))
    past = 5
    for steps in (1, 2, sizes.expand_from - 1, sizes.expand_from):  # type: ignore[operator]
        arrays = case_arrays(steps, [past], None, 9)
        model = op_model(SPEC, body("ort", attributes, "float32"), attributes, "float32", arrays)
        shapes = [shape for event in profiled(model, arrays, tmp_path) for shape in output_shapes(event)]
        keys = [1, sizes.heads, past + steps, sizes.nope]
        assert (keys in shapes) is (steps == sizes.expand_from), steps


def kernels(model: onnx.ModelProto, arrays: Arrays, folder: Path) -> set[str]:
    """Operators of the kernels that ran."""
    return {event["args"]["op_name"] for event in profiled(model, arrays, folder)}


def profiled(model: onnx.ModelProto, arrays: Arrays, folder: Path) -> list[dict[str, Any]]:
    """An event for each kernel that ran."""
    options = onnxruntime.SessionOptions()
    options.enable_profiling, options.profile_file_prefix = True, str(folder / "trace")
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    run(session, arrays)
    events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    return [e for e in events if e["name"].endswith("_kernel_time")]


def output_shapes(event: dict[str, Any]) -> list[list[int]]:
    return [shape for output in event["args"]["output_type_shape"] for shape in output.values()]


def test_onnx_runtime_reads_the_cache_without_transposing_it(tmp_path: Path) -> None:
    functions = body("ort", mla_attributes(), "float32")
    arrays = case_arrays(1, [0], None, 0)
    graph = executed(op_model(SPEC, functions, mla_attributes(), "float32", arrays), tmp_path)
    expanded, absorbed = branches(graph)
    tiled, whole = branches(expanded)
    assert "MultiHeadAttention" in [node.op_type for node in tiled.node]
    assert "FusedMatMul" in [node.op_type for node in whole.node]
    slices = {}
    for branch in branches(absorbed):
        operators = [node.op_type for node in branch.node]
        assert "FusedMatMul" in operators
        assert "Transpose" not in operators
        slices[branch.name] = operators.count("Slice")
    # the one Slice of an exact fit cuts the small result
    assert slices == {"then": 1, "else": 2}


def branches(graph: onnx.GraphProto) -> list[onnx.GraphProto]:
    """The then and else graphs of the only If of a graph."""
    (node,) = [node for node in graph.node if node.op_type == "If"]
    attributes = {a.name: a.g for a in node.attribute}
    return [attributes["then_branch"], attributes["else_branch"]]


def test_the_expanded_form_begins_where_it_multiplies_less() -> None:
    assert Sizes(32, 128, 64, 128, 512).expand_from == 158
    assert Sizes(8, 64, 32, 64, 128).expand_from == 103
    # small latents: absorbed multiplies less at any length
    assert Sizes(8, 128, 0, 128, 64).expand_from is None
    sizes = [int(mla_attributes()[a.name]) for a in SPEC.attributes if a.type == "int"]
    # the tests above see both forms
    assert 17 < Sizes(*sizes).expand_from <= 64  # type: ignore[operator]
