"""The cases of the installed onnx package for LinearAttention and CausalConvWithState, on the kernels."""

import numpy as np
import pytest

from .onnx_cases import CLASSES, exported_names, onnx_cases
from .standard_cases import run_causal_conv, run_linear_attention

RUN = {"LinearAttention": run_linear_attention, "CausalConvWithState": run_causal_conv}


@pytest.mark.parametrize("op_type", CLASSES)
def test_no_case_is_left_out(op_type):
    assert {case.name for case in onnx_cases(op_type)} == exported_names(op_type)


@pytest.mark.parametrize(
    ("op_type", "case"), [pytest.param(op, case, id=case.name) for op in CLASSES for case in onnx_cases(op)]
)
def test_a_case_of_the_onnx_package(device, op_type, case):
    results = RUN[op_type](device, case.inputs, case.attributes)
    assert set(results) == set(case.outputs)
    for name, expected in case.outputs.items():
        assert results[name].dtype == expected.dtype
        # the bounds are the case's own
        np.testing.assert_allclose(results[name], expected, rtol=case.rtol, atol=case.atol, err_msg=name)
