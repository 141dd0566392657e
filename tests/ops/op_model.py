"""A model of one op node with its function body, and ways to run it: for the tests of bodies."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime

from kimi_deploy.contract import Dtype
from kimi_deploy.ops.flavours import MICROSOFT_DOMAIN, MICROSOFT_OPSET, ONNX_OPSET
from kimi_deploy.ops.spec import DOMAIN, DOMAIN_VERSION, AttributeValue, OpSpec
from kimi_deploy.runtime.ort_kernels import OrtKernels

NUMPY_DTYPES = {
    "float32": np.dtype("float32"),
    "float16": np.dtype("float16"),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}
DYNAMIC = ("batch", "sequence", "capacity")


def op_model(
    spec: OpSpec,
    functions: Sequence[ir.Function],
    attributes: Mapping[str, AttributeValue],
    dtype: Dtype,
    arrays: Mapping[str, np.ndarray],
    *,
    dynamic: Sequence[str] = DYNAMIC,
) -> onnx.ModelProto:
    """One node on the ports of `spec`, absent ones without an array.

    Ports without a dynamic dimension become initializers from `arrays`.
    """
    symbols = spec.bind({name: a.shape for name, a in arrays.items()}, attributes)

    def info(port, shape):  # type: ignore[no-untyped-def]
        kind = port.dtype if port.dtype != "T" else dtype
        dims = [d if d in dynamic else size for d, size in zip(port.dims, shape, strict=True)]
        element = onnx.helper.np_dtype_to_tensor_dtype(NUMPY_DTYPES[kind] if kind in NUMPY_DTYPES else np.dtype(kind))
        return onnx.helper.make_tensor_value_info(port.name, element, dims)

    inputs, initializers = [], []
    for port in spec.inputs:
        if port.name not in arrays:
            continue
        if any(d in DYNAMIC for d in port.dims):
            inputs.append(info(port, arrays[port.name].shape))
        else:
            initializers.append(onnx.numpy_helper.from_array(arrays[port.name], port.name))
    outputs = [info(port, shape) for port, shape in zip(spec.outputs, spec.output_shapes(symbols), strict=True)]
    node = onnx.helper.make_node(
        spec.name,
        [p.name if p.name in arrays else "" for p in spec.inputs],
        [p.name for p in spec.outputs],
        domain=DOMAIN,
        plugin_namespace=DOMAIN,
        abi=spec.abi,
        **attributes,
    )
    model = onnx.helper.make_model(
        onnx.helper.make_graph([node], "op", inputs, outputs, initializers),
        opset_imports=[
            onnx.helper.make_opsetid("", ONNX_OPSET),
            onnx.helper.make_opsetid(MICROSOFT_DOMAIN, MICROSOFT_OPSET),
            onnx.helper.make_opsetid(DOMAIN, DOMAIN_VERSION),
        ],
        ir_version=onnx.IR_VERSION if onnx.IR_VERSION < 13 else 12,
    )
    model.functions.extend(ir.to_proto(f) for f in functions)
    return model


def session(
    model: onnx.ModelProto, *, threads: int = 1, optimized: str = "", kernels: OrtKernels | None = None
) -> onnxruntime.InferenceSession:
    """A CPU session; `optimized` is where to write the graph that ONNX Runtime will execute."""
    options = onnxruntime.SessionOptions()
    if kernels is not None:
        kernels.register(options)
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    if optimized:
        options.optimized_model_filepath = optimized
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def run(session_: onnxruntime.InferenceSession, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The op's outputs by name; inputs that are initializers of the model are left out."""
    wanted = {i.name for i in session_.get_inputs()}
    binding = session_.io_binding()
    kept = []
    for name, a in arrays.items():
        if name in wanted:
            kept.append(_value(a))
            binding.bind_ortvalue_input(name, kept[-1])
    for output in session_.get_outputs():
        binding.bind_output(output.name)
    session_.run_with_iobinding(binding)
    return {
        output.name: _array(value) for output, value in zip(session_.get_outputs(), binding.get_outputs(), strict=True)
    }


def _value(a: np.ndarray) -> onnxruntime.OrtValue:
    if a.dtype == ml_dtypes.bfloat16:
        return onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(a.view(np.uint16), onnx.TensorProto.BFLOAT16)
    return onnxruntime.OrtValue.ortvalue_from_numpy(a)


def _array(value: onnxruntime.OrtValue) -> np.ndarray:
    """A copy; numpy() does not know bfloat16."""
    if value.element_type() != onnx.TensorProto.BFLOAT16:
        return value.numpy()
    shape = tuple(value.shape())
    raw = (ctypes.c_uint16 * int(np.prod(shape))).from_address(value.data_ptr())
    return np.frombuffer(raw, dtype=ml_dtypes.bfloat16).reshape(shape).copy()


def check(model: onnx.ModelProto) -> None:
    """Full checker and strict shape inference with data propagation."""
    onnx.checker.check_model(model, full_check=True)
    onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True, data_prop=True)


def executed(model: onnx.ModelProto, folder: Path) -> onnx.GraphProto:
    """The graph that ONNX Runtime executes, after inlining and optimisation."""
    path = folder / "optimized.onnx"
    session(model, optimized=str(path))
    return onnx.load(path).graph
