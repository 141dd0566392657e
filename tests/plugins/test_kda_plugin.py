"""The C++ KimiDeltaAttention plugin through IPluginV3: results, shapes, plans, contexts, and everything it refuses."""

from __future__ import annotations

import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from kimi_deploy.ops.plugins import ABI_FIELD, IN_PLACE_FIELD, PLUGINS, WORKSPACE_BLOCK
from kimi_deploy.ops.spec import AttributeValue
from tests.capabilities import needs_tensorrt_headers
from tests.kernels.cases import check, make_case, oracle

from .drive import built, captured, output_tensors
from .host import FIELD_TYPES, Host, Tensor
from .memory import CudaMemory, Memory

pytestmark = needs_tensorrt_headers

SPEC = PLUGINS["KimiDeltaAttention"]
NAMES = [p.name for p in SPEC.op.inputs]
Driven = tuple[Host, Memory]


def case(**sizes: object) -> tuple[dict[str, np.ndarray], dict[str, AttributeValue]]:
    """Inputs by port and the fields of a node."""
    lengths = sizes.pop("lengths", None)
    arrays, attributes = make_case(**sizes)
    if lengths is not None:
        arrays["sequence_lengths"] = np.array(lengths, np.int32)
    return arrays, {**attributes, ABI_FIELD: SPEC.op.abi}


def ordered(arrays: dict[str, np.ndarray]) -> list[np.ndarray]:
    return [arrays[name] for name in NAMES if name in arrays]


def profile(arrays: dict[str, np.ndarray], *, batch: int, sequence: int) -> list[Tensor]:
    """Descriptors of a profile from one step of one row to these sizes."""
    result = []
    for name in NAMES:
        if name not in arrays:
            continue
        array, dims = arrays[name], SPEC.op.input(name).dims
        smallest, largest = (
            tuple(sizes.get(dim, size) for dim, size in zip(dims, array.shape, strict=True))
            for sizes in ({"batch": 1, "sequence": 1}, {"batch": batch, "sequence": sequence})
        )
        result.append(Tensor(array.shape, str(array.dtype), smallest, largest))
    return result


def attributes_of(fields: dict[str, AttributeValue]) -> dict[str, AttributeValue]:
    return {a.name: fields[a.name] for a in SPEC.op.attributes}


def bound(dtype: str, steps: int) -> str:
    return f"kda_{'decode' if steps <= 16 or dtype == 'float32' else 'prefill'}_{dtype}"


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize(("steps", "lengths"), [(1, None), (5, [5, 2]), (40, [40, 17])])
def test_enqueue_computes_the_op(driven: Driven, dtype: str, steps: int, lengths: list[int] | None) -> None:
    arrays, fields = case(batch=2, steps=steps, heads=2, dtype=dtype, lengths=lengths)
    with built(*driven, SPEC, fields, profile(arrays, batch=2, sequence=48)) as (context,):
        results = context.run(ordered(arrays))
    check(results, oracle(arrays, attributes_of(fields)), bound(dtype, steps))


def test_heads_of_128_and_the_bounded_gate(driven: Driven) -> None:
    arrays, fields = case(steps=20, heads=1, dim=128, gate="bounded")
    with built(*driven, SPEC, fields, profile(arrays, batch=1, sequence=20)) as (context,):
        check(context.run(ordered(arrays)), oracle(arrays, attributes_of(fields)), "kda_prefill_bfloat16")


def step(arrays: dict[str, np.ndarray], start: int, stop: int, past: dict[str, np.ndarray]) -> list[np.ndarray]:
    """Inputs of steps start to stop, with the states that came before."""
    part = dict(arrays)
    for name in ("qkv", "decay", "beta", "output_gate"):
        part[name] = np.ascontiguousarray(arrays[name][:, start:stop])
    for name in past:
        if name.startswith("present_"):
            part[name.replace("present_", "past_")] = past[name]
    return ordered(part)


def test_one_context_changes_shapes_between_prefill_and_decode(driven: Driven) -> None:
    arrays, fields = case(batch=2, steps=42)
    expected = oracle(arrays, attributes_of(fields))
    results: dict[str, np.ndarray] = {}
    outputs = []
    with built(*driven, SPEC, fields, profile(arrays, batch=2, sequence=40)) as (context,):
        for start, stop in ((0, 20), (20, 21), (21, 22), (22, 40), (40, 42)):
            results = context.run(step(arrays, start, stop, results))
            outputs.append(results["output"])
    check(results | {"output": np.concatenate(outputs, axis=1)}, expected, "kda_prefill_bfloat16")


def test_contexts_that_run_at_once_do_not_share_anything(driven: Driven) -> None:
    one, fields = case(batch=2, steps=20, seed=1)
    two, _ = case(batch=1, steps=33, seed=2)
    with built(*driven, SPEC, fields, profile(one, batch=2, sequence=40), contexts=2) as (first, second):
        second.memory = type(first.memory)()  # a stream of its own
        alone = [first.run(ordered(one)), second.run(ordered(two))]
        with ThreadPoolExecutor(2) as threads:
            for _ in range(4):
                calls = [threads.submit(second.run, ordered(one)), threads.submit(first.run, ordered(two))]
                for call, wanted in zip(calls, alone, strict=True):
                    assert {k: v.tobytes() for k, v in call.result().items()} == {
                        k: v.tobytes() for k, v in wanted.items()
                    }


def test_states_are_written_over_their_inputs_where_that_was_declared(driven: Driven) -> None:
    arrays, fields = case(batch=2, steps=3)
    tensors = profile(arrays, batch=2, sequence=4)
    with built(*driven, SPEC, fields, tensors) as (context,):
        assert [context.plugin.aliased_input(i) for i in range(3)] == [-1, -1, -1]
        expected = context.run(ordered(arrays))
    with built(*driven, SPEC, fields | {IN_PLACE_FIELD: 1}, tensors) as (context,):
        seen = [context.plugin.aliased_input(i) for i in range(3)]
        assert seen == [-1, NAMES.index("past_conv_state"), NAMES.index("past_recurrent_state")]
        results = context.run(ordered(arrays), in_place=True)
        assert {k: v.tobytes() for k, v in results.items()} == {k: v.tobytes() for k, v in expected.items()}
        with pytest.raises(AssertionError, match="declared to be the memory of past_conv_state"):
            context.run(ordered(arrays))


def test_a_workspace_serves_every_smaller_shape(host: Host) -> None:
    """getWorkspaceSize is asked for the largest shape only."""
    arrays, fields = case(batch=1, steps=17)
    with host.plugin("KimiDeltaAttention", list(fields.items())) as plugin:
        sizes = {}
        for batch in (1, 2, 5):
            for sequence in (1, 8, 9, 32, 33, 100):
                tensors = profile(arrays, batch=batch, sequence=sequence)
                outputs = output_tensors(SPEC, tensors, attributes_of(fields))
                sizes[batch, sequence] = plugin.workspace(tensors, outputs)
    assert sizes[5, 8] == 0
    assert sizes[1, 9] > 0
    for (batch, sequence), size in sizes.items():
        assert size % WORKSPACE_BLOCK == 0
        assert all(size >= s for (b, t), s in sizes.items() if b <= batch and t <= sequence)


def test_a_plan_with_too_little_workspace_is_refused_before_anything_runs(host: Host) -> None:
    arrays, fields = case(steps=40)
    full = SPEC.complete(fields | {"workspace_blocks": 1})
    tensors = profile(arrays, batch=1, sequence=40)
    with host.plugin("KimiDeltaAttention", list(full.items()), phase=1) as plugin:
        assert not plugin.shape_change(tensors, output_tensors(SPEC, tensors, attributes_of(fields)))
    message = host.messages()
    assert "256 bytes" in message
    assert "build the engine again" in message


def test_what_is_serialised_is_what_python_serialises(host: Host) -> None:
    arrays, fields = case(steps=40)
    tensors = profile(arrays, batch=3, sequence=100)
    outputs = output_tensors(SPEC, tensors, attributes_of(fields))
    with host.plugin("KimiDeltaAttention", list(fields.items())) as plugin:
        assert plugin.configure(tensors, outputs)
        blocks = plugin.workspace(tensors, outputs) // WORKSPACE_BLOCK
        seen = plugin.serialize()
    expected = {}
    for field in SPEC.fields:
        value = {**SPEC.complete(fields), "workspace_blocks": blocks}[field.name]
        raw = value.encode() if isinstance(value, str) else None
        if raw is None:
            raw = np.array(value, np.float32 if field.type == "float" else np.int32).tobytes()
        expected[field.name] = (FIELD_TYPES[field.type], raw)
    assert list(seen.items()) == list(expected.items())


def test_the_creator_declares_the_specs_fields(host: Host) -> None:
    assert host.field_names("KimiDeltaAttention") == {f.name: FIELD_TYPES[f.type] for f in SPEC.fields}
    assert host.creator_identity("KimiDeltaAttention") == ("1", "kimi")


FIELDS = list(case()[1].items())


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ([*FIELDS, ("threads", 1)], ["threads is unknown", "num_heads"]),
        ([*FIELDS, ("num_heads", 1)], ["num_heads is given twice"]),
        ([("num_heads", 0.5), *FIELDS[1:]], ["num_heads has the wrong type", "FLOAT32", "INT32"]),
        (FIELDS[1:], ["missing: num_heads", "export the model again"]),
        (FIELDS[:-1], ["missing: abi"]),
        ([*FIELDS[:-1], (ABI_FIELD, "0123456789abcdef")], ["0123456789abcdef", SPEC.op.abi, "fix:"]),
        ([(k, "tanh" if k == "gate" else v) for k, v in FIELDS], ["gate is not valid", "tanh", "softplus, bounded"]),
        ([*FIELDS, (IN_PLACE_FIELD, 2)], ["in_place_state is not valid", "2"]),
    ],
)
def test_wrong_fields_are_refused_through_the_logger(host: Host, fields: list, says: list[str]) -> None:
    with host.plugin("KimiDeltaAttention", fields) as plugin:
        assert plugin is None
    message = host.messages()
    assert all(text in message for text in ["kimi::KimiDeltaAttention, layer node 7", *says]), message


def test_a_string_may_end_in_a_zero(host: Host) -> None:
    fields = [(k, v.encode() + b"\0" if isinstance(v, str) else v) for k, v in FIELDS]
    with host.plugin("KimiDeltaAttention", fields) as plugin:
        assert plugin is not None, host.messages()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"beta": (2, 3, 3)}, "beta has the wrong size on axis 2"),
        ({"decay": (2, 4, 128)}, "decay has the wrong size on axis 1"),
        ({"A_log": (2, 1)}, "A_log has the wrong rank"),
        ({"conv_weight": (384, 3), "past_conv_state": (2, 384, 2)}, "conv_width is 3"),
    ],
)
def test_shapes_that_contradict_the_op_are_refused(host: Host, change: dict[str, tuple[int, ...]], says: str) -> None:
    arrays, fields = case(batch=2, steps=3, heads=2)
    good = [Tensor.of(a) for a in ordered(arrays)]
    bad = [Tensor(change.get(n, t.shape), t.dtype) for n, t in zip(NAMES, good, strict=False)]
    outputs = output_tensors(SPEC, good, attributes_of(fields))
    with host.plugin("KimiDeltaAttention", list(fields.items())) as plugin:
        assert plugin.configure(good, outputs), host.messages()
        for refused in (plugin.configure, plugin.shape_change):
            assert not refused(bad, outputs)
            assert says in host.messages()
        assert not plugin.configure(good[:9], outputs)
        assert "wrong number of inputs" in host.messages()


def test_sizes_without_a_kernel_are_refused_with_the_way_out(host: Host) -> None:
    arrays, fields = case(heads=2, dim=32)
    tensors = [Tensor.of(a) for a in ordered(arrays)]
    with host.plugin("KimiDeltaAttention", list(fields.items())) as plugin:
        assert not plugin.configure(tensors, output_tensors(SPEC, tensors, attributes_of(fields)))
    message = host.messages()
    assert "head_dim is 32" in message
    assert "--plugin none" in message


def test_one_floating_dtype_for_all_t_ports(host: Host) -> None:
    arrays, fields = case(steps=2)
    inputs = [Tensor.of(a) for a in ordered(arrays)]
    outputs = output_tensors(SPEC, inputs, attributes_of(fields))
    with host.plugin("KimiDeltaAttention", list(fields.items())) as plugin:
        for position in range(1, len(inputs) + len(outputs)):
            for dtype in ("float32", "float16", "bfloat16", "int32", "int8"):
                every = [*inputs, *outputs]
                right = every[position].dtype
                every[position] = Tensor(every[position].shape, dtype)
                assert plugin.supports(position, every[: len(inputs)], every[len(inputs) :]) == (dtype == right)
        assert not plugin.supports(0, [Tensor(inputs[0].shape, "int8"), *inputs[1:]], outputs)


def test_enqueue_of_no_plugin_allocates_anything_of_its_own(plugin_build: Path) -> None:
    """On a plugin library whose kernels do nothing: what is left is the plugin."""
    command = [plugin_build / "plugin_cost", plugin_build / "libkimi_plugins_without_kernels.so", "1000"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    measured = dict(line.split(": ") for line in done.stdout.splitlines())
    assert measured.keys() == PLUGINS.keys()
    assert all(cost.endswith(" ns, 0 allocations") for cost in measured.values()), done.stdout


def test_tensorrts_objects_are_called_where_the_headers_have_them(plugin_build: Path) -> None:
    """The library calls them by position, since TensorRT 10 and 11 differ and it serves both."""
    done = subprocess.run([plugin_build / "plugin_layout"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.gpu
@pytest.mark.parametrize("steps", [1, 40])
def test_enqueue_is_captured_in_a_cuda_graph(host_library: Path, steps: int) -> None:
    """A capture fails on any synchronisation or allocation; replays read what is in the buffers by then."""
    from kimi_deploy.engine.plugin_library import default_path

    arrays, fields = case(batch=2, steps=steps)
    host = Host(host_library, default_path("cuda"))
    with built(host, CudaMemory(), SPEC, fields, profile(arrays, batch=2, sequence=40)) as (context,):
        first = context.run(ordered(arrays))
        calls = [ordered(arrays), step(arrays, 0, steps, first)]
        expected = [{k: v.tobytes() for k, v in results.items()} for results in (first, context.run(calls[1]))]
        assert list(captured(context, calls)) == expected
    host.close()
