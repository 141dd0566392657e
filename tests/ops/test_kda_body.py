"""KimiDeltaAttention's function bodies compute the op, on ONNX Runtime and in ONNX's own reference evaluator."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
from onnx.reference import ReferenceEvaluator

from kimi_deploy.errors import ContractError, UsageError
from kimi_deploy.ops.flavours import FLAVOURS, Flavour
from kimi_deploy.ops.kimi_delta_attention.body import body
from kimi_deploy.ops.kimi_delta_attention.spec import SPEC
from tests.ops.body_cases import (
    REGIMES,
    Arrays,
    assert_close,
    in_dtype,
    kda_arrays,
    kda_attributes,
    kda_reference,
    padding_is_zero,
    poisoned,
)
from tests.ops.op_model import check, executed, op_model, run, session

STEPS = (1, 2, 3, 15, 16, 17, 64, 65, 130)
PADDED = ("qkv", "decay", "beta", "output_gate")
GATES = ("softplus", "bounded")


@cache
def kda_session(flavour: Flavour, gate: str, dtype: str = "float32"):  # type: ignore[no-untyped-def]
    attributes = kda_attributes(gate)
    arrays = in_dtype(SPEC, kda_arrays(attributes, [1], 1), dtype)
    return session(op_model(SPEC, body(flavour, attributes, dtype), attributes, dtype, arrays))


def run_kda(flavour: Flavour, gate: str, arrays: Arrays) -> list[np.ndarray]:
    return list(run(kda_session(flavour, gate), arrays).values())


@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("flavour", FLAVOURS)
def test_any_length_and_batch_matches_the_float64_recurrence(flavour: Flavour, gate: str, regime: str) -> None:
    attributes = kda_attributes(gate)
    for steps in STEPS if regime == "mixed" else (1, 17, 65):
        for lengths in ([steps], [0, steps // 2, steps]):
            arrays = kda_arrays(attributes, lengths, steps, regime)
            output, conv, state = run_kda(flavour, gate, poisoned(arrays, PADDED))
            expected, expected_conv, expected_state = kda_reference(arrays, attributes)
            assert_close(output, expected)
            assert_close(state, expected_state)
            assert np.array_equal(conv, expected_conv)
            assert padding_is_zero(output, lengths)


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("flavour", FLAVOURS)
def test_a_slow_decay_is_still_right_after_four_thousand_steps(flavour: Flavour, gate: str) -> None:
    attributes, steps = kda_attributes(gate, heads=1, size=8), 4096
    arrays = kda_arrays(attributes, [steps], steps, "slow")
    arrays["decay"][:] = -9.0
    built = session(op_model(SPEC, body(flavour, attributes, "float32"), attributes, "float32", arrays))
    for actual, wanted in zip(run(built, arrays).values(), kda_reference(arrays, attributes), strict=True):
        assert_close(actual, wanted)


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_a_row_without_a_step_keeps_its_states(flavour: Flavour) -> None:
    for steps in (1, 20):
        arrays = kda_arrays(kda_attributes(), [0, steps], steps)
        _, conv, state = run_kda(flavour, "softplus", poisoned(arrays, PADDED))
        assert np.array_equal(conv[0], arrays["past_conv_state"][0])
        assert np.array_equal(state[0], arrays["past_recurrent_state"][0])


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_a_split_prefill_and_single_steps_end_in_the_same_states(flavour: Flavour) -> None:
    steps = 37
    arrays = kda_arrays(kda_attributes(), [steps], steps)
    whole = run_kda(flavour, "softplus", arrays)
    for cuts in ([20, steps], list(range(1, steps + 1))):
        outputs, states, begin = [], arrays, 0
        for end in cuts:
            piece = {n: a[:, begin:end] if n in PADDED else a for n, a in states.items()}
            piece["sequence_lengths"] = np.array([end - begin], np.int32)
            output, conv, state = run_kda(flavour, "softplus", piece)
            states = {**states, "past_conv_state": conv, "past_recurrent_state": state}
            outputs.append(output)
            begin = end
        assert_close(np.concatenate(outputs, axis=1), whole[0].astype(np.float64))
        assert np.array_equal(conv, whole[1])
        assert_close(state, whole[2].astype(np.float64))


@pytest.mark.parametrize("flavour", FLAVOURS)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_only_rounds_inputs_and_outputs(flavour: Flavour, dtype: str) -> None:
    attributes = kda_attributes()
    for steps in (1, 19):
        arrays = in_dtype(SPEC, kda_arrays(attributes, [steps, steps // 2], steps), dtype)
        results = run(kda_session(flavour, "softplus", dtype), arrays)
        output, conv, state = results.values()
        expected, expected_conv, expected_state = kda_reference(arrays, attributes)
        assert_close(output, expected, f"op_{dtype}")
        assert_close(state, expected_state)
        assert np.array_equal(conv.astype(np.float64), expected_conv)


@pytest.mark.parametrize("width", [2, 3, 7])
def test_any_convolution_width_runs(width: int) -> None:
    attributes = kda_attributes()
    for flavour in FLAVOURS:
        for steps in (1, width - 1, 9):
            arrays = kda_arrays(attributes, [steps], steps, width=width)
            built = session(op_model(SPEC, body(flavour, attributes, "float32"), attributes, "float32", arrays))
            expected = kda_reference(arrays, attributes)
            for actual, wanted in zip(run(built, arrays).values(), expected, strict=True):
                assert_close(actual, wanted)


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("flavour", FLAVOURS)
def test_checker_and_strict_inference_accept_it_and_the_reference_evaluator_agrees(flavour: Flavour, gate: str) -> None:
    attributes = kda_attributes(gate)
    for steps in (1, 18):
        arrays = kda_arrays(attributes, [steps, steps // 2], steps)
        model = op_model(SPEC, body(flavour, attributes, "float32"), attributes, "float32", arrays)
        check(model)
        fed = {i.name: arrays[i.name] for i in model.graph.input}
        for actual, wanted in zip(
            ReferenceEvaluator(model).run(None, fed), kda_reference(arrays, attributes), strict=True
        ):
            assert_close(actual, wanted)


def test_onnx_runtime_executes_its_fused_kernels_and_folds_the_decay_rate(tmp_path) -> None:  # type: ignore[no-untyped-def]
    attributes = kda_attributes()
    arrays = kda_arrays(attributes, [1], 1)
    graph = executed(op_model(SPEC, body("ort", attributes, "float32"), attributes, "float32", arrays), tmp_path)
    assert "A_log" not in {name for node in graph.node for name in node.input}
    (choice,) = [node for node in graph.node if node.op_type == "If"]
    nodes = {a.name: list(a.g.node) for a in choice.attribute}
    for inner in nodes.values():
        kernels = {f"{n.domain}.{n.op_type}" for n in inner}
        assert {f"com.microsoft.{x}" for x in ("LinearAttention", "CausalConvWithState", "QuickGelu")} <= kernels
    outside = len(graph.node)
    assert outside + len(nodes["then_branch"]) <= 36
    assert outside + len(nodes["else_branch"]) <= 56


def test_no_linear_attention_operator_in_a_primitive_body() -> None:
    functions = body("primitive", kda_attributes(), "float32")
    assert [f.name for f in functions] == [SPEC.name]
    operators = {node.op_type for f in functions for node in f.all_nodes()}
    assert not operators & {"LinearAttention", "CausalConvWithState"}
    assert {node.domain for f in functions for node in f.all_nodes()} == {""}


def test_wrong_requests_are_refused() -> None:
    with pytest.raises(UsageError, match="flavour"):
        body("fast", kda_attributes(), "float32")  # type: ignore[arg-type]
    with pytest.raises(ContractError, match="gate"):
        body("ort", {**kda_attributes(), "gate": "exp"}, "float32")
