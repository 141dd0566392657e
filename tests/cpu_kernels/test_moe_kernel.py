"""The experts' CPU kernel, run by ONNX Runtime, computes both ops: the cases of the function bodies, and odd sizes."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnxruntime
import pytest

from kimi_deploy.ops.mixture_of_experts.spec import SPEC
from kimi_deploy.ops.quantized_mixture_of_experts.spec import SPEC as QUANTIZED
from kimi_deploy.ops.spec import AttributeValue
from kimi_deploy.runtime.ort_kernels import OrtKernels
from kimi_deploy.validate.tolerances import tolerance
from tests.cpu_kernels.instruction_sets import each_instruction_set
from tests.ops.body_cases import Arrays, Attributes, assert_close, moe_arrays, moe_attributes, moe_reference
from tests.ops.op_model import op_model, run, session
from tests.ops.quantized_cases import quantized_arrays, quantized_attributes, quantized_reference
from tests.ops.test_moe_body import ROUTINGS
from tests.ops.test_quantized_moe_body import FORMATS
from tests.ops.test_quantized_moe_body import ROUTINGS as QUANTIZED_ROUTINGS


def kernel(
    library: OrtKernels, arrays: Arrays, attributes: Mapping[str, AttributeValue]
) -> onnxruntime.InferenceSession:
    """A session of one node without a function body."""
    spec = QUANTIZED if "bits" in attributes else SPEC
    return session(op_model(spec, [], attributes, "float32", arrays), threads=2, kernels=library)


@pytest.mark.parametrize("routing", ROUTINGS)
def test_every_routing_matches_float64(library: OrtKernels, routing: str) -> None:
    attributes = ROUTINGS[routing]
    built = kernel(library, moe_arrays(attributes, 1, 1), attributes)
    for batch, steps in ((1, 1), (1, 2), (3, 1), (3, 17), (1, 130)):
        arrays = moe_arrays(attributes, batch, steps)
        (expected,) = moe_reference(arrays, attributes)
        for _ in each_instruction_set(library):
            assert_close(run(built, arrays)["output"], expected)


# groups and widths of inputs and activations: whole and broken chunks of every instruction set
SHAPES = ((32, 96, 64), (32, 160, 288), (64, 128, 192), (128, 384, 128))


@pytest.mark.parametrize(("bits", "symmetric", "activations"), FORMATS)
def test_every_format_and_group_matches_float64(
    library: OrtKernels, bits: int, symmetric: int, activations: str
) -> None:
    check = assert_close if activations == "float32" else assert_close_but_for_halves
    for group, hidden, intermediate in SHAPES:
        scheme = quantized_attributes(bits, symmetric, activations, group, experts=5, top_k=2)
        attributes = scheme | {"intermediate": intermediate}
        # one token and few, along rows; many, in strips
        for batch, steps in ((1, 1), (2, 5), (1, 40)):
            arrays = quantized_arrays(attributes, batch, steps, hidden)
            (expected,) = quantized_reference(arrays, attributes)
            built = kernel(library, arrays, attributes)
            for _ in each_instruction_set(library):
                check(run(built, arrays)["output"], expected)


def assert_close_but_for_halves(output: np.ndarray, expected: np.ndarray) -> None:
    """Where an activation lies halfway between two steps, its token may take either; a tenth of the tokens at most."""
    assert_close(output, expected, "layer_quantized")
    errors = np.abs(output - expected).max(axis=-1) / np.abs(expected).max()
    assert (errors <= tolerance("float32").peak).mean() >= 0.9


@pytest.mark.parametrize("routing", QUANTIZED_ROUTINGS)
def test_every_routing_of_quantised_experts_matches_float64(library: OrtKernels, routing: str) -> None:
    attributes = quantized_attributes(**QUANTIZED_ROUTINGS[routing])
    arrays = quantized_arrays(attributes, 2, 3)
    assert_close(run(kernel(library, arrays, attributes), arrays)["output"], quantized_reference(arrays, attributes)[0])


def test_any_size_matches_float64(library: OrtKernels) -> None:
    """Sizes that are no multiple of a vector, a tile or a task."""
    rng = np.random.default_rng(0)
    for _ in range(60):
        groups = int(rng.integers(1, 4))
        experts = groups * int(rng.integers(2, 6))
        kept = int(rng.integers(1, groups + 1))
        top_k = int(rng.integers(1, kept * (experts // groups) + 1))
        routing = moe_attributes(experts, top_k, groups, kept, int(rng.integers(2)))
        attributes = routing | {"intermediate": int(rng.integers(1, 90))}
        hidden, tokens = int(rng.integers(1, 150)), int(rng.choice([1, 2, 3, 9, 33, 100]))
        arrays = moe_arrays(attributes, 1, tokens, hidden=hidden)
        (expected,) = moe_reference(arrays, attributes)
        built = kernel(library, arrays, attributes)
        for _ in each_instruction_set(library):
            assert_close(run(built, arrays)["output"], expected)


@pytest.mark.parametrize("renormalize", [0, 1])
@pytest.mark.parametrize("shift", [-30.0, -50.0, 40.0])
def test_vanishing_and_saturated_scores_are_weighed_as_the_op_says(
    library: OrtKernels, shift: float, renormalize: int
) -> None:
    attributes = moe_attributes(experts=8, top_k=8, renormalize=renormalize)
    arrays = moe_arrays(attributes, 1, 5, shift)
    assert_close(run(kernel(library, arrays, attributes), arrays)["output"], moe_reference(arrays, attributes)[0])


def test_scores_that_underflow_to_zero_choose_nobody(library: OrtKernels) -> None:
    attributes = moe_attributes()
    arrays = moe_arrays(attributes, 1, 3, -200.0)
    assert not run(kernel(library, arrays, attributes), arrays)["output"].any()


@pytest.mark.parametrize("groups", [1, 4])
def test_of_equal_scores_the_lower_index_is_chosen(library: OrtKernels, groups: int) -> None:
    attributes = moe_attributes(experts=16, top_k=3, groups=groups, kept=max(1, groups // 2))
    arrays = moe_arrays(attributes, 1, 4)
    # saturated: equal scores of different logits
    arrays["router_weight"] = np.abs(arrays["router_weight"]) * 100
    arrays["hidden_states"] = np.abs(arrays["hidden_states"])
    arrays["router_bias"][:] = 0
    arrays["gate_up_weight"][3:] = np.nan
    output = run(kernel(library, arrays, attributes), arrays)["output"]
    assert_close(output, moe_reference(arrays, attributes)[0])
    assert np.isfinite(output).all()


@pytest.mark.parametrize("tokens", [1, 5, 100])
def test_no_tokens_and_all_tokens_to_one_expert(library: OrtKernels, tokens: int) -> None:
    attributes = moe_attributes(top_k=1)
    arrays = moe_arrays(attributes, 1, tokens)
    arrays["router_bias"][11] = 9
    built = kernel(library, arrays, attributes)
    assert_close(run(built, arrays)["output"], moe_reference(arrays, attributes)[0])
    empty = arrays | {"hidden_states": arrays["hidden_states"][:, :0]}
    assert run(built, empty)["output"].shape == (1, 0, 32)


@pytest.mark.parametrize("steps", [1, 40])
def test_an_expert_that_was_not_chosen_is_not_read(library: OrtKernels, steps: int) -> None:
    attributes = moe_attributes(experts=4, top_k=1)
    arrays = moe_arrays(attributes, 1, steps)
    arrays["router_bias"] = np.array([9, 0, 0, 0], np.float32)
    (expected,) = moe_reference(arrays, attributes)
    arrays["gate_up_weight"][1:] = np.nan
    assert_close(run(kernel(library, arrays, attributes), arrays)["output"], expected)


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("activations", ["float32", "int8", ""])
def test_a_value_that_is_not_finite_reaches_its_own_token_and_no_other(
    library: OrtKernels, activations: str, value: float
) -> None:
    if activations:
        attributes = quantized_attributes(4, 0, activations)
        arrays = quantized_arrays(attributes, 1, 60)
    else:
        attributes = moe_attributes()
        arrays = moe_arrays(attributes, 1, 60)
    built = kernel(library, arrays, attributes)
    expected = run(built, arrays)["output"]
    arrays["hidden_states"][0, [7, 50], 3] = value
    output = run(built, arrays)["output"]
    broken = ~np.isfinite(output).any(axis=-1)[0]
    assert np.flatnonzero(broken).tolist() == [7, 50]
    assert_close(output[:, ~broken], expected[:, ~broken].astype(np.float64))


def every_output(library: OrtKernels) -> list[np.ndarray]:
    """Outputs of both ops for one, few and many tokens."""
    plain = moe_attributes() | {"intermediate": 70}
    cases: list[tuple[Attributes, Arrays]] = [(plain, moe_arrays(plain, 1, n, hidden=90)) for n in (1, 3, 70)]
    for bits, symmetric, activations in FORMATS:
        attributes = quantized_attributes(bits, symmetric, activations, experts=5, top_k=2) | {"intermediate": 288}
        cases += [(attributes, quantized_arrays(attributes, 1, n)) for n in (1, 40)]
    return [run(kernel(library, arrays, attributes), arrays)["output"] for attributes, arrays in cases]


SINGLE = """
import os, sys
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})  # before the library counts processors
import numpy as np
from kimi_deploy.runtime.ort_kernels import OrtKernels
from tests.cpu_kernels.test_moe_kernel import every_output
np.savez(sys.argv[2], *every_output(OrtKernels.open(sys.argv[1])))
"""


def test_the_number_of_threads_changes_no_bit(library: OrtKernels, tmp_path: Path) -> None:
    file = tmp_path / "single.npz"
    subprocess.run(
        [sys.executable, "-c", SINGLE, str(library.path), str(file)], check=True, cwd=Path(__file__).parents[2]
    )
    single = np.load(file)
    outputs = every_output(library)
    assert len(outputs) == len(single.files)
    for name, output in zip(single.files, outputs, strict=True):
        assert np.array_equal(single[name], output)


def test_attributes_that_do_not_go_together_are_refused(library: OrtKernels) -> None:
    attributes = quantized_attributes(block_size=16)
    arrays = quantized_arrays(attributes, 1, 1)
    with pytest.raises(Exception, match="block_size 32, 64 or 128"):
        run(kernel(library, arrays, attributes), arrays)
    attributes = quantized_attributes()
    arrays = quantized_arrays(attributes, 1, 1)
    with pytest.raises(Exception, match="zero points do not fit the attribute symmetric"):
        run(kernel(library, arrays, attributes | {"symmetric": 1}), arrays)
    plain = moe_attributes()
    arrays = moe_arrays(plain, 1, 1)
    with pytest.raises(Exception, match="top_k, n_group and topk_group do not go together"):
        run(kernel(library, arrays, plain | {"top_k": 17}), arrays)
