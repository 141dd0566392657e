"""Calls a plugin as TensorRT does, with its descriptors and with addresses of host memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import ml_dtypes
import numpy as np

from kimi_deploy.engine.backend import Backend, load
from kimi_deploy.engine.plugin import creator_class
from kimi_deploy.engine.plugin_executors import TorchExecutor
from kimi_deploy.engine.plugin_fields import write_fields
from kimi_deploy.ops.plugins import ABI_FIELD, IN_PLACE_FIELD, PLUGINS
from kimi_deploy.ops.spec import AttributeValue, OpSpec

PLUGIN = PLUGINS["KimiDeltaAttention"]
SPEC = PLUGIN.op
ATTRIBUTES: dict[str, AttributeValue] = {
    "num_heads": 2,
    "head_dim": 8,
    "norm_eps": 1e-5,
    "scale": 8**-0.5,
    "gate": "bounded",
    "gate_lower_bound": -4.0,
}
NUMPY = {
    "FLOAT": np.dtype(np.float32),
    "HALF": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "INT32": np.dtype(np.int32),
}


def backend() -> Backend:
    return load("tensorrt-rtx")


FIELDS: dict[str, AttributeValue] = ATTRIBUTES | {ABI_FIELD: SPEC.abi}
"""What the parser finds on a node."""


def creator() -> Any:
    """A creator of KimiDeltaAttention plugins that run on host memory."""
    return creator_class(backend(), PLUGIN)(TorchExecutor("cpu"))


def new_plugin(in_place_state: bool = False) -> Any:
    """A plugin made from fields, as the parser makes it."""
    trt = backend().module
    fields, arrays = write_fields(trt, PLUGIN, FIELDS | ({IN_PLACE_FIELD: 1} if in_place_state else {}))
    plugin = creator().create_plugin("node", fields, trt.TensorRTPhase.BUILD)
    del arrays
    return plugin


def port_dtype(port: Any, dtype: str) -> str:
    return dtype if port.dtype == "T" else {"float32": "FLOAT", "int32": "INT32"}[port.dtype]


def input_arrays(
    dtype: str, batch: int, steps: int, lengths: Sequence[int] | None = None, spec: OpSpec = SPEC
) -> list[np.ndarray]:
    """Random inputs in the order of the ports; without `lengths` the optional port is absent."""
    random = np.random.default_rng(0)
    heads, size = 2, 8
    wide = heads * size
    shapes = {
        "qkv": (batch, steps, 3 * wide),
        "decay": (batch, steps, wide),
        "beta": (batch, steps, heads),
        "output_gate": (batch, steps, wide),
        "conv_weight": (3 * wide, 4),
        "A_log": (heads,),
        "dt_bias": (wide,),
        "norm_weight": (size,),
        "past_conv_state": (batch, 3 * wide, 3),
        "past_recurrent_state": (batch, heads, size, size),
    }
    arrays = [
        random.standard_normal(shapes[p.name]).astype(NUMPY[port_dtype(p, dtype)])
        for p in spec.inputs
        if p.name in shapes
    ]
    return arrays + ([] if lengths is None else [np.array(lengths, np.int32)])


def tensor_desc(array: np.ndarray) -> Any:
    """PluginTensorDesc of an array."""
    trt = backend().module
    desc = trt.PluginTensorDesc()
    desc.dims = array.shape
    desc.type = getattr(trt.DataType, next(name for name, kind in NUMPY.items() if kind == array.dtype))
    desc.format = trt.TensorFormat.LINEAR
    return desc


def dynamic_desc(array: np.ndarray, **bounds: tuple[int, ...]) -> Any:
    """DynamicPluginTensorDesc of an array; `bounds` are min, opt and max where they differ from its shape."""
    desc = backend().module.DynamicPluginTensorDesc()
    desc.desc = tensor_desc(array)
    for name in ("min", "opt", "max"):
        setattr(desc, name, bounds.get(name, array.shape))
    return desc


def enqueue(plugin: Any, inputs: Sequence[np.ndarray], outputs: Sequence[np.ndarray]) -> None:
    """One enqueue on host memory."""
    plugin.enqueue(
        [tensor_desc(a) for a in inputs],
        [tensor_desc(a) for a in outputs],
        [a.ctypes.data for a in inputs],
        [a.ctypes.data for a in outputs],
        0,
        0,
    )


def output_arrays(inputs: Sequence[np.ndarray], dtype: str) -> list[np.ndarray]:
    """Buffers for the outputs, full of NaN: whatever is not written shows."""
    names = [p.name for p in SPEC.inputs]
    symbols = SPEC.bind({n: a.shape for n, a in zip(names, inputs, strict=False)}, ATTRIBUTES)
    shapes = SPEC.output_shapes(symbols)
    return [np.full(s, np.nan, NUMPY[port_dtype(p, dtype)]) for s, p in zip(shapes, SPEC.outputs, strict=True)]
