"""One list of cases for every implementation of the op: reference, Triton and CUDA, without a GPU and on one."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import pytest

from .cases import DISTRIBUTIONS, GATES, LENGTHS, check, make_case, oracle
from .oracles import ORACLES

OF_STEPS = ("qkv", "decay", "beta", "output_gate")
STATES = ("conv_state", "recurrent_state")
LONG = 500


@lru_cache(maxsize=4)
def solved(**options):
    """The case and the float64 recurrence of it; implementations come to it one after the other."""
    arrays, attributes = make_case(**options)
    return arrays, attributes, oracle(arrays, attributes)


def bits(array):
    return np.ascontiguousarray(array).view(np.uint8)


def same_bits(a, b):
    for name in b:
        np.testing.assert_array_equal(bits(a[name]), bits(b[name]), name)


def alone(arrays, n, steps):
    """Row `n` by itself, its first `steps` steps."""
    part = {name: arrays[name][n : n + 1, :steps] for name in OF_STEPS}
    part |= {f"past_{state}": arrays[f"past_{state}"][n : n + 1] for state in STATES}
    return {name: a for name, a in arrays.items() if name != "sequence_lengths"} | part


def in_pieces(implementation, arrays, attributes, lengths):
    """Calls of `lengths` steps, each on the states of the one before; outputs joined."""
    arrays, outputs, start = dict(arrays), [], 0
    for length in lengths:
        part = {name: np.ascontiguousarray(arrays[name][:, start : start + length]) for name in OF_STEPS}
        result = implementation.run(arrays | part, attributes, in_place=implementation.in_place)
        arrays |= {f"past_{state}": result[f"present_{state}"] for state in STATES}
        outputs.append(result["output"])
        start += length
    return result | {"output": np.concatenate(outputs, axis=1)}


@pytest.mark.parametrize(
    ("steps", "gate"),
    [(steps, gate) for steps in LENGTHS for gate in GATES if steps < max(LENGTHS) or gate == "softplus"],
)
def test_any_length(implementation, steps, gate):
    options = {"steps": steps, "gate": gate, "heads": 1 if steps >= LONG else 2, "seed": steps}
    arrays, attributes, expected = solved(**options)
    bounds = implementation.bounds("bfloat16", steps, "plain")
    check(implementation.run(arrays, attributes), expected, bounds)


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_hostile_inputs(implementation, distribution, gate):
    arrays, attributes, expected = solved(steps=130, gate=gate, distribution=distribution)
    bounds = implementation.bounds("bfloat16", 130, distribution)
    check(implementation.run(arrays, attributes), expected, bounds)


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("steps", [1, 40])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_any_data_type(implementation, dtype, steps, dim):
    if dtype not in implementation.dtypes:
        return  # refused; test_errors.py
    arrays, attributes, expected = solved(steps=steps, dim=dim, dtype=dtype, distribution="correlated")
    check(implementation.run(arrays, attributes), expected, implementation.bounds(dtype, steps, "correlated"))


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize(
    "lengths", [(17, 33), (1, 2, 47), (32, 18), (1,) * 50], ids=lambda x: "+".join(map(str, x[:4]))
)
def test_a_run_is_its_pieces(implementation, lengths, gate):
    arrays, attributes, expected = solved(steps=50, gate=gate, distribution="slow")
    pieces = in_pieces(implementation, arrays, attributes, lengths)
    check(pieces, expected, implementation.bounds("bfloat16", 50, "slow"))


LENGTHS_OF_ROWS = (17, 0, 1, 40, 16)


def ragged_case():
    arrays, attributes = make_case(batch=5, steps=40)
    for n, length in enumerate(LENGTHS_OF_ROWS):
        for name in OF_STEPS:
            arrays[name][n, length:] = np.nan
    # what an addition would lose
    arrays["past_recurrent_state"][1, 0, 0, 0] = -0.0
    arrays["past_conv_state"][1, 0, 0] = -0.0
    return arrays | {"sequence_lengths": np.array(LENGTHS_OF_ROWS, np.int32)}, attributes


def test_padding_is_inert_whatever_it_holds(implementation):
    """Rows of 0 and 1 steps among others: NaN in the padding, each row as by itself, zero output, idle states kept."""
    arrays, attributes = ragged_case()
    result = implementation.run(arrays, attributes)
    for n, length in enumerate(LENGTHS_OF_ROWS):
        assert (bits(result["output"][n, length:]) == 0).all()
        of_row = {name: a[n : n + 1, :length] if name == "output" else a[n : n + 1] for name, a in result.items()}
        if length == 0:
            for state in STATES:
                np.testing.assert_array_equal(
                    bits(of_row[f"present_{state}"]), bits(arrays[f"past_{state}"][n : n + 1])
                )
        else:
            bounds = implementation.bounds("bfloat16", 40, "plain")
            check(of_row, oracle(alone(arrays, n, length), attributes), bounds)


@pytest.mark.parametrize("steps", [1, 5, 40])
def test_states_in_place_have_the_same_bits(implementation, steps):
    if not implementation.in_place:
        return  # the reference returns new states, always
    arrays, attributes = make_case(batch=2, steps=steps)
    arrays["sequence_lengths"] = np.array([steps, min(steps, 2) - 1], np.int32)
    same_bits(implementation.run(arrays, attributes, in_place=True), implementation.run(arrays, attributes))


@pytest.mark.parametrize("steps", [1, 40])
def test_two_runs_have_the_same_bits(implementation, steps):
    arrays, attributes = make_case(batch=2, steps=steps)
    same_bits(implementation.run(arrays, attributes), implementation.run(arrays, attributes))


@pytest.mark.parametrize("steps", [1, 17, 65])
@pytest.mark.parametrize("name", ORACLES)
def test_every_oracle_says_the_same_of_an_implementation(implementation, name, steps):
    arrays, attributes = make_case(batch=2, steps=steps, seed=7)
    check(
        implementation.run(arrays, attributes),
        ORACLES[name](arrays, attributes),
        implementation.bounds("bfloat16", steps, "plain"),
    )


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_the_oracles_agree(distribution, gate):
    for steps in (3, 70):
        arrays, attributes = make_case(steps=steps, gate=gate, dtype="float32", distribution=distribution)
        expected = oracle(arrays, attributes)
        for name, of_other in ORACLES.items():
            if name == "transformers_chunk" and distribution == "vanishing":
                continue  # it takes differences of sums of g: beside -1e4 a slow decay has no digits left in float32
            check(of_other(arrays, attributes), expected, ("float32", "float32"))
