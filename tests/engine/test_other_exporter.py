"""The hand-made graphs are what they claim to be: valid ONNX that computes the layer's definition."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx.reference import ReferenceEvaluator

from kimi_deploy.validate.compare import compare
from kimi_deploy.validate.tolerances import tolerance
from tests.engine.other_exporter import GatedDeltaNet

LAYER = GatedDeltaNet()


def assert_is_the_layer(results: list[np.ndarray], expected: dict[str, np.ndarray]) -> None:
    for (name, wanted), result in zip(expected.items(), results, strict=True):
        difference = compare(result, wanted)
        assert difference.within(tolerance("float32")), f"{name}: {difference}"


@pytest.mark.parametrize("sequence", [1, 5])
def test_the_opset_27_graph_computes_the_layer(sequence: int) -> None:
    model = LAYER.model("")
    onnx.checker.check_model(model, full_check=True)
    inputs = LAYER.inputs(2, sequence)
    assert_is_the_layer(ReferenceEvaluator(model).run(None, inputs), LAYER.expected(inputs))


@pytest.mark.parametrize("sequence", [1, 5])
def test_the_com_microsoft_graph_computes_the_layer(sequence: int) -> None:
    model = LAYER.model("com.microsoft").SerializeToString()
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    inputs = LAYER.inputs(2, sequence)
    assert_is_the_layer(session.run(None, inputs), LAYER.expected(inputs))
