"""MixtureOfExperts' function bodies route and compute as the op does."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx.reference import ReferenceEvaluator

from kimi_deploy.ops.flavours import FLAVOURS, Flavour
from kimi_deploy.ops.mixture_of_experts import body_engine, body_experts
from kimi_deploy.ops.mixture_of_experts.body import body
from kimi_deploy.ops.mixture_of_experts.spec import SPEC
from tests.ops.body_cases import assert_close, in_dtype, moe_arrays, moe_attributes, moe_reference
from tests.ops.op_model import check, executed, op_model, run, session

ROUTINGS = {
    "plain": moe_attributes(),
    "raw scores": moe_attributes(renormalize=0),
    "grouped": moe_attributes(groups=4, kept=2),
    "grouped raw scores": moe_attributes(groups=8, kept=3, renormalize=0),
    "all groups kept": moe_attributes(groups=4, kept=4),
    "every expert chosen": moe_attributes(experts=4, top_k=4),
    "one expert": moe_attributes(experts=1, top_k=1),
    "one of many": moe_attributes(experts=32, top_k=1),
}


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("flavour", FLAVOURS)
def test_every_routing_matches_float64(flavour: Flavour, routing: str) -> None:
    attributes = ROUTINGS[routing]
    functions = body(flavour, attributes, "float32")
    built = session(op_model(SPEC, functions, attributes, "float32", moe_arrays(attributes, 1, 1)))
    for batch, steps in ((1, 1), (1, 2), (3, 1), (3, 17), (1, 130)):
        arrays = moe_arrays(attributes, batch, steps)
        (expected,) = moe_reference(arrays, attributes)
        assert_close(run(built, arrays)["output"], expected)


@pytest.mark.parametrize("bound", [0, 1 << 15])
def test_both_forms_of_many_tokens_of_an_engine_match_float64(bound: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(body_engine, "BATCHED_ROWS", bound)
    attributes = ROUTINGS["grouped raw scores"]
    arrays = moe_arrays(attributes, 3, 17)
    model = op_model(SPEC, body("primitive", attributes, "float32"), attributes, "float32", arrays)
    (expected,) = moe_reference(arrays, attributes)
    assert_close(run(session(model), arrays)["output"], expected)


@pytest.mark.parametrize("renormalize", [0, 1])
@pytest.mark.parametrize("shift", [-30.0, -50.0, 40.0])
@pytest.mark.parametrize("flavour", FLAVOURS)
def test_vanishing_and_saturated_scores_are_weighed_as_the_op_says(
    flavour: Flavour, shift: float, renormalize: int
) -> None:
    attributes = moe_attributes(experts=8, top_k=8, renormalize=renormalize)
    arrays = moe_arrays(attributes, 1, 5, shift)
    built = session(op_model(SPEC, body(flavour, attributes, "float32"), attributes, "float32", arrays))
    (expected,) = moe_reference(arrays, attributes)
    assert_close(run(built, arrays)["output"], expected)


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_scores_that_underflow_to_zero_choose_nobody(flavour: Flavour) -> None:
    attributes = moe_attributes()
    arrays = moe_arrays(attributes, 1, 3, -200.0)
    built = session(op_model(SPEC, body(flavour, attributes, "float32"), attributes, "float32", arrays))
    assert not run(built, arrays)["output"].any()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_only_rounds(dtype: str) -> None:
    attributes = moe_attributes()
    # ONNX Runtime's CPU has no bfloat16 products; the ort body makes none
    for flavour in FLAVOURS if dtype == "float16" else ("ort",):
        for steps in (1, 19):
            arrays = in_dtype(SPEC, moe_arrays(attributes, 2, steps), dtype)
            built = session(op_model(SPEC, body(flavour, attributes, dtype), attributes, dtype, arrays))
            (expected,) = moe_reference(arrays, attributes)
            assert_close(run(built, arrays)["output"], expected, f"op_{dtype}")


@pytest.mark.parametrize("routing", ["plain", "grouped raw scores", "every expert chosen"])
@pytest.mark.parametrize("flavour", FLAVOURS)
def test_checker_and_strict_inference_accept_it_and_the_reference_evaluator_agrees(
    flavour: Flavour, routing: str
) -> None:
    attributes = ROUTINGS[routing]
    for steps in (1, 18):
        arrays = moe_arrays(attributes, 2, steps)
        model = op_model(SPEC, body(flavour, attributes, "float32"), attributes, "float32", arrays)
        check(model)
        (output,) = ReferenceEvaluator(model).run(None, {"hidden_states": arrays["hidden_states"]})
        (expected,) = moe_reference(arrays, attributes)
        assert_close(output, expected)


def test_onnx_runtime_executes_its_fused_kernel_but_for_a_single_token(tmp_path: Path) -> None:
    attributes = moe_attributes()
    arrays = moe_arrays(attributes, 1, 1)
    graph = executed(op_model(SPEC, body("ort", attributes, "float32"), attributes, "float32", arrays), tmp_path)
    (branches,) = [node.attribute for node in graph.node if node.op_type == "If"]
    operators = {branch.name: [f"{n.domain}.{n.op_type}" for n in branch.g.node] for branch in branches}
    # 4 experts: gate and up of two at a time, down of all
    assert operators["then_branch"].count(".Gather") == 3
    assert ".Gather" not in operators["else_branch"]
    assert "com.microsoft.MoE" in operators["else_branch"]


def test_onnx_runtime_keeps_no_second_copy_of_the_experts(tmp_path: Path) -> None:
    attributes = moe_attributes()
    arrays = moe_arrays(attributes, 1, 1)
    graph = executed(op_model(SPEC, body("ort", attributes, "float32"), attributes, "float32", arrays), tmp_path)
    graphs = [graph, *(a.g for node in graph.node for a in node.attribute if a.type == onnx.AttributeProto.GRAPH)]
    elements = [int(np.prod(t.dims)) for g in graphs for t in g.initializer]
    assert sum(n >= arrays["down_weight"].size for n in elements) == 2


@pytest.mark.parametrize("intermediate", [25, 26])
def test_a_single_token_is_right_where_experts_do_not_divide_into_blocks(intermediate: int) -> None:
    attributes = moe_attributes() | {"intermediate": intermediate}
    arrays = moe_arrays(attributes, 1, 1)
    built = session(op_model(SPEC, body("ort", attributes, "float32"), attributes, "float32", arrays))
    (expected,) = moe_reference(arrays, attributes)
    assert_close(run(built, arrays)["output"], expected)


def test_a_single_token_with_large_experts_takes_the_kernel(monkeypatch) -> None:  # type: ignore[no-untyped-def]
    attributes = moe_attributes()
    arrays = moe_arrays(attributes, 1, 1)
    outputs = []
    for cached in (body_experts.CACHED_BYTES, 0):
        monkeypatch.setattr(body_experts, "CACHED_BYTES", cached)
        built = session(op_model(SPEC, body("ort", attributes, "float32"), attributes, "float32", arrays))
        outputs.append(run(built, arrays)["output"])
    (expected,) = moe_reference(arrays, attributes)
    assert_close(outputs[0], expected)
    assert_close(outputs[1], expected)
    assert not np.array_equal(*outputs)


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_a_decode_step_reads_no_expert_that_is_not_chosen(flavour: Flavour) -> None:
    """NaN in the others' weights: a product that only weighs them with zero would pass it on, as that of many does."""
    attributes = moe_attributes(experts=16, top_k=2)
    arrays = moe_arrays(attributes, 1, 1)
    arrays["router_bias"] = np.where(np.arange(16) < 2, 9, 0).astype(np.float32)
    (expected,) = moe_reference(arrays, attributes)
    for name in ("gate_up_weight", "down_weight"):
        arrays[name][2:] = np.nan
    built = session(op_model(SPEC, body(flavour, attributes, "float32"), attributes, "float32", arrays))
    assert_close(run(built, arrays)["output"], expected)
    many = arrays | {"hidden_states": np.repeat(arrays["hidden_states"], 40, 1)}
    if flavour == "primitive":
        assert np.isnan(run(built, many)["output"]).any()


def test_an_expert_that_overflows_but_is_not_chosen_does_not_matter() -> None:
    attributes = moe_attributes(experts=4, top_k=1)
    arrays = moe_arrays(attributes, 1, 40)
    arrays["router_bias"] = np.array([9, 0, 0, 0], np.float32)
    (expected,) = moe_reference(arrays, attributes)
    arrays["gate_up_weight"][1:] *= 1e30
    for flavour in FLAVOURS:
        built = session(op_model(SPEC, body(flavour, attributes, "float32"), attributes, "float32", arrays))
        assert_close(run(built, arrays)["output"], expected)
