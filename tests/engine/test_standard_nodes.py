"""Standard nodes of other exporters: rewritten where TensorRT's parser needs it, with the same results; imported."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from onnx import helper
from onnx.reference import ReferenceEvaluator

from kimi_deploy.engine.backend import Backend, load
from kimi_deploy.engine.network import plugin_layers
from kimi_deploy.engine.plugin_registry import register_plugins
from kimi_deploy.engine.standard_nodes import ask_for_plugins, prepare_standard_nodes
from kimi_deploy.errors import ContractError
from tests.capabilities import needs_tensorrt_rtx
from tests.engine.other_exporter import DOMAINS, Domain, GatedDeltaNet, one_node
from tests.kernels.onnx_cases import CLASSES, OnnxCase, onnx_cases
from tests.kernels.standard_cases import causal_conv_case, causal_conv_oracle

CASES = [pytest.param(case, id=case.name) for op_type in CLASSES for case in onnx_cases(op_type)]
LAYER = GatedDeltaNet()


def prepared(model: onnx.ModelProto) -> onnx.ModelProto:
    changed = ir.from_proto(model)
    assert prepare_standard_nodes(changed) >= 1
    return ir.to_proto(changed)


def parse(backend: Backend, model: onnx.ModelProto) -> dict[str, int]:
    """The plugin layers of the network; the parse must succeed."""
    trt = backend.module
    builder = trt.Builder(backend.logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, backend.logger)
    parsed = parser.parse(model.SerializeToString())
    assert parsed, [parser.get_error(i).desc() for i in range(parser.num_errors)]
    return plugin_layers(backend, network)


@pytest.fixture(scope="module")
def backend() -> Backend:
    loaded = load("tensorrt-rtx")
    register_plugins(loaded)
    return loaded


@pytest.mark.parametrize("case", CASES)
def test_a_prepared_case_gives_the_expected_results(case: OnnxCase) -> None:
    model = prepared(case.model)
    onnx.checker.check_model(model, full_check=True)
    results = ReferenceEvaluator(model).run(None, {i.name: case.inputs[i.name] for i in model.graph.input})
    for result, expected in zip(results, case.outputs.values(), strict=True):
        assert result.dtype == expected.dtype
        np.testing.assert_allclose(result, expected, rtol=case.rtol, atol=case.atol)


def asking(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model as `build-engine` gives it to the parser: the nodes name their plugin."""
    changed = ir.from_proto(model)
    prepare_standard_nodes(changed)
    ask_for_plugins(changed)
    return ir.to_proto(changed)


@needs_tensorrt_rtx
@pytest.mark.parametrize("case", CASES)
def test_a_prepared_case_is_imported_as_a_plugin(backend: Backend, case: OnnxCase) -> None:
    """By TensorRT-RTX's importers of these operators, and by what every parser does with a plugin's name."""
    op_type = case.model.graph.node[0].op_type
    assert parse(backend, prepared(case.model)) == {op_type: 1}
    assert parse(backend, asking(case.model)) == {op_type: 1}


@needs_tensorrt_rtx
def test_a_node_that_names_its_plugin_does_not_go_through_an_importer(backend: Backend) -> None:
    """The importer wants an axis count of 1 and says so; the plugin of the name is never asked about it."""
    arrays, _ = causal_conv_case()
    model = conv_model(arrays, ndim=2)
    trt = backend.module

    def errors(model: onnx.ModelProto) -> str:
        network = trt.Builder(backend.logger).create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
        parser = trt.OnnxParser(network, backend.logger)
        parser.parse(model.SerializeToString())
        return " ".join(parser.get_error(i).desc() for i in range(parser.num_errors))

    assert "only ndim=1" in errors(model)
    named = ir.from_proto(model)
    ask_for_plugins(named)
    assert "only ndim=1" not in errors(ir.to_proto(named))


def test_nodes_in_functions_and_branches_are_counted_once_per_call() -> None:
    body = helper.make_function(
        "other",
        "Layer",
        ["x", "w"],
        ["y"],
        [helper.make_node("CausalConvWithState", ["x", "w"], ["y", "s"])],
        [helper.make_opsetid("", 27)],
    )
    value = [helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, [1, 2, 3]) for n in ("x", "w", "b")]
    calls = [helper.make_node("Layer", [a, "w"], [b], domain="other") for a, b in (("x", "a"), ("a", "b"))]
    graph = helper.make_graph(calls, "calls", value[:2], value[2:])
    opsets = [helper.make_opsetid("", 27), helper.make_opsetid("other", 1)]
    model = ir.from_proto(helper.make_model(graph, functions=[body], opset_imports=opsets))
    assert prepare_standard_nodes(model) == 1
    assert ask_for_plugins(model) == {"CausalConvWithState": 2}


@needs_tensorrt_rtx
@pytest.mark.parametrize("domain", DOMAINS)
@pytest.mark.parametrize("dtype", [onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16])
def test_a_layer_of_another_exporter_is_imported(backend: Backend, domain: Domain, dtype: int) -> None:
    assert parse(backend, LAYER.model(domain, dtype)) == {"LinearAttention": 1, "CausalConvWithState": 1}


def test_nodes_that_need_nothing_stay_as_they_are() -> None:
    model = LAYER.model("")
    assert prepared(model).graph.node == ir.to_proto(ir.from_proto(model)).graph.node


def conv_model(arrays: dict[str, np.ndarray], **attributes: Any) -> onnx.ModelProto:
    outputs = {"output": arrays["input"], "present_state": arrays["past_state"]}
    return one_node("CausalConvWithState", "com.microsoft", arrays, outputs, activation="silu", **attributes)


def test_channels_last_becomes_transposes() -> None:
    arrays, attributes = causal_conv_case(bias=False)
    expected = causal_conv_oracle(arrays, attributes)
    last = {n: np.ascontiguousarray(a.swapaxes(1, 2)) if n != "weight" else a for n, a in arrays.items()}
    model = prepared(conv_model(last, channels_last=1))
    assert [n.op_type for n in model.graph.node].count("Transpose") == 4
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    for result, wanted in zip(session.run(None, last), expected.values(), strict=True):
        np.testing.assert_allclose(result, wanted.swapaxes(1, 2), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("name", "value"), [("dilation", 2), ("ndim", 2), ("state_window", 1)])
def test_what_the_parser_would_drop_in_silence_is_refused(name: str, value: int) -> None:
    arrays, _ = causal_conv_case()
    model = ir.from_proto(conv_model(arrays, **{name: value}))
    with pytest.raises(ContractError, match=f"{name} = {value}"):
        prepare_standard_nodes(model)
