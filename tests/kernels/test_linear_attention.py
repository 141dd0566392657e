"""The standard's LinearAttention against its definition in float64: rules, gates, heads, sizes, types, splits."""

import numpy as np
import onnx
import onnxruntime
import pytest

from kimi_deploy.ops.standard import UPDATE_RULES

from .standard_cases import (
    check_linear_attention,
    linear_attention_case,
    linear_attention_oracle,
    run_linear_attention,
)

STEPS = (1, 2, 17, 64, 130)
HEADS = {"mha": (2, 2, 2), "gqa": (6, 2, 2), "mqa": (4, 1, 1), "shared_keys": (4, 4, 2), "inverse": (2, 4, 2)}
OF_STEPS = ("query", "key", "value", "decay", "beta")


def assert_correct(device, arrays, attributes, **options):
    expected = linear_attention_oracle(arrays, attributes)
    check_linear_attention(run_linear_attention(device, arrays, attributes, **options), expected)


@pytest.mark.parametrize("rule", UPDATE_RULES)
@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_every_rule_at_every_length(device, rule, steps, dtype):
    case = linear_attention_case(rule=rule, steps=steps, dtype=dtype, state_dtype=dtype, batch=2, seed=steps)
    assert_correct(device, *case)


@pytest.mark.parametrize("rule", UPDATE_RULES)
def test_thousands_of_steps(device, rule):
    case = linear_attention_case(rule=rule, steps=4096, q_heads=1, kv_heads=1, key_dim=128, strength=1e-3)
    assert_correct(device, *case)


@pytest.mark.parametrize("seed", range(40))
def test_any_combination(device, seed):
    """Everything that a node can choose, drawn at random; what one of the other tests fixes, this one varies."""
    rng = np.random.default_rng(seed)

    def one_of(*choices):
        return choices[rng.integers(len(choices))]

    q, kv, k = one_of(*HEADS.values())
    state_dtype = one_of(None, "float32", "float16", "bfloat16")
    case = linear_attention_case(
        rule=one_of(*UPDATE_RULES),
        batch=one_of(1, 2, 5),
        steps=one_of(1, 2, 16, 17, 33),
        q_heads=q,
        kv_heads=kv,
        key_heads=k,
        key_dim=int(rng.integers(1, 300)),
        value_dim=int(rng.integers(1, 150)),
        dtype=one_of("float32", "float16", "bfloat16"),
        state_dtype=state_dtype,
        decay=one_of("key", "head"),
        shared_beta=one_of(False, True),
        scale=one_of(0.0, 0.3),
        strength=one_of(0.0, 0.01, 1.0),
        seed=seed,
    )
    device.set_seed(seed)
    assert_correct(device, *case, in_place=state_dtype is not None and one_of(False, True))
    device.set_seed(1)


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("decay", ["head", "key"])
@pytest.mark.parametrize("shared_beta", [False, True])
def test_every_grouping_of_heads(device, heads, decay, shared_beta):
    q, kv, k = HEADS[heads]
    case = linear_attention_case(
        q_heads=q, kv_heads=kv, key_heads=k, decay=decay, shared_beta=shared_beta, batch=2, steps=5
    )
    assert_correct(device, *case)


@pytest.mark.parametrize(
    ("key_dim", "value_dim"),
    [(1, 1), (3, 5), (64, 128), (65, 66), (128, 64), (100, 36), (192, 20), (256, 3), (511, 6), (512, 32), (8, 200)],
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_key_and_value_sizes(device, key_dim, value_dim, dtype):
    case = linear_attention_case(key_dim=key_dim, value_dim=value_dim, steps=3, q_heads=4, dtype=dtype)
    assert_correct(device, *case)


def test_as_many_readers_of_one_state_as_fit(device):
    assert_correct(device, *linear_attention_case(q_heads=158, kv_heads=1, key_dim=128, value_dim=4, steps=2))


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("state_dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("in_place", [False, True])
def test_any_state_type_with_any_data_type(device, dtype, state_dtype, in_place):
    case = linear_attention_case(dtype=dtype, state_dtype=state_dtype, key_dim=64, value_dim=64, steps=2)
    assert_correct(device, *case, in_place=in_place)


@pytest.mark.parametrize("state_dtype", [None, "float32"])
def test_without_a_past_state_it_starts_from_zeros(device, state_dtype):
    case = linear_attention_case(dtype="float16", state_dtype=None, steps=3)
    assert_correct(device, *case, state_dtype=state_dtype)


@pytest.mark.parametrize("scale", [0.0, 0.25, -2.0])
def test_scale(device, scale):
    assert_correct(device, *linear_attention_case(scale=scale))


def test_the_defaults_are_the_schemas(device):
    arrays, attributes = linear_attention_case(rule="gated_delta", scale=0.0)
    named = run_linear_attention(device, arrays, attributes)
    heads = {name: attributes[name] for name in ("q_num_heads", "kv_num_heads")}
    defaults = run_linear_attention(device, arrays, heads)
    for name, array in named.items():
        np.testing.assert_array_equal(array, defaults[name])


@pytest.mark.parametrize("rule", UPDATE_RULES)
@pytest.mark.parametrize("strength", [0.0, 1e-4, 20.0, 1e4])
def test_slow_and_strong_decay(device, rule, strength):
    case = linear_attention_case(rule=rule, strength=strength, steps=70, key_dim=64, value_dim=16)
    assert_correct(device, *case)


def test_one_key_again_and_again(device):
    """beta 1 and equal keys: each step replaces what the last has written."""
    arrays, attributes = linear_attention_case(rule="delta", steps=70)
    arrays["key"] = np.repeat(arrays["key"][:, :1], 70, axis=1)
    arrays["beta"] = np.ones_like(arrays["beta"])
    assert_correct(device, arrays, attributes)


@pytest.mark.parametrize("state_dtype", ["float32", "float16", None])
@pytest.mark.parametrize("in_place", [False, True])
def test_no_steps_give_the_past_state(device, state_dtype, in_place):
    arrays, attributes = linear_attention_case(steps=0, state_dtype=state_dtype)
    if state_dtype is None and in_place:
        return
    results = run_linear_attention(device, arrays, attributes, in_place=in_place)
    expected = arrays.get("past_state", np.zeros_like(results["present_state"]))
    np.testing.assert_array_equal(results["present_state"], expected)


@pytest.mark.parametrize("rule", UPDATE_RULES)
@pytest.mark.parametrize("parts", [(50,), (17, 33), (1, 2, 47), (1,) * 4 + (45, 1)])
def test_a_split_run_has_the_bits_of_the_whole(device, rule, parts):
    arrays, attributes = linear_attention_case(rule=rule, steps=50, batch=2, strength=0.05)
    whole = run_linear_attention(device, arrays, attributes)
    state, outputs, start = arrays["past_state"], [], 0
    for steps in parts:
        part = {n: np.ascontiguousarray(a[:, start : start + steps]) for n, a in arrays.items() if n in OF_STEPS}
        results = run_linear_attention(device, part | {"past_state": state}, attributes, in_place=True)
        state, start = results["present_state"], start + steps
        outputs.append(results["output"])
    np.testing.assert_array_equal(np.concatenate(outputs, axis=1), whole["output"])
    np.testing.assert_array_equal(state, whole["present_state"])


def test_a_row_is_what_it_is_alone(device):
    """Whatever the batch, and so however a state's columns are split over blocks."""
    arrays, attributes = linear_attention_case(batch=70, kv_heads=2, q_heads=2, key_dim=128, value_dim=64, steps=1)
    together = run_linear_attention(device, arrays, attributes)
    for n in (0, 69):
        alone = run_linear_attention(device, {k: a[n : n + 1] for k, a in arrays.items()}, attributes)
        for name, array in alone.items():
            np.testing.assert_array_equal(array[0], together[name][n])


@pytest.mark.parametrize("in_place", [False, True])
def test_no_order_of_threads_changes_a_bit(device, in_place):
    """Emulated: shuffled blocks and threads. On a GPU: repeated runs."""
    arrays, attributes = linear_attention_case(batch=2, steps=20, q_heads=4, key_dim=128, value_dim=96)
    results = []
    for seed in (1, 2, 3):
        device.set_seed(seed)
        results.append(run_linear_attention(device, arrays, attributes, in_place=in_place))
    device.set_seed(1)
    for other in results[1:]:
        for name, array in results[0].items():
            np.testing.assert_array_equal(array, other[name])


def test_what_no_head_reads_is_not_read(device):
    """A NaN in one head's inputs stays in that head."""
    arrays, attributes = linear_attention_case(steps=3, key_dim=16, value_dim=24)
    clean = run_linear_attention(device, arrays, attributes)
    arrays["value"][..., 24:] = np.nan
    results = run_linear_attention(device, arrays, attributes)
    np.testing.assert_array_equal(results["output"][..., :24], clean["output"][..., :24])
    np.testing.assert_array_equal(results["present_state"][:, 0], clean["present_state"][:, 0])
    assert np.isnan(results["output"][..., 24:]).all()


@pytest.mark.parametrize("heads", HEADS)
def test_heads_are_shared_as_in_onnxruntime(emulated, heads):
    """com.microsoft.LinearAttention takes fewer key and query heads than states, which the standard does not have."""
    q, kv, k = HEADS[heads]
    arrays, attributes = linear_attention_case(q_heads=q, kv_heads=kv, key_heads=k, decay="head", value_dim=16)
    expected = onnxruntime_linear_attention(arrays, attributes)
    check_linear_attention(run_linear_attention(emulated, arrays, attributes), expected)


def onnxruntime_linear_attention(arrays, attributes):
    outputs = ("output", "present_state")
    node = onnx.helper.make_node(
        "LinearAttention",
        ["query", "key", "value", "past_state", "decay", "beta"],
        outputs,
        domain="com.microsoft",
        **attributes,
    )
    graph = onnx.helper.make_graph(
        [node],
        "one_node",
        [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, a.shape) for name, a in arrays.items()],
        [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in outputs],
    )
    opsets = [onnx.helper.make_opsetid("", 21), onnx.helper.make_opsetid("com.microsoft", 1)]
    model = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=10)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return dict(zip(outputs, session.run(None, arrays), strict=True))
