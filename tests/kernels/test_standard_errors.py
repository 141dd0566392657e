"""Arguments that the standard operators' kernels cannot run are refused with a code and a reason, nothing launched."""

import ctypes

import numpy as np
import pytest

from kimi_deploy.errors import ContractError
from kimi_deploy.kernels.standard import causal_conv_arguments, linear_attention_arguments

from .standard_cases import causal_conv_case, linear_attention_case


@pytest.fixture
def attention():
    """Arguments of a valid call on host arrays, and its outputs, which are NaN."""
    arrays, attributes = linear_attention_case()
    outputs = {"output": np.full_like(arrays["value"], np.nan)}
    outputs["present_state"] = np.full_like(arrays["past_state"], np.nan)
    arrays |= outputs
    yield linear_attention_arguments(arrays, attributes), outputs
    del arrays


@pytest.fixture
def conv():
    arrays, attributes = causal_conv_case()
    outputs = {"output": np.full_like(arrays["input"], np.nan)}
    outputs["present_state"] = np.full_like(arrays["past_state"], np.nan)
    arrays |= outputs
    yield causal_conv_arguments(arrays, attributes), outputs
    del arrays


def refused(library, function, arguments, outputs, status, message, *more):
    with pytest.raises(ContractError) as error:
        library.call(function, arguments, *more)
    assert f"({status})" in error.value.what
    assert message in error.value.seen
    for name, array in outputs.items():
        assert np.isnan(array).all(), f"{name} was written by a refused call"


@pytest.mark.parametrize(
    ("fields", "status", "message"),
    [
        ({"struct_size": 8}, "abi", "struct_size is 8"),
        ({"data_type": 3}, "dtype", "data_type is 3"),
        ({"state_type": -1}, "dtype", "state_type is -1"),
        ({"update_rule": 4}, "argument", "update_rule is 4"),
        ({"batch": 0}, "shape", "batch 0"),
        ({"sequence": -1}, "shape", "sequence -1"),
        ({"value_dim": 0}, "shape", "value_dim 0"),
        ({"key_dim": 0}, "shape", "key_dim is 0"),
        ({"key_dim": 513}, "shape", "1 to 512"),
        ({"q_num_heads": 3}, "shape", "q_num_heads is 3"),
        ({"q_num_heads": 0}, "shape", "q_num_heads is 0"),
        ({"q_num_heads": -2}, "shape", "q_num_heads is -2"),
        ({"kv_num_heads": 0}, "shape", "kv_num_heads 0"),
        ({"key_num_heads": 4}, "shape", "key_num_heads 4"),
        ({"q_num_heads": 8192}, "shape", "at most 4096"),
        ({"decay_per_key": 2}, "argument", "decay_per_key is 2"),
        ({"beta_num_heads": 3}, "shape", "beta_num_heads is 3"),
        ({"scale": float("nan")}, "argument", "scale"),
        ({"q_num_heads": 640}, "shape", "take at most 318"),
        ({"batch": 2**31 - 1}, "shape", "more than one grid holds"),
        ({"value_dim": 2**31 - 1}, "shape", "more than one grid holds"),
    ],
)
def test_bad_sizes_of_attention_are_refused(emulated_library, attention, fields, status, message):
    arguments, outputs = attention
    for name, value in fields.items():
        setattr(arguments, name, value)
    refused(emulated_library, "kimi_linear_attention", arguments, outputs, status, message)
    refused(emulated_library, "kimi_linear_attention_workspace", arguments, outputs, status, message, None)


@pytest.mark.parametrize(
    ("fields", "status", "message"),
    [
        ({"struct_size": 8}, "abi", "struct_size is 8"),
        ({"data_type": 3}, "dtype", "data_type is 3"),
        ({"activation": 2}, "argument", "activation is 2"),
        ({"batch": 0}, "shape", "batch 0"),
        ({"channels": 0}, "shape", "channels 0"),
        ({"sequence": -1}, "shape", "sequence -1"),
        ({"width": 0}, "shape", "width is 0"),
        ({"width": 1025}, "shape", "1 to 1024"),
        ({"batch": 2**31 - 1}, "shape", "more than one grid holds"),
        ({"sequence": 2**31 - 1}, "shape", "more than one grid holds"),
    ],
)
def test_bad_sizes_of_the_convolution_are_refused(emulated_library, conv, fields, status, message):
    arguments, outputs = conv
    for name, value in fields.items():
        setattr(arguments, name, value)
    refused(emulated_library, "kimi_causal_conv", arguments, outputs, status, message)


POINTERS = {
    "attention": ("query", "key", "value", "decay", "beta", "output", "present_state"),
    "conv": ("input", "weight", "output", "present_state"),
}
OPTIONAL = {"attention": ("past_state",), "conv": ("bias", "past_state")}
CALLS = {"attention": "kimi_linear_attention", "conv": "kimi_causal_conv"}


@pytest.mark.parametrize(("op", "name"), [(op, name) for op, names in POINTERS.items() for name in names])
def test_a_null_pointer_is_refused(emulated_library, request, op, name):
    arguments, outputs = request.getfixturevalue(op)
    setattr(arguments, name, None)
    refused(emulated_library, CALLS[op], arguments, outputs, "argument", f"{name} is null")


@pytest.mark.parametrize(("op", "name"), [(op, name) for op in POINTERS for name in (*POINTERS[op], *OPTIONAL[op])])
def test_a_misaligned_pointer_is_refused(emulated_library, request, op, name):
    arguments, outputs = request.getfixturevalue(op)
    setattr(arguments, name, getattr(arguments, name) + 4)
    refused(emulated_library, CALLS[op], arguments, outputs, "argument", f"{name} is not aligned")


@pytest.mark.parametrize(("rule", "name"), [(0, "decay"), (2, "decay"), (0, "beta"), (1, "beta")])
def test_an_input_that_the_rule_does_not_take_is_refused(emulated_library, attention, rule, name):
    arguments, outputs = attention
    arguments.update_rule = rule
    setattr(arguments, {"decay": "beta", "beta": "decay"}[name], None)
    refused(emulated_library, "kimi_linear_attention", arguments, outputs, "argument", f"{name} is given")


def test_null_structs_are_refused(emulated_library):
    library = ctypes.CDLL(str(emulated_library.path))
    library.kimi_last_error.restype = ctypes.c_char_p
    for function in (library.kimi_linear_attention, library.kimi_causal_conv):
        assert function(None) == 2
        assert library.kimi_last_error() == b"arguments is null"
    assert library.kimi_linear_attention_workspace(None, None) == 2


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"key": lambda a: a[:, :1]}, "key"),
        ({"value": lambda a: a[..., :-1]}, "do not divide into heads"),
        ({"decay": lambda a: a[..., :3]}, "decay"),
        ({"beta": lambda a: a.astype(np.float16)}, "beta"),
        ({"past_state": lambda a: np.ascontiguousarray(a.swapaxes(2, 3))}, "past_state"),
        ({"query": lambda a: a[0]}, "query"),
        ({"query": lambda a: a.astype(np.float64)}, "float64"),
        ({"output": lambda a: None}, "required"),
    ],
)
def test_arrays_that_do_not_fit_are_refused_by_name(change, match):
    arrays, attributes = linear_attention_case()
    arrays |= {"output": np.zeros_like(arrays["value"]), "present_state": np.zeros_like(arrays["past_state"])}
    changed = {name: function(arrays[name]) for name, function in change.items()}
    with pytest.raises(ContractError, match=match):
        linear_attention_arguments(arrays | changed, attributes)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"update_rule": "sequential"}, "update_rule"),
        ({"q_num_heads": 0}, "q_num_heads"),
        ({"q_num_heads": 5}, "query"),
    ],
)
def test_unknown_attributes_are_refused(change, match):
    arrays, attributes = linear_attention_case()
    arrays |= {"output": np.zeros_like(arrays["value"]), "present_state": np.zeros_like(arrays["past_state"])}
    with pytest.raises(ContractError, match=match):
        linear_attention_arguments(arrays, attributes | change)


def test_arrays_of_a_convolution_are_refused_by_name():
    arrays, attributes = causal_conv_case()
    arrays |= {"output": np.zeros_like(arrays["input"]), "present_state": np.zeros_like(arrays["past_state"])}
    with pytest.raises(ContractError, match="activation"):
        causal_conv_arguments(arrays, {"activation": "relu"})
    with pytest.raises(ContractError, match="weight"):
        causal_conv_arguments(arrays | {"weight": arrays["weight"][:, 0]}, attributes)
    with pytest.raises(ContractError, match="unknown array"):
        causal_conv_arguments(arrays | {"filter": arrays["weight"]}, attributes)
