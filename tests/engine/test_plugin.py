"""The plugin through its real IPluginV3 interface: fields, shapes, dtypes, serialisation, and the op's own result."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch

from kimi_deploy.contract import Dtype
from kimi_deploy.engine.network import plugin_layers
from kimi_deploy.engine.plugin_fields import field_types, read_fields, write_fields
from kimi_deploy.engine.plugin_registry import register_plugins
from kimi_deploy.errors import ContractError
from kimi_deploy.ops.torch_ops import overload
from kimi_deploy.validate.compare import compare
from kimi_deploy.validate.tolerances import tolerance
from tests.capabilities import needs_tensorrt_rtx
from tests.engine.plugin_driver import (
    ATTRIBUTES,
    FIELDS,
    NUMPY,
    PLUGIN,
    SPEC,
    backend,
    creator,
    dynamic_desc,
    enqueue,
    input_arrays,
    new_plugin,
    output_arrays,
    port_dtype,
)
from tests.ops.op_model import op_model

pytestmark = needs_tensorrt_rtx

torch.set_num_threads(1)

DTYPES = ("FLOAT", "HALF", "BF16")


def to_torch(array: np.ndarray) -> torch.Tensor:
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def op_results(inputs: list[np.ndarray]) -> list[np.ndarray]:
    """What the torch op gives for copies of `inputs`."""
    results = overload(SPEC.name)(*(to_torch(a.copy()) for a in inputs), **ATTRIBUTES)
    return [
        r.view(torch.int16).numpy().view(ml_dtypes.bfloat16) if r.dtype == torch.bfloat16 else r.numpy()
        for r in results
    ]


def same_bytes(a: np.ndarray, b: np.ndarray) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("steps", "lengths"), [(5, None), (1, [1, 1]), (6, [6, 2])])
def test_enqueue_gives_what_the_op_gives(dtype: str, steps: int, lengths: list[int] | None) -> None:
    inputs = input_arrays(dtype, 2, steps, lengths)
    before = [a.copy() for a in inputs]
    outputs = output_arrays(inputs, dtype)
    enqueue(new_plugin(), inputs, outputs)
    for port, seen, expected in zip(SPEC.outputs, outputs, op_results(before), strict=True):
        assert same_bytes(seen, expected), port.name
    assert all(same_bytes(a, b) for a, b in zip(inputs, before, strict=True)), "an input was written"


def test_enqueue_may_write_states_over_their_inputs() -> None:
    inputs = input_arrays("FLOAT", 2, 4, [4, 3])
    expected = op_results(inputs)
    names = [p.name for p in SPEC.inputs]
    past = dict(SPEC.aliases)
    states = {present: inputs[names.index(name)] for name, present in past.items()}
    fresh = output_arrays(inputs, "FLOAT")
    outputs = [states.get(p.name, buffer) for p, buffer in zip(SPEC.outputs, fresh, strict=True)]
    enqueue(new_plugin(in_place_state=True), inputs, outputs)
    assert all(same_bytes(a, b) for a, b in zip(outputs, expected, strict=True))


def test_two_steps_equal_one_call_over_both() -> None:
    whole = input_arrays("FLOAT", 1, 2)
    expected = output_arrays(whole, "FLOAT")
    enqueue(new_plugin(), whole, expected)
    plugin, states = new_plugin(), whole[8:10]
    for step in range(2):
        inputs = [np.ascontiguousarray(a[:, step : step + 1]) for a in whole[:4]] + whole[4:8] + list(states)
        outputs = output_arrays(inputs, "FLOAT")
        enqueue(plugin, inputs, outputs)
        states = outputs[1:]
        assert compare(outputs[0][:, 0], expected[0][:, step]).within(tolerance("float32"))
    for seen, wanted in zip(states, expected[1:], strict=True):
        assert compare(seen, wanted).within(tolerance("float32"))


def test_enqueue_refuses_shapes_that_contradict_the_op() -> None:
    inputs = input_arrays("FLOAT", 2, 3)
    outputs = output_arrays(inputs, "FLOAT")
    inputs[2] = inputs[2][:, :2].copy()
    with pytest.raises(ContractError, match="beta"):
        enqueue(new_plugin(), inputs, outputs)
    assert all(np.isnan(o.astype(np.float32)).all() for o in outputs), "written before it was refused"


def test_fields_are_the_attributes_the_abi_and_what_a_plan_remembers() -> None:
    declared = {f.name: f.type.name for f in creator().field_names}
    assert declared == field_types(PLUGIN)
    assert list(declared) == [*(a.name for a in SPEC.attributes), "abi", "in_place_state", "workspace_blocks"]


def test_what_is_serialised_makes_the_same_plugin() -> None:
    trt = backend().module
    plugin = new_plugin()
    again = creator().create_plugin("node", plugin.get_fields_to_serialize(), trt.TensorRTPhase.RUNTIME)
    for other in (again, plugin.clone(), plugin.attach_to_context(None)):
        assert other is not plugin
        assert other.attributes == plugin.attributes
        assert set(other.attributes) == set(ATTRIBUTES)
        assert (other.plugin_name, other.plugin_version, other.plugin_namespace) == (SPEC.name, "1", "kimi")
        inputs = input_arrays("FLOAT", 1, 3)
        outputs = output_arrays(inputs, "FLOAT")
        enqueue(other, inputs, outputs)
        assert all(same_bytes(a, b) for a, b in zip(outputs, op_results(inputs), strict=True))


def changed_fields(change: str) -> Any:
    """Fields with one thing wrong."""
    trt = backend().module
    collection, arrays = write_fields(trt, PLUGIN, FIELDS)
    fields = list(collection)
    extra = np.array([1], np.int32)
    text = np.frombuffer(b"0123456789abcdef", np.uint8)
    other = np.array([0.5], np.float32)
    arrays += [extra, text, other]
    match change:
        case "unknown":
            fields.append(trt.PluginField("threads", extra, trt.PluginFieldType.INT32))
        case "twice":
            fields.append(trt.PluginField("num_heads", extra, trt.PluginFieldType.INT32))
        case "type":
            fields = [f for f in fields if f.name != "num_heads"]
            fields.append(trt.PluginField("num_heads", other, trt.PluginFieldType.FLOAT32))
        case "abi":
            fields = [f for f in fields if f.name != "abi"]
            fields.append(trt.PluginField("abi", text, trt.PluginFieldType.CHAR))
        case "in_place_state":
            two = np.array([2], np.int32)
            arrays.append(two)
            fields.append(trt.PluginField("in_place_state", two, trt.PluginFieldType.INT32))
        case "choice":
            fields = [f for f in fields if f.name != "gate"]
            fields.append(trt.PluginField("gate", text, trt.PluginFieldType.CHAR))
        case missing:
            fields = [f for f in fields if f.name != missing]
    return trt.PluginFieldCollection(fields), arrays


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("unknown", "threads"),
        ("twice", "given twice"),
        ("type", "INT32"),
        ("choice", "gate"),
        ("in_place_state", "in_place_state is not valid"),
        ("num_heads", "missing.*num_heads"),
        ("abi", f"(?s)0123456789abcdef.*{'SPEC'}"),
    ],
)
def test_wrong_fields_are_refused(change: str, says: str) -> None:
    trt = backend().module
    fields, arrays = changed_fields(change)
    refusing = creator()
    assert refusing.create_plugin("node 7", fields, trt.TensorRTPhase.BUILD) is None
    (error,) = refusing.refusals
    assert isinstance(error, ContractError)
    assert any("node 7" in m for m in backend().logger.errors[-1:])
    with pytest.raises(ContractError, match=says.replace("SPEC", SPEC.abi)):
        read_fields(trt, PLUGIN, fields)
    del arrays


def combinations(inputs: list[np.ndarray], outputs: list[np.ndarray]) -> list[bool]:
    """supports_format_combination at every position."""
    plugin = new_plugin()
    descs = [dynamic_desc(a) for a in (*inputs, *outputs)]
    return [plugin.supports_format_combination(i, descs, len(inputs)) for i in range(len(descs))]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lengths", [None, [2]])
def test_one_floating_dtype_for_all_t_ports(dtype: str, lengths: list[int] | None) -> None:
    inputs = input_arrays(dtype, 1, 2, lengths)
    outputs = output_arrays(inputs, dtype)
    assert all(combinations(inputs, outputs))
    plugin = new_plugin()
    types = plugin.get_output_data_types([dynamic_desc(a).desc.type for a in inputs])
    assert [t.name for t in types] == [port_dtype(p, dtype) for p in SPEC.outputs]
    other = NUMPY["HALF" if dtype == "FLOAT" else "FLOAT"]
    for position, port in enumerate((*SPEC.inputs[: len(inputs)], *SPEC.outputs)):
        arrays = [*inputs, *outputs]
        wrong = other if port.dtype == "T" else NUMPY["BF16"]
        arrays[position] = arrays[position].astype(wrong)
        if position == 0:  # the first T port decides; the next one contradicts it
            assert not combinations(arrays[: len(inputs)], arrays[len(inputs) :])[1]
        else:
            assert not combinations(arrays[: len(inputs)], arrays[len(inputs) :])[position], port.name


def test_only_plain_layouts_are_taken() -> None:
    trt = backend().module
    inputs = input_arrays("HALF", 1, 2)
    descs = [dynamic_desc(a) for a in inputs]
    inner = descs[0].desc
    inner.format = trt.TensorFormat.HWC8
    descs[0].desc = inner
    assert not new_plugin().supports_format_combination(0, descs, len(inputs))


def test_profiles_are_checked_against_the_op() -> None:
    inputs = input_arrays("FLOAT", 2, 4)
    outputs = output_arrays(inputs, "FLOAT")
    plugin = new_plugin()
    good = [dynamic_desc(a) for a in inputs]
    plugin.configure_plugin(good, [dynamic_desc(a) for a in outputs])
    plugin.on_shape_change([d.desc for d in good], [])
    bad = [*good[:2], dynamic_desc(inputs[2], max=(2, 4, 3)), *good[3:]]
    plugin._refuse = None  # raise, where a build would keep it and raise at its end
    with pytest.raises(ContractError, match="beta"):
        plugin.configure_plugin(bad, [])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_tensorrt_derives_the_output_shapes_and_dtypes(dtype: Dtype) -> None:
    trt = backend().module
    register_plugins(backend())
    kind = {"float32": "FLOAT", "bfloat16": "BF16"}[dtype]
    arrays = dict(zip((p.name for p in SPEC.inputs), input_arrays(kind, 2, 5, [5, 5]), strict=True))
    model = op_model(SPEC, [], ATTRIBUTES, dtype, arrays)
    builder = trt.Builder(backend().logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, backend().logger)
    assert parser.parse(model.SerializeToString()), backend().logger.errors[-3:]
    assert plugin_layers(backend(), network) == {SPEC.name: 1}
    outputs = [network.get_output(i) for i in range(network.num_outputs)]
    assert [tuple(o.shape) for o in outputs] == [(-1, -1, 16), (-1, 48, 3), (-1, 2, 8, 8)]
    assert [o.dtype.name for o in outputs] == [kind, kind, "FLOAT"]


def test_states_alias_their_inputs_on_request() -> None:
    names = [p.name for p in SPEC.inputs]
    expected = [-1, names.index("past_conv_state"), names.index("past_recurrent_state")]
    assert [new_plugin(in_place_state=True).get_aliased_input(i) for i in range(3)] == expected
    assert [new_plugin().get_aliased_input(i) for i in range(3)] == [-1, -1, -1]
