"""The schemas made from the OpSpecs: checker and shape inference know the ops without a function body."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from kimi_deploy.errors import ContractError
from kimi_deploy.ops.kimi_delta_attention import spec as kda
from kimi_deploy.ops.latent_attention import spec as mla
from kimi_deploy.ops.mixture_of_experts import spec as moe
from kimi_deploy.ops.onnx_schema import register_schemas
from kimi_deploy.ops.quantized_mixture_of_experts import spec as quantized_moe
from kimi_deploy.ops.registry import OPS
from kimi_deploy.ops.spec import DOMAIN, OpSpec
from tests.ops.body_cases import (
    Arrays,
    Attributes,
    in_dtype,
    kda_arrays,
    kda_attributes,
    mla_arrays,
    mla_attributes,
    moe_arrays,
    moe_attributes,
)
from tests.ops.op_model import check, op_model
from tests.ops.quantized_cases import quantized_arrays, quantized_attributes

CASES: dict[str, tuple[OpSpec, Attributes, Arrays]] = {
    "KimiDeltaAttention": (kda.SPEC, kda_attributes(), kda_arrays(kda_attributes(), [5, 5], 5)),
    "LatentAttention": (mla.SPEC, mla_attributes(), mla_arrays(mla_attributes(), [3, 0], [5, 2], 5, 20)),
    "MixtureOfExperts": (moe.SPEC, moe_attributes(), moe_arrays(moe_attributes(), 2, 5)),
    "QuantizedMixtureOfExperts": (
        quantized_moe.SPEC,
        quantized_attributes(),
        quantized_arrays(quantized_attributes(), 2, 5),
    ),
}


def model_of(name: str, dtype: str = "float32", **changes: np.ndarray) -> onnx.ModelProto:
    """One node without a function body; `changes` replace inputs after the graph's interface is made."""
    spec, attributes, arrays = CASES[name]
    model = op_model(spec, [], attributes, dtype, in_dtype(spec, arrays, dtype))  # type: ignore[arg-type]
    for port, array in changes.items():
        for kept in (model.graph.initializer, model.graph.input):
            for old in [v for v in kept if v.name == port]:
                kept.remove(old)
        model.graph.initializer.append(onnx.numpy_helper.from_array(array, port))
    return model


@pytest.fixture(autouse=True)
def registered() -> None:
    register_schemas()
    register_schemas()


def test_every_op_is_cased() -> None:
    assert set(CASES) == set(OPS)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("name", CASES)
def test_shapes_and_types_are_inferred_without_a_body(name: str, dtype: str) -> None:
    model = model_of(name, dtype)
    check(model)
    bare = onnx.ModelProto()
    bare.CopyFrom(model)
    for output in bare.graph.output:
        output.type.tensor_type.ClearField("shape")
    inferred = onnx.shape_inference.infer_shapes(bare, check_type=True, strict_mode=True)
    assert list(inferred.graph.output) == list(model.graph.output)


@pytest.mark.parametrize("name", CASES)
def test_an_attribute_missing_or_unknown_is_refused(name: str) -> None:
    model = model_of(name)
    required = OPS[name].attributes[0].name
    (found,) = [a for a in model.graph.node[0].attribute if a.name == required]
    model.graph.node[0].attribute.remove(found)
    with pytest.raises(onnx.checker.ValidationError, match=required):
        onnx.checker.check_model(model)
    model = model_of(name)
    model.graph.node[0].attribute.append(onnx.helper.make_attribute("speed", 11))
    with pytest.raises(onnx.checker.ValidationError, match="speed"):
        onnx.checker.check_model(model)


@pytest.mark.parametrize(
    ("name", "port", "shape"),
    [
        ("KimiDeltaAttention", "norm_weight", (15,)),
        ("KimiDeltaAttention", "conv_weight", (96,)),
        ("LatentAttention", "kv_b_weight", (160, 41)),
        ("MixtureOfExperts", "down_weight", (16, 32, 25)),
        ("QuantizedMixtureOfExperts", "down_scales", (16, 96, 3)),
    ],
)
def test_a_contradicting_shape_is_refused(name: str, port: str, shape: tuple[int, ...]) -> None:
    model = model_of(name, **{port: np.zeros(shape, np.float32)})
    with pytest.raises(ContractError, match=port):
        onnx.shape_inference.infer_shapes(model, strict_mode=True)


def test_a_wrong_type_is_refused() -> None:
    model = model_of("KimiDeltaAttention", A_log=np.zeros(2, np.float16))
    with pytest.raises(onnx.shape_inference.InferenceError):
        onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True)


def test_plugin_attributes_are_optional_strings() -> None:
    for name in OPS:
        attributes = onnx.defs.get_schema(name, 1, DOMAIN).attributes
        for plugin in ("plugin_namespace", "abi"):
            assert not attributes[plugin].required
            assert attributes[plugin].type == onnx.defs.OpSchema.AttrType.STRING
