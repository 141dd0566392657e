"""ONNX graphs as other exporters write them: linear attention by the standard's operators, none of our ops or names.

`GatedDeltaNet` is a layer like Qwen3-Next's, with fewer key heads than value heads and one decay per value head. In the
domain ai.onnx (opset 27) keys and queries are repeated for the value heads, as that operator wants; com.microsoft's
takes them as they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from tests.kernels.standard_cases import causal_conv_oracle, linear_attention_oracle

Domain = Literal["", "com.microsoft"]
DOMAINS: tuple[Domain, ...] = ("", "com.microsoft")
OPSETS: dict[Domain, list[onnx.OperatorSetIdProto]] = {
    "": [helper.make_opsetid("", 27)],
    "com.microsoft": [helper.make_opsetid("", 23), helper.make_opsetid("com.microsoft", 1)],
}
IR_VERSION = 11

Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class GatedDeltaNet:
    """Sizes and random weights of one layer; the same weights for both domains.

    Inputs: hidden [batch, sequence, hidden], past_conv [batch, channels, width - 1] and past_recurrent
    [batch, value_heads, key_dim, value_dim] float32; outputs: output, present_conv, present_recurrent.
    """

    hidden: int = 24
    key_heads: int = 2
    value_heads: int = 4
    key_dim: int = 16
    value_dim: int = 8
    width: int = 4
    seed: int = 0
    weights: Arrays = field(init=False, compare=False)

    def __post_init__(self) -> None:
        rng = np.random.default_rng(self.seed)

        def normal(*shape: int) -> np.ndarray:
            return (rng.standard_normal(shape) * shape[0] ** -0.5).astype(np.float32)

        channels, values, heads = self.channels, self.value_heads * self.value_dim, self.value_heads
        weights = {
            "in_proj": normal(self.hidden, channels + values + 2 * heads),
            "conv_weight": (0.5 * rng.standard_normal((channels, 1, self.width))).astype(np.float32),
            "conv_bias": (0.1 * rng.standard_normal(channels)).astype(np.float32),
            "A_log": np.log(rng.uniform(1, 4, heads)).astype(np.float32),
            "dt_bias": (rng.standard_normal(heads) - 2).astype(np.float32),
            "norm_weight": (1 + 0.1 * rng.standard_normal(self.value_dim)).astype(np.float32),
            "out_proj": normal(values, self.hidden),
        }
        object.__setattr__(self, "weights", weights)

    @property
    def channels(self) -> int:
        """Of the convolution: queries, keys and values."""
        return 2 * self.key_heads * self.key_dim + self.value_heads * self.value_dim

    def inputs(self, batch: int, sequence: int, seed: int = 1) -> Arrays:
        """Random inputs, states not zero, in float32."""
        rng = np.random.default_rng(seed)
        shapes = {
            "hidden": (batch, sequence, self.hidden),
            "past_conv": (batch, self.channels, self.width - 1),
            "past_recurrent": (batch, self.value_heads, self.key_dim, self.value_dim),
        }
        return {name: (0.5 * rng.standard_normal(shape)).astype(np.float32) for name, shape in shapes.items()}

    def expected(self, inputs: Mapping[str, np.ndarray]) -> Arrays:
        """The layer's definition in float64, on float32 inputs."""
        w = {name: a.astype(np.float64) for name, a in self.weights.items()}
        batch, sequence = inputs["hidden"].shape[:2]
        K, V, value_heads = self.key_dim, self.value_dim, self.value_heads
        values, keys = value_heads * V, self.key_heads * K
        projected = inputs["hidden"].astype(np.float64) @ w["in_proj"]
        mixed, z, b, a = np.split(projected, np.cumsum([self.channels, values, value_heads]), axis=2)
        conv = causal_conv_oracle(
            {
                "input": mixed.swapaxes(1, 2),
                "weight": w["conv_weight"],
                "bias": w["conv_bias"],
                "past_state": inputs["past_conv"].astype(np.float64),
            },
            {"activation": "silu"},
        )
        q, k, v = np.split(conv["output"].swapaxes(1, 2), [keys, 2 * keys], axis=2)

        def normalised(x: np.ndarray) -> np.ndarray:
            heads = x.reshape(batch, sequence, self.key_heads, K)
            return (heads / np.sqrt((heads * heads).sum(-1, keepdims=True) + 1e-6)).reshape(x.shape)

        attention = linear_attention_oracle(
            {
                "query": normalised(q),
                "key": normalised(k),
                "value": v,
                "past_state": inputs["past_recurrent"],
                "decay": -np.exp(w["A_log"]) * np.log1p(np.exp(a + w["dt_bias"])),
                "beta": 1 / (1 + np.exp(-b)),
            },
            {"q_num_heads": self.key_heads, "kv_num_heads": value_heads, "update_rule": "gated_delta"},
        )
        o = attention["output"].reshape(batch, sequence, value_heads, V)
        o = o / np.sqrt((o * o).mean(-1, keepdims=True) + 1e-6) * w["norm_weight"]
        gated = o.reshape(batch, sequence, values) * (z / (1 + np.exp(-z)))
        return {
            "output": gated @ w["out_proj"],
            "present_conv": conv["present_state"],
            "present_recurrent": attention["present_state"],
        }

    def model(self, domain: Domain, dtype: int = TensorProto.FLOAT) -> onnx.ModelProto:
        """The layer with operators of `domain`; weights, data and convolution state are `dtype`, the recurrent state is
        float32. Batch and sequence are dynamic.
        """
        K, V, value_heads, key_heads = self.key_dim, self.value_dim, self.value_heads, self.key_heads
        values, keys = value_heads * V, key_heads * K
        numpy_type = helper.tensor_dtype_to_np_dtype(dtype)
        constants: Arrays = {name: a.astype(numpy_type) for name, a in self.weights.items()}
        constants |= {
            "epsilon": np.array(1e-6, numpy_type),
            "last": np.array([-1], np.int64),
            "split_in": np.array([self.channels, values, value_heads, value_heads], np.int64),
            "split_qkv": np.array([keys, keys, values], np.int64),
            "key_shape": np.array([0, 0, key_heads, K], np.int64),
            "value_shape": np.array([0, 0, value_heads, V], np.int64),
            "flat_shape": np.array([0, 0, -1], np.int64),
        }
        nodes = [
            helper.make_node("MatMul", ["hidden", "in_proj"], ["projected"]),
            helper.make_node("Split", ["projected", "split_in"], ["mixed", "z", "b", "a"], axis=2),
            helper.make_node("Transpose", ["mixed"], ["mixed_first"], perm=[0, 2, 1]),
            helper.make_node(
                "CausalConvWithState",
                ["mixed_first", "conv_weight", "conv_bias", "past_conv"],
                ["convolved_first", "present_conv"],
                domain=domain,
                activation="silu",
            ),
            helper.make_node("Transpose", ["convolved_first"], ["convolved"], perm=[0, 2, 1]),
            helper.make_node("Split", ["convolved", "split_qkv"], ["q", "k", "v"], axis=2),
            helper.make_node("Sigmoid", ["b"], ["beta"]),
            helper.make_node("Add", ["a", "dt_bias"], ["biased"]),
            helper.make_node("Softplus", ["biased"], ["softplus"]),
            helper.make_node("Exp", ["A_log"], ["rate"]),
            helper.make_node("Mul", ["rate", "softplus"], ["forgotten"]),
            helper.make_node("Neg", ["forgotten"], ["decay"]),
        ]
        for name in ("q", "k"):
            nodes += [
                helper.make_node("Reshape", [name, "key_shape"], [f"{name}_heads"]),
                helper.make_node("Mul", [f"{name}_heads", f"{name}_heads"], [f"{name}_squares"]),
                helper.make_node("ReduceSum", [f"{name}_squares", "last"], [f"{name}_sum"], keepdims=1),
                helper.make_node("Add", [f"{name}_sum", "epsilon"], [f"{name}_sum_eps"]),
                helper.make_node("Sqrt", [f"{name}_sum_eps"], [f"{name}_norm"]),
                helper.make_node("Div", [f"{name}_heads", f"{name}_norm"], [f"{name}_unit"]),
            ]
            heads = f"{name}_unit"
            if domain == "":
                constants["repeats"] = np.repeat(np.arange(key_heads), value_heads // key_heads)
                nodes.append(helper.make_node("Gather", [heads, "repeats"], [f"{name}_repeated"], axis=2))
                heads = f"{name}_repeated"
            nodes.append(helper.make_node("Reshape", [heads, "flat_shape"], [f"{name}_ready"]))
        # the standard's defaults are this layer's rule and scale
        more = {} if domain == "" else {"update_rule": "gated_delta", "scale": K**-0.5, "chunk_size": 64}
        nodes += [
            helper.make_node(
                "LinearAttention",
                ["q_ready", "k_ready", "v", "past_recurrent", "decay", "beta"],
                ["attended", "present_recurrent"],
                domain=domain,
                q_num_heads=value_heads if domain == "" else key_heads,
                kv_num_heads=value_heads,
                **more,
            ),
            helper.make_node("Reshape", ["attended", "value_shape"], ["attended_heads"]),
            helper.make_node(
                "RMSNormalization", ["attended_heads", "norm_weight"], ["normed_heads"], axis=-1, epsilon=1e-6
            ),
            helper.make_node("Reshape", ["normed_heads", "flat_shape"], ["normed"]),
            helper.make_node("Sigmoid", ["z"], ["z_sigmoid"]),
            helper.make_node("Mul", ["z", "z_sigmoid"], ["gate"]),
            helper.make_node("Mul", ["normed", "gate"], ["gated"]),
            helper.make_node("MatMul", ["gated", "out_proj"], ["output"]),
        ]
        conv_state = ["batch", self.channels, self.width - 1]
        recurrent_state = ["batch", value_heads, K, V]
        graph = helper.make_graph(
            nodes,
            "gated_delta_net",
            [
                helper.make_tensor_value_info("hidden", dtype, ["batch", "sequence", self.hidden]),
                helper.make_tensor_value_info("past_conv", dtype, conv_state),
                helper.make_tensor_value_info("past_recurrent", TensorProto.FLOAT, recurrent_state),
            ],
            [
                helper.make_tensor_value_info("output", dtype, ["batch", "sequence", self.hidden]),
                helper.make_tensor_value_info("present_conv", dtype, conv_state),
                helper.make_tensor_value_info("present_recurrent", TensorProto.FLOAT, recurrent_state),
            ],
            [numpy_helper.from_array(a, name) for name, a in constants.items()],
        )
        return helper.make_model(graph, opset_imports=OPSETS[domain], ir_version=IR_VERSION)


def one_node(
    op_type: str,
    domain: Domain,
    inputs: Mapping[str, np.ndarray],
    outputs: Mapping[str, np.ndarray],
    **attributes: object,
) -> onnx.ModelProto:
    """A graph of one node; what the schema has optional and `inputs` do not hold is left out with an empty name.

    `inputs` and `outputs` give names, shapes and types; batch, sequence and every other size are as in the arrays.
    """
    ports = [p.name for p in onnx.defs.get_schema(op_type, 27, "").inputs]
    names = [name if name in inputs else "" for name in ports]
    while not names[-1]:
        names.pop()

    def value_infos(arrays: Mapping[str, np.ndarray]) -> list[onnx.ValueInfoProto]:
        return [
            helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(a.dtype), a.shape)
            for name, a in arrays.items()
        ]

    node = helper.make_node(op_type, names, list(outputs), domain=domain, **attributes)
    graph = helper.make_graph([node], "one_node", value_infos(inputs), value_infos(outputs))
    return helper.make_model(graph, opset_imports=OPSETS[domain], ir_version=IR_VERSION)


def all_rules(heads: int = 2, size: int = 16) -> onnx.ModelProto:
    """A node of ai.onnx's LinearAttention for every rule, decay per key and per head, beta per head and shared.

    Batch and sequence are dynamic; a node that has no use for an input leaves it out.
    """
    width = heads * size
    widths = {"q": width, "k": width, "v": width, "key_decay": width, "head_decay": heads, "beta": heads, "one_beta": 1}
    combinations = [
        ("linear", "", ""),
        ("gated", "key_decay", ""),
        ("gated", "head_decay", ""),
        ("delta", "", "beta"),
        ("delta", "", "one_beta"),
        ("gated_delta", "key_decay", "beta"),
        ("gated_delta", "head_decay", "one_beta"),
    ]
    nodes, outputs = [], []
    for index, (rule, decay, beta) in enumerate(combinations):
        names = ["q", "k", "v", "past", decay, beta]
        while not names[-1]:
            names.pop()
        attributes = {"q_num_heads": heads, "kv_num_heads": heads, "update_rule": rule, "scale": 0.25 + index}
        nodes.append(helper.make_node("LinearAttention", names, [f"o{index}", f"s{index}"], **attributes))
        outputs += [
            helper.make_tensor_value_info(f"o{index}", TensorProto.FLOAT, ["batch", "sequence", width]),
            helper.make_tensor_value_info(f"s{index}", TensorProto.FLOAT, ["batch", heads, size, size]),
        ]
    inputs = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", "sequence", w]) for name, w in widths.items()
    ]
    inputs.append(helper.make_tensor_value_info("past", TensorProto.FLOAT, ["batch", heads, size, size]))
    graph = helper.make_graph(nodes, "all_rules", inputs, outputs)
    return helper.make_model(graph, opset_imports=OPSETS[""], ir_version=IR_VERSION)
