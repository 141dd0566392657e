"""QuantizedMixtureOfExperts' function bodies compute what the op says, on ONNX Runtime's kernel and without it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from onnx.reference import ReferenceEvaluator

from kimi_deploy.ops.flavours import FLAVOURS, Flavour
from kimi_deploy.ops.quantized_mixture_of_experts.body import body
from kimi_deploy.ops.quantized_mixture_of_experts.spec import SPEC
from tests.ops.body_cases import assert_close
from tests.ops.op_model import check, executed, op_model, run, session
from tests.ops.quantized_cases import quantized_arrays, quantized_attributes, quantized_reference

FORMATS = [(bits, symmetric, reads) for bits in (4, 8) for symmetric in (0, 1) for reads in ("float32", "int8")]
ROUTINGS = {
    "raw scores": {"renormalize": 0},
    "grouped": {"groups": 4, "kept": 2},
    "every expert chosen": {"experts": 4, "top_k": 4},
    "one of many": {"experts": 32, "top_k": 1},
}


@pytest.mark.parametrize(("bits", "symmetric", "activations"), FORMATS)
@pytest.mark.parametrize("flavour", FLAVOURS)
def test_every_format_matches_float64(flavour: Flavour, bits: int, symmetric: int, activations: str) -> None:
    attributes = quantized_attributes(bits, symmetric, activations)
    functions = body(flavour, attributes, "float32")
    built = session(op_model(SPEC, functions, attributes, "float32", quantized_arrays(attributes, 1, 1)))
    for batch, steps in ((1, 1), (2, 5)):
        arrays = quantized_arrays(attributes, batch, steps)
        (expected,) = quantized_reference(arrays, attributes)
        assert_close(run(built, arrays)["output"], expected)


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("flavour", ["ort", "primitive"])
def test_every_routing_matches_float64(flavour: Flavour, routing: str) -> None:
    attributes = quantized_attributes(**ROUTINGS[routing])
    arrays = quantized_arrays(attributes, 2, 3)
    (expected,) = quantized_reference(arrays, attributes)
    built = session(op_model(SPEC, body(flavour, attributes, "float32"), attributes, "float32", arrays))
    assert_close(run(built, arrays)["output"], expected)


@pytest.mark.parametrize("symmetric", [0, 1])
@pytest.mark.parametrize("bits", [4, 8])
def test_the_file_runs_without_onnx_runtimes_kernel(bits: int, symmetric: int) -> None:
    attributes = quantized_attributes(bits, symmetric, "int8", experts=4, top_k=2)
    arrays = quantized_arrays(attributes, 1, 3)
    model = op_model(SPEC, body("ort", attributes, "float32"), attributes, "float32", arrays)
    check(model)
    names = [i.name for i in model.graph.input]
    (output,) = ReferenceEvaluator(model).run(None, {n: arrays[n] for n in names})
    assert_close(output, quantized_reference(arrays, attributes)[0])


def test_onnx_runtime_executes_its_own_kernel(tmp_path: Path) -> None:
    attributes = quantized_attributes()
    model = op_model(
        SPEC, body("ort", attributes, "float32"), attributes, "float32", quantized_arrays(attributes, 1, 1)
    )
    assert [n.op_type for n in executed(model, tmp_path).node if n.domain == "com.microsoft"].count("QMoE") == 1


def test_rounding_the_inputs_is_visible() -> None:
    """Otherwise the comparisons above could not tell the two kinds of activations apart."""
    arrays = quantized_arrays(quantized_attributes(), 1, 5)
    (plain,), (rounded,) = (
        quantized_reference(arrays, quantized_attributes(activations=a)) for a in ("float32", "int8")
    )
    assert 1e-3 < np.abs(plain - rounded).max() / np.abs(plain).max() < 5e-2
