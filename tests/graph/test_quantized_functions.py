"""The functions beside MatMulNBits and GatherBlockQuantized compute what ONNX Runtime's kernels do."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator

from kimi_deploy.onnx.quantize import accuracy_level
from kimi_deploy.onnx.quantized_functions import quantized_functions
from kimi_deploy.ops.flavours import MICROSOFT_DOMAIN, ONNX_OPSET
from kimi_deploy.ops.quantized_mixture_of_experts.reference import rounded
from kimi_deploy.quantization.blocks import dequantize, pack, quantize
from kimi_deploy.quantization.scheme import parse_scheme
from tests.ops.body_cases import assert_close

ROWS, WIDTH, GROUP = 48, 96, 32
SCHEMES = [
    f"int{b},group=32,{s},rtn,activations={a}"
    for b, s, a in (
        (4, "asymmetric", "int8"),
        (4, "symmetric", "float32"),
        (8, "symmetric", "int8"),
        (8, "asymmetric", "float32"),
    )
]


@pytest.mark.parametrize("text", SCHEMES)
def test_both_run_with_and_without_the_kernels(text: str) -> None:
    scheme = parse_scheme(text)
    random = np.random.default_rng(0)
    weight = random.standard_normal((ROWS, WIDTH)).astype(np.float32) + 0.3
    made = quantize(weight, scheme.bits, GROUP, symmetric=scheme.symmetric, method="rtn")
    levels = pack(made.levels, scheme.bits)
    arrays = {"levels": levels, "blocks": levels.reshape(ROWS, WIDTH // GROUP, -1), "scales": made.scales}
    optional = []
    if not scheme.symmetric:
        arrays["zeros"] = pack(made.zero_points, scheme.bits)
        optional = ["zeros"]
    shared = {"bits": scheme.bits, "block_size": GROUP, "domain": MICROSOFT_DOMAIN}
    product = {"K": WIDTH, "N": ROWS, "accuracy_level": accuracy_level(scheme)}
    nodes = [
        helper.make_node("MatMulNBits", ["x", "blocks", "scales", *optional], ["y"], **product, **shared),
        helper.make_node(
            "GatherBlockQuantized",
            ["levels", "ids", "scales", *optional],
            ["rows"],
            quantize_axis=1,
            gather_axis=0,
            **shared,
        ),
    ]
    graph = helper.make_graph(
        nodes,
        "products",
        [
            helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", "sequence", WIDTH]),
            helper.make_tensor_value_info("ids", TensorProto.INT64, ["batch", "sequence"]),
        ],
        [
            helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", "sequence", ROWS]),
            helper.make_tensor_value_info("rows", TensorProto.FLOAT, ["batch", "sequence", WIDTH]),
        ],
        [onnx.numpy_helper.from_array(a, n) for n, a in arrays.items()],
    )
    opsets = [helper.make_opsetid("", ONNX_OPSET), helper.make_opsetid(MICROSOFT_DOMAIN, 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=12)
    model.functions.extend(ir.to_proto(f) for f in quantized_functions(scheme))
    onnx.checker.check_model(model, full_check=True)

    inputs = {
        "x": random.standard_normal((2, 3, WIDTH)).astype(np.float32),
        "ids": random.integers(0, ROWS, (2, 3)),
    }
    plain = dequantize(made, GROUP).astype(np.float64)
    x = torch.from_numpy(inputs["x"])
    read = (rounded(x, GROUP) if scheme.activations == "int8" else x).double().numpy()
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    for y, rows in (session.run(None, inputs), ReferenceEvaluator(model).run(None, inputs)):
        assert_close(y, read @ plain.T)
        assert_close(rows, plain[inputs["ids"]])
