"""The weights that our CPU kernels read, in memory of ours on huge pages.

ONNX Runtime hands a kernel its weights where it has put them, in small pages mostly. A decode step reads each once, and
looking up small pages then takes longer than reading.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from kimi_deploy.ops.spec import DOMAIN
from kimi_deploy.runtime.huge_pages import MOST_BYTES, huge_buffer

_ALIGNMENT = 64


def kernel_weights(
    model: onnx.ModelProto,
    transposed: Mapping[str, str],
    sources: Mapping[str, TensorProto],
    folder: Path,
    ops: Collection[str],
) -> dict[str, np.ndarray]:
    """Arrays of the weights of `transposed`, which says of which of `sources` each is the transpose.

    And, where all together are at most MOST_BYTES, of the initializers with data outside of the graph that nodes of
    `ops` read and no other node does. Larger ones stay in the files, where a kernel reads no more than the experts that
    are chosen. `folder` is where the data is.
    """
    others = {
        name for node in model.graph.node if node.domain != DOMAIN or node.op_type not in ops for name in node.input
    }
    wanted = {
        i.name: i
        for i in model.graph.initializer
        if i.name in transposed or (i.data_location == TensorProto.EXTERNAL and i.name not in others)
    }
    sizes = {name: _bytes(i) for name, i in wanted.items()}
    if sum(sizes.values()) > MOST_BYTES:
        sizes = {name: size for name, size in sizes.items() if name in transposed}
    memory = huge_buffer(sum(-(-size // _ALIGNMENT) * _ALIGNMENT for size in sizes.values()))
    arrays, begin = {}, 0
    for name, size in sizes.items():
        declared = wanted[name]
        dtype = helper.tensor_dtype_to_np_dtype(declared.data_type)
        array = memory[begin : begin + size].view(dtype).reshape(tuple(declared.dims))
        begin += -(-size // _ALIGNMENT) * _ALIGNMENT
        if name in transposed:
            np.copyto(array, _loaded(sources[transposed[name]], folder).T)
        else:
            np.copyto(array, _loaded(declared, folder))
        arrays[name] = array
    return arrays


def _bytes(tensor: TensorProto) -> int:
    count = int(np.prod(tensor.dims, dtype=np.int64))
    return count * int(helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize)


def _loaded(tensor: TensorProto, folder: Path) -> np.ndarray:
    """A view of the data where it is: a copy would stay in the process's heap."""
    if tensor.data_location != TensorProto.EXTERNAL:
        return numpy_helper.to_array(tensor)
    place = {entry.key: entry.value for entry in tensor.external_data}
    dtype = helper.tensor_dtype_to_np_dtype(tensor.data_type)
    return np.memmap(folder / place["location"], dtype, "r", int(place.get("offset", 0)), tuple(tensor.dims))
