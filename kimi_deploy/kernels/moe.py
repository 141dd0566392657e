"""MixtureOfExperts on arrays of torch or numpy, by the kernel library."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from math import prod
from typing import Any

from kimi_deploy.errors import ContractError
from kimi_deploy.kernels.abi import DATA_TYPES, MoeArguments
from kimi_deploy.kernels.arrays import address, bytes_like, dtype_name, num_bytes, place
from kimi_deploy.kernels.library import KernelLibrary
from kimi_deploy.ops.spec import AttributeValue


class MoeKernels:
    """The op's ports by name, as in its OpSpec, with `output` to be written; arrays where the library runs."""

    def __init__(self, library: KernelLibrary) -> None:
        self.library = library

    def run(
        self,
        arrays: Mapping[str, Any],
        attributes: Mapping[str, AttributeValue],
        *,
        workspace: Any = None,
        stream: int = 0,
    ) -> None:
        """The whole op; `workspace` is an array of at least `workspace_size` bytes, by default a new one.

        Raises ContractError for wrong names, shapes, dtypes or values, BackendError for a failed launch.
        """
        arguments = moe_arguments(arrays, attributes, stream=stream)
        if workspace is None:
            workspace = bytes_like(arrays["output"], self._workspace_size(arguments))
        arguments.workspace, arguments.workspace_size = address(workspace), num_bytes(workspace)
        self.library.call("kimi_moe", arguments)

    def workspace_size(self, arrays: Mapping[str, Any], attributes: Mapping[str, AttributeValue]) -> int:
        """Bytes of workspace of a call on these arrays."""
        return self._workspace_size(moe_arguments(arrays, attributes))

    def _workspace_size(self, arguments: MoeArguments) -> int:
        return self.library.workspace_size("kimi_moe_workspace", arguments)


def moe_arguments(
    arrays: Mapping[str, Any], attributes: Mapping[str, AttributeValue], *, stream: int = 0
) -> MoeArguments:
    """The C struct for these arrays, without workspace; they must outlive its use. ContractError for a misfit."""
    x = arrays["hidden_states"]
    if len(x.shape) != 3:
        raise ContractError("kernel call: hidden_states does not fit", seen=str(tuple(x.shape)), expected="rank 3")
    dtype, hidden = dtype_name(x), int(x.shape[2])
    if dtype not in DATA_TYPES:
        raise ContractError("hidden_states has a data type no kernel takes", seen=dtype, expected=str(list(DATA_TYPES)))
    experts, inner = int(attributes["num_experts"]), int(attributes["intermediate"])
    arguments = MoeArguments(
        struct_size=ctypes.sizeof(MoeArguments),
        data_type=DATA_TYPES[dtype],
        tokens=prod(x.shape[:2]),
        hidden=hidden,
        stream=stream,
        **attributes,
    )
    for name, shape in {
        "hidden_states": tuple(x.shape),
        "router_weight": (experts, hidden),
        "router_bias": (experts,),
        "gate_up_weight": (experts, 2 * inner, hidden),
        "down_weight": (experts, hidden, inner),
        "output": tuple(x.shape),
    }.items():
        place(arguments, name, arrays[name], "float32" if name == "router_bias" else dtype, shape)
    return arguments
