"""The standard's LinearAttention and CausalConvWithState (ai.onnx, opset 27) on whole arrays through the C ABI.

Arrays are given by the schemas' port names, inputs and outputs together; an optional input that is absent is left out
or None. Attributes are the schemas', by name; what is left out has the schema's default.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kimi_deploy.errors import ContractError
from kimi_deploy.kernels.abi import (
    ACTIVATIONS,
    DATA_TYPES,
    UPDATE_RULES,
    CausalConvArguments,
    LinearAttentionArguments,
)
from kimi_deploy.kernels.arrays import address, bytes_like, dtype_name, num_bytes, place
from kimi_deploy.kernels.library import KernelLibrary
from kimi_deploy.ops.spec import AttributeValue, OpSpec
from kimi_deploy.ops.standard import CAUSAL_CONV_WITH_STATE, LINEAR_ATTENTION, OptionalAttribute


@dataclass(frozen=True)
class StandardKernels:
    """The two operators. Outputs are written in place; a present state may be its past state."""

    library: KernelLibrary

    def linear_attention(
        self,
        arrays: Mapping[str, Any],
        attributes: Mapping[str, AttributeValue],
        *,
        workspace: Any = None,
        stream: int = 0,
    ) -> None:
        """`workspace`: uint8 array of at least `workspace_size` bytes; allocated when absent.

        Raises ContractError for wrong names, shapes, dtypes or values.
        """
        arguments = linear_attention_arguments(arrays, attributes, stream=stream)
        if workspace is None:
            workspace = bytes_like(arrays["output"], self._workspace_size(arguments))
        arguments.workspace, arguments.workspace_size = address(workspace), num_bytes(workspace)
        self.library.call("kimi_linear_attention", arguments)

    def workspace_size(self, arrays: Mapping[str, Any], attributes: Mapping[str, AttributeValue]) -> int:
        """Bytes of workspace of `linear_attention` on these arrays."""
        return self._workspace_size(linear_attention_arguments(arrays, attributes))

    def causal_conv(
        self, arrays: Mapping[str, Any], attributes: Mapping[str, AttributeValue], *, stream: int = 0
    ) -> None:
        """Raises ContractError for wrong names, shapes, dtypes or values."""
        self.library.call("kimi_causal_conv", causal_conv_arguments(arrays, attributes, stream=stream))

    def _workspace_size(self, arguments: LinearAttentionArguments) -> int:
        return self.library.workspace_size("kimi_linear_attention_workspace", arguments)


def linear_attention_arguments(
    arrays: Mapping[str, Any], attributes: Mapping[str, AttributeValue], *, stream: int = 0
) -> LinearAttentionArguments:
    """The C struct for these arrays; they must outlive its use. Raises ContractError for what does not fit.

    The number of key heads is read off `key`: `com.microsoft` nodes may have fewer of them than states.
    """
    given = _given(arrays, ("query", "key", "value", "output", "present_state"), ("past_state", "decay", "beta"))
    attributes = _defaults(LINEAR_ATTENTION) | dict(attributes)
    for name in ("q_num_heads", "kv_num_heads"):
        if int(attributes.get(name, 0)) < 1:
            raise ContractError(
                f"LinearAttention needs {name}", seen=str(attributes.get(name)), expected="a positive number"
            )
    queries, states = int(attributes["q_num_heads"]), int(attributes["kv_num_heads"])
    batch, steps, query_width = _rank(given, "query", 3)
    key_width, value_width = _rank(given, "key", 3)[2], _rank(given, "value", 3)[2]
    if query_width % queries or query_width == 0:
        raise ContractError("query does not divide into heads", seen=f"{query_width} values for {queries} heads")
    K = query_width // queries
    if key_width % K or value_width % states:
        raise ContractError(
            "key and value do not divide into heads",
            seen=f"key {key_width}, value {value_width}",
            expected=f"multiples of {K}, the key size of query's {queries} heads, and of {states} heads",
        )
    keys, V = key_width // K, value_width // states
    decay, beta = given.get("decay"), given.get("beta")
    per_key = decay is not None and K > 1 and _rank(given, "decay", 3)[2] == states * K
    beta_heads = 1 if beta is not None and _rank(given, "beta", 3)[2] == 1 else states
    data_type, state_type = _dtype(given, "query"), _dtype(given, "present_state")
    arguments = LinearAttentionArguments(
        struct_size=ctypes.sizeof(LinearAttentionArguments),
        data_type=DATA_TYPES[data_type],
        state_type=DATA_TYPES[state_type],
        update_rule=_choice(attributes, "update_rule", UPDATE_RULES),
        batch=batch,
        sequence=steps,
        q_num_heads=queries,
        kv_num_heads=states,
        key_num_heads=keys,
        key_dim=K,
        value_dim=V,
        decay_per_key=int(per_key),
        beta_num_heads=beta_heads,
        scale=float(attributes["scale"]),
        stream=stream,
    )
    shapes = {
        "query": (batch, steps, queries * K),
        "key": (batch, steps, keys * K),
        "value": (batch, steps, states * V),
        "past_state": (batch, states, K, V),
        "decay": (batch, steps, states * K if per_key else states),
        "beta": (batch, steps, beta_heads),
        "output": (batch, steps, max(queries, states) * V),
        "present_state": (batch, states, K, V),
    }
    for name, array in given.items():
        place(arguments, name, array, state_type if name.endswith("_state") else data_type, shapes[name])
    return arguments


def causal_conv_arguments(
    arrays: Mapping[str, Any], attributes: Mapping[str, AttributeValue], *, stream: int = 0
) -> CausalConvArguments:
    """The C struct for these arrays; they must outlive its use. Raises ContractError for what does not fit."""
    given = _given(arrays, ("input", "weight", "output", "present_state"), ("bias", "past_state"))
    batch, channels, steps = _rank(given, "input", 3)
    width = _rank(given, "weight", 3)[2]
    data_type = _dtype(given, "input")
    arguments = CausalConvArguments(
        struct_size=ctypes.sizeof(CausalConvArguments),
        data_type=DATA_TYPES[data_type],
        activation=_choice(_defaults(CAUSAL_CONV_WITH_STATE) | dict(attributes), "activation", ACTIVATIONS),
        batch=batch,
        channels=channels,
        sequence=steps,
        width=width,
        stream=stream,
    )
    shapes = {
        "input": (batch, channels, steps),
        "weight": (channels, 1, width),
        "bias": (channels,),
        "past_state": (batch, channels, width - 1),
        "output": (batch, channels, steps),
        "present_state": (batch, channels, width - 1),
    }
    for name, array in given.items():
        place(arguments, name, array, data_type, shapes[name])
    return arguments


def _defaults(op: OpSpec) -> dict[str, AttributeValue]:
    return {a.name: a.default for a in op.attributes if isinstance(a, OptionalAttribute)}


def _given(arrays: Mapping[str, Any], required: tuple[str, ...], optional: tuple[str, ...]) -> dict[str, Any]:
    given = {name: array for name, array in arrays.items() if array is not None}
    if missing := [name for name in required if name not in given]:
        raise ContractError("kernel call without a required array", seen=f"no {missing}")
    if unknown := set(given) - {*required, *optional}:
        raise ContractError(
            "kernel call with an unknown array", seen=str(sorted(unknown)), expected=str([*required, *optional])
        )
    return given


def _rank(arrays: Mapping[str, Any], name: str, rank: int) -> tuple[int, ...]:
    shape = tuple(arrays[name].shape)
    if len(shape) != rank:
        raise ContractError(f"kernel call: {name} does not fit", seen=str(shape), expected=f"rank {rank}")
    return shape


def _dtype(arrays: Mapping[str, Any], name: str) -> str:
    dtype = dtype_name(arrays[name])
    if dtype not in DATA_TYPES:
        raise ContractError(f"{name} has a data type no kernel takes", seen=dtype, expected=str(list(DATA_TYPES)))
    return dtype


def _choice(attributes: Mapping[str, AttributeValue], name: str, choices: Mapping[str, int]) -> int:
    value = str(attributes[name])
    if value not in choices:
        raise ContractError(f"{name} is unknown", seen=value, expected=str(list(choices)))
    return choices[value]
