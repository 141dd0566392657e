"""KimiDeltaAttention on whole arrays through the C ABI: torch tensors on CUDA, or numpy arrays for the emulated one."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kimi_deploy.errors import ContractError
from kimi_deploy.kernels.abi import DATA_TYPES, GATES, KdaArguments
from kimi_deploy.kernels.arrays import address, bytes_like, dtype_name, num_bytes, place
from kimi_deploy.kernels.library import KernelLibrary
from kimi_deploy.ops.spec import AttributeValue

SNAPSHOT_STEPS = 64
"""Steps between two state snapshots."""

_INT32 = ("sequence_lengths", "cu_seqlens", "slots")
_FLOAT32 = ("A_log", "dt_bias", "past_recurrent_state", "present_recurrent_state", "state_snapshots")


@dataclass(frozen=True)
class KdaKernels:
    """The two calls of the ABI. Arrays are given by name, inputs and outputs together, as in the header.

    Names: the op's ports; `cu_seqlens`, `slots`, `state_snapshots` besides. Outputs are written in place; a present
    state may be its past state. Nothing is copied and nothing but prefill's workspace is allocated.
    """

    library: KernelLibrary

    def decode(self, arrays: Mapping[str, Any], attributes: Mapping[str, AttributeValue], *, stream: int = 0) -> None:
        """Token by token in one launch. Raises ContractError for wrong names, shapes, dtypes or values."""
        self.library.decode(arguments_of(arrays, attributes, stream=stream))

    def prefill(
        self,
        arrays: Mapping[str, Any],
        attributes: Mapping[str, AttributeValue],
        *,
        workspace: Any = None,
        value_splits: int = 0,
        stream: int = 0,
    ) -> None:
        """Tiles of 32 tokens. `workspace`: uint8 array of at least `workspace_size` bytes; allocated when absent.

        Raises ContractError for wrong names, shapes, dtypes or values.
        """
        arguments = arguments_of(arrays, attributes, stream=stream)
        arguments.value_splits = value_splits
        if workspace is None:
            workspace = bytes_like(arrays["output"], self.library.prefill_workspace(arguments))
        arguments.workspace, arguments.workspace_size = address(workspace), num_bytes(workspace)
        self.library.prefill(arguments)

    def workspace_size(self, arrays: Mapping[str, Any], attributes: Mapping[str, AttributeValue]) -> int:
        """Bytes of workspace of a prefill on these arrays."""
        return self.library.prefill_workspace(arguments_of(arrays, attributes))


def arguments_of(
    arrays: Mapping[str, Any], attributes: Mapping[str, AttributeValue], *, stream: int = 0
) -> KdaArguments:
    """The C struct for these arrays; they must outlive its use. Raises ContractError for what does not fit the op."""
    H, D = int(attributes["num_heads"]), int(attributes["head_dim"])
    missing = [name for name in ("qkv", "past_conv_state", "conv_weight", "output") if arrays.get(name) is None]
    if missing:
        raise ContractError("kernel call without a required array", seen=f"no {missing}")
    rows, sequence = arrays["qkv"].shape[:2]
    data_type = dtype_name(arrays["qkv"])
    width = arrays["conv_weight"].shape[1]
    cu_seqlens, slots = arrays.get("cu_seqlens"), arrays.get("slots")
    batch = rows if cu_seqlens is None else cu_seqlens.shape[0] - 1
    entries = batch if slots is None else arrays["past_conv_state"].shape[0]
    snapshots = rows * (sequence // SNAPSHOT_STEPS)
    shapes = {
        "qkv": (rows, sequence, 3 * H * D),
        "decay": (rows, sequence, H * D),
        "beta": (rows, sequence, H),
        "output_gate": (rows, sequence, H * D),
        "conv_weight": (3 * H * D, width),
        "A_log": (H,),
        "dt_bias": (H * D,),
        "norm_weight": (D,),
        "past_conv_state": (entries, 3 * H * D, width - 1),
        "past_recurrent_state": (entries, H, D, D),
        "sequence_lengths": (batch,),
        "cu_seqlens": (batch + 1,),
        "slots": (batch,),
        "output": (rows, sequence, H * D),
        "present_conv_state": (entries, 3 * H * D, width - 1),
        "present_recurrent_state": (entries, H, D, D),
        "state_snapshots": (snapshots, H, D, D),
    }
    unknown = set(arrays) - set(shapes)
    if unknown:
        raise ContractError("kernel call with an unknown array", seen=str(sorted(unknown)), expected=str(list(shapes)))
    if cu_seqlens is not None and rows != 1:
        raise ContractError("a packed batch has one row", seen=f"qkv {tuple(arrays['qkv'].shape)}")
    if data_type not in DATA_TYPES:
        raise ContractError("qkv has a data type no kernel takes", seen=data_type, expected=str(list(DATA_TYPES)))
    arguments = KdaArguments(
        struct_size=ctypes.sizeof(KdaArguments),
        data_type=DATA_TYPES[data_type],
        state_type=DATA_TYPES["float32"],
        gate=GATES[str(attributes["gate"])],
        batch=batch,
        sequence=sequence,
        num_heads=H,
        head_dim=D,
        conv_width=width,
        num_slots=0 if slots is None else entries,
        norm_eps=float(attributes["norm_eps"]),
        scale=float(attributes["scale"]),
        gate_lower_bound=float(attributes["gate_lower_bound"]),
        stream=stream,
    )
    for name, array in arrays.items():
        if array is None:
            continue
        dtype = "int32" if name in _INT32 else "float32" if name in _FLOAT32 else data_type
        place(arguments, name, array, dtype, shapes[name])
    return arguments
