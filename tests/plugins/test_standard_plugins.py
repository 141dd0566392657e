"""The plugins of ONNX's LinearAttention and CausalConvWithState through IPluginV3, on onnx's cases and on ours."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx.reference import ReferenceEvaluator

from kimi_deploy.engine.plugin_library import default_path
from kimi_deploy.engine.standard_nodes import prepare_standard_nodes
from kimi_deploy.ops.plugins import PLUGINS
from kimi_deploy.ops.spec import AttributeValue
from tests.capabilities import needs_tensorrt_headers
from tests.kernels.onnx_cases import CLASSES, OnnxCase, exported_names, onnx_cases
from tests.kernels.standard_cases import (
    causal_conv_case,
    causal_conv_oracle,
    check_causal_conv,
    check_linear_attention,
    linear_attention_case,
    linear_attention_oracle,
)

from .drive import built, captured, output_tensors
from .host import FIELD_TYPES, Host, Tensor
from .memory import CudaMemory, Memory

pytestmark = needs_tensorrt_headers

Driven = tuple[Host, Memory]
RULES = ("linear", "gated", "delta", "gated_delta")


def positional(op: str, arrays: Mapping[str, np.ndarray]) -> list[np.ndarray]:
    """Inputs as TensorRT gives them: in order, absent ones only at the end."""
    names = [p.name for p in PLUGINS[op].op.inputs]
    given = [arrays.get(name) for name in names]
    while given[-1] is None:
        given.pop()
    assert all(a is not None for a in given), "TensorRT has no absent input before a present one"
    return given  # type: ignore[return-value]


def completed(case: OnnxCase) -> tuple[dict[str, AttributeValue], list[np.ndarray]]:
    """The case's node as it is after `prepare_standard_nodes`: its attributes, and the values of its inputs."""
    model = ir.from_proto(case.model)
    assert prepare_standard_nodes(model) == 1
    node = next(n for n in model.graph if n.op_type in CLASSES)
    attributes = {k: a.value for k, a in node.attributes.items()}
    names = [i.name for i in node.inputs]
    proto = ir.to_proto(model)
    del proto.graph.output[:]
    proto.graph.output.extend(onnx.helper.make_value_info(n, onnx.TypeProto()) for n in names)
    proto.graph.node.remove(next(n for n in proto.graph.node if n.op_type in CLASSES))
    feeds = dict(zip((i.name for i in case.model.graph.input), case.inputs.values(), strict=True))
    return attributes, [np.asarray(a) for a in ReferenceEvaluator(proto).run(None, feeds)]


@pytest.mark.parametrize("op", CLASSES)
def test_no_case_of_onnx_is_left_out(op: str) -> None:
    assert {case.name for case in onnx_cases(op)} == exported_names(op)


@pytest.mark.parametrize(
    ("op", "case"), [pytest.param(op, case, id=case.name) for op in CLASSES for case in onnx_cases(op)]
)
def test_a_case_of_the_onnx_package(driven: Driven, op: str, case: OnnxCase) -> None:
    attributes, inputs = completed(case)
    with built(*driven, PLUGINS[op], attributes, [Tensor.of(a) for a in inputs]) as (context,):
        results = context.run(inputs)
    for name, expected in case.outputs.items():
        assert results[name].dtype == expected.dtype
        # the bounds are the case's own
        np.testing.assert_allclose(results[name], expected, rtol=case.rtol, atol=case.atol, err_msg=name)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("decay", ["key", "head"])
@pytest.mark.parametrize("rule", ["gated", "gated_delta"])
def test_decay_of_a_key_or_of_a_head(driven: Driven, rule: str, decay: str, dtype: str) -> None:
    arrays, attributes = linear_attention_case(rule=rule, decay=decay, dtype=dtype, state_dtype="float32", batch=2)
    inputs = positional("LinearAttention", arrays)
    with built(*driven, PLUGINS["LinearAttention"], attributes, [Tensor.of(a) for a in inputs]) as (context,):
        check_linear_attention(context.run(inputs), linear_attention_oracle(arrays, attributes))


def test_a_gated_delta_net_as_qwen_has_it(driven: Driven) -> None:
    """Fewer query and key heads than states, a decay a head, float32 states, prefill and then single steps."""
    arrays, attributes = linear_attention_case(
        decay="head", q_heads=2, kv_heads=4, key_heads=2, key_dim=32, value_dim=32, dtype="float16", steps=9
    )
    largest = [
        Tensor(a.shape, str(a.dtype), tuple(1 if i == 1 and a.ndim == 3 else n for i, n in enumerate(a.shape)))
        for a in positional("LinearAttention", arrays)
    ]
    outputs, past = [], {}
    with built(*driven, PLUGINS["LinearAttention"], attributes, largest) as (context,):
        for start, stop in ((0, 6), (6, 7), (7, 8), (8, 9)):
            part = {k: a if k == "past_state" else a[:, start:stop].copy() for k, a in arrays.items()} | past
            results = context.run(positional("LinearAttention", part))
            outputs.append(results["output"])
            past = {"past_state": results["present_state"]}
    whole = results | {"output": np.concatenate(outputs, axis=1)}
    check_linear_attention(whole, linear_attention_oracle(arrays, attributes))


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("activation", ["none", "silu", "swish"])
def test_convolutions(driven: Driven, activation: str, dtype: str) -> None:
    arrays, attributes = causal_conv_case(activation=activation, dtype=dtype)
    inputs = positional("CausalConvWithState", arrays)
    fields = {**attributes, "ndim": 1}
    with built(*driven, PLUGINS["CausalConvWithState"], fields, [Tensor.of(a) for a in inputs]) as (context,):
        results = context.run(inputs)
    check_causal_conv(results, causal_conv_oracle(arrays, attributes))


Call = tuple[list[np.ndarray], dict[str, AttributeValue]]


def wide_call(op: str, *, batch: int, steps: int, seed: int) -> Call:
    """Inputs and fields of a node."""
    if op == "LinearAttention":
        arrays, attributes = linear_attention_case(batch=batch, steps=steps, decay="head", dtype="float16", seed=seed)
        return positional(op, arrays), attributes
    arrays, attributes = causal_conv_case(batch=batch, steps=steps, dtype="float16", seed=seed)
    return positional(op, arrays), {**attributes, "ndim": 1}


def largest(*calls: Call) -> list[Tensor]:
    """A profile that holds these calls, described for the first."""
    every = zip(*(inputs for inputs, _ in calls), strict=True)
    return [
        Tensor(
            arrays[0].shape,
            str(arrays[0].dtype),
            tuple(map(min, zip(*(a.shape for a in arrays), strict=True))),
            tuple(map(max, zip(*(a.shape for a in arrays), strict=True))),
        )
        for arrays in every
    ]


@pytest.mark.parametrize("op", CLASSES)
def test_contexts_that_run_at_once_do_not_share_anything(driven: Driven, op: str) -> None:
    one, two = (wide_call(op, batch=b, steps=s, seed=s) for b, s in ((2, 20), (1, 33)))
    with built(*driven, PLUGINS[op], one[1], largest(one, two), contexts=2) as (first, second):
        second.memory = type(first.memory)()  # a stream of its own
        alone = [first.run(one[0]), second.run(two[0])]
        with ThreadPoolExecutor(2) as threads:
            for _ in range(4):
                calls = [threads.submit(second.run, one[0]), threads.submit(first.run, two[0])]
                for call, wanted in zip(calls, alone, strict=True):
                    seen = call.result()
                    assert {k: v.tobytes() for k, v in seen.items()} == {k: v.tobytes() for k, v in wanted.items()}


@pytest.mark.gpu
@pytest.mark.parametrize("op", CLASSES)
@pytest.mark.parametrize("steps", [1, 40])
def test_enqueue_is_captured_in_a_cuda_graph(host_library: Path, op: str, steps: int) -> None:
    """A capture fails on any synchronisation or allocation; replays read what is in the buffers by then."""
    calls = [wide_call(op, batch=2, steps=steps, seed=seed) for seed in (1, 2)]
    host = Host(host_library, default_path("cuda"))
    with built(host, CudaMemory(), PLUGINS[op], calls[0][1], largest(*calls)) as (context,):
        expected = [{k: v.tobytes() for k, v in context.run(inputs).items()} for inputs, _ in calls]
        assert list(captured(context, [inputs for inputs, _ in calls])) == expected
    host.close()


@pytest.mark.parametrize("op", CLASSES)
def test_creators_are_what_the_parser_looks_for(host: Host, op: str) -> None:
    assert host.creator_identity(op) == ("1", "")
    assert host.field_names(op) == {f.name: FIELD_TYPES[f.type] for f in PLUGINS[op].fields}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"update_rule": "rwkv"}, "update_rule is not valid"),
        ({"update_rule": "gated"}, "update_rule gated takes no beta"),
        ({"q_num_heads": 1}, "past_state has the wrong size on axis 2"),
        ({"kv_num_heads": 5}, "past_state has the wrong size on axis 1"),
    ],
)
def test_attributes_that_contradict_the_inputs_are_refused(host: Host, change: dict, says: str) -> None:
    arrays, attributes = linear_attention_case()
    tensors = [Tensor.of(a) for a in positional("LinearAttention", arrays)]
    outputs = output_tensors(PLUGINS["LinearAttention"], tensors, PLUGINS["LinearAttention"].complete(attributes))
    with host.plugin("LinearAttention", list((attributes | change).items())) as plugin:
        assert plugin is None or not plugin.configure(tensors, outputs)
    message = host.messages()
    assert says in message
    assert "plugin LinearAttention, layer node 7" in message


def test_a_convolution_over_two_axes_is_refused(host: Host) -> None:
    arrays, attributes = causal_conv_case()
    tensors = [Tensor.of(a) for a in positional("CausalConvWithState", arrays)]
    with host.plugin("CausalConvWithState", [*attributes.items(), ("ndim", 2)]) as plugin:
        assert not plugin.configure(tensors, tensors[:2])
    assert "over 2 axes" in host.messages()
