"""Tokenwise computes what the nodes it stands for compute, at sizes that fit no vector, block or tile."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest

from kimi_deploy.runtime.ort_kernels import OrtKernels
from kimi_deploy.runtime.ort_session import open_session
from kimi_deploy.runtime.ort_tokenwise import NAME, fuse
from kimi_deploy.validate.tolerances import tolerance
from tests.cpu_kernels.instruction_sets import each_instruction_set
from tests.cpu_kernels.tokenwise_cases import Case, Weights, model, reference
from tests.ops.body_cases import assert_close

CASES = (
    Case(),
    Case(zero_points=False, block=64, hidden=192, intermediate=320),
    Case(bits=8, block=128, hidden=128, intermediate=384, gates=64),
    Case(bits=8, hidden=160, intermediate=96, zero_points=False),
    Case(block=128, hidden=640, intermediate=128, gates=6),
    # more blocks than lanes, and not as many again
    Case(hidden=32 * 19, intermediate=64),
)


def opened(library: OrtKernels, case: Case, weights: Weights, threads: int = 2) -> onnxruntime.InferenceSession:
    return open_session(
        Path(), "cpu", threads, 0, graph=model(case, weights).SerializeToString(), kernels=library
    )  # fmt: skip


def inputs(case: Case, batch: int, steps: int) -> dict[str, np.ndarray]:
    x, y = np.random.default_rng(steps).standard_normal((2, batch, steps, case.hidden), np.float32)
    return {"x": x, "y": y}


def outputs(session: onnxruntime.InferenceSession, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    names = [o.name for o in session.get_outputs()]
    return dict(zip(names, session.run(names, dict(arrays)), strict=True))


def test_every_node_of_the_block_becomes_one() -> None:
    for case in CASES:
        fused = model(case, Weights(case))
        assert set(fuse(fused)) == {"gates.transposed", "wide.transposed"}
        (node,) = fused.graph.node
        assert (node.op_type, node.name) == (NAME, "node_g")
        assert not {"gates", "wide", "halves"} & {i.name for i in fused.graph.initializer}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_products_of_inputs_as_they_are_match_float64(library: OrtKernels, case: Case) -> None:
    case = replace(case, int8=False)
    weights = Weights(case)
    session = opened(library, case, weights)
    for batch, steps in ((1, 1), (2, 3), (1, 9), (1, 70), (3, 200)):
        arrays = inputs(case, batch, steps)
        expected = reference(case, weights, **arrays)
        for _ in each_instruction_set(library):
            for name, output in outputs(session, arrays).items():
                assert_close(output, expected[name])


@pytest.mark.parametrize("case", CASES, ids=str)
def test_products_of_rounded_inputs_match_float64(library: OrtKernels, case: Case) -> None:
    """But for inputs halfway between two steps, where either is right: a tenth of the tokens at most."""
    weights = Weights(case)
    session = opened(library, case, weights)
    for batch, steps in ((1, 1), (2, 3), (1, 9), (1, 70), (3, 200)):
        arrays = inputs(case, batch, steps)
        expected = reference(case, weights, **arrays)
        for _ in each_instruction_set(library):
            for name, output in outputs(session, arrays).items():
                errors = np.abs(output - expected[name]).max(axis=-1) / np.abs(expected[name]).max()
                assert (errors <= tolerance("float32").peak).mean() >= 0.9
                assert_close(output, expected[name], "layer_quantized")


def test_a_pass_over_the_weights_does_not_end_at_the_first_tokens(library: OrtKernels) -> None:
    case = Case(int8=False)
    weights = Weights(case)
    arrays = inputs(case, 1, 1100)
    expected = reference(case, weights, **arrays)
    for name, output in outputs(opened(library, case, weights), arrays).items():
        assert_close(output, expected[name])


def test_no_token_is_no_work(library: OrtKernels) -> None:
    case = Case()
    assert outputs(opened(library, case, Weights(case)), inputs(case, 1, 0))["out"].shape == (1, 0, case.hidden)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_value_that_is_not_finite_reaches_its_own_token_and_no_other(library: OrtKernels, value: float) -> None:
    case = Case()
    session = opened(library, case, Weights(case))
    for steps in (2, 60):
        arrays = inputs(case, 1, steps)
        expected = outputs(session, arrays)
        arrays["x"][0, 1, 3] = value
        for name, output in outputs(session, arrays).items():
            assert np.isnan(output[0, 1]).any()
            others = np.arange(steps) != 1
            assert np.array_equal(output[:, others], expected[name][:, others])


def every_output(library: OrtKernels) -> list[np.ndarray]:
    """Of one, few and many tokens."""
    found = []
    for case in CASES[:3]:
        session = opened(library, case, Weights(case))
        found += [o for steps in (1, 3, 100) for o in outputs(session, inputs(case, 1, steps)).values()]
    return found


SINGLE = """
import os, sys
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})  # before the library counts processors
import numpy as np
from kimi_deploy.runtime.ort_kernels import OrtKernels
from tests.cpu_kernels.test_tokenwise_kernel import every_output
np.savez(sys.argv[2], *every_output(OrtKernels.open(sys.argv[1])))
"""


def test_the_number_of_threads_changes_no_bit(library: OrtKernels, tmp_path: Path) -> None:
    file = tmp_path / "single.npz"
    command = [sys.executable, "-c", SINGLE, str(library.path), str(file)]
    subprocess.run(command, check=True, cwd=Path(__file__).parents[2])
    single = np.load(file)
    found = every_output(library)
    assert len(found) == len(single.files)
    for name, output in zip(single.files, found, strict=True):
        assert np.array_equal(single[name], output)


def operators(graph: onnx.ModelProto) -> list[str]:
    fuse(graph)
    return sorted(n.op_type for n in graph.graph.node)


def test_what_fits_no_pattern_is_left_to_onnx_runtime() -> None:
    case = Case()
    # a silu that something else reads, too
    shared = model(case, Weights(case))
    shared.graph.output.append(onnx.helper.make_tensor_value_info("silu", 1, ["batch", "sequence", case.intermediate]))
    assert operators(shared) == ["Mul", "Mul", "Sigmoid", NAME, NAME]
    # a bias, which is no value of tokens
    bias = model(case, Weights(case))
    (add,) = [n for n in bias.graph.node if list(n.output) == ["out"]]
    add.input[0] = "norm"
    assert operators(bias) == ["Add", NAME]
    # blocks of another size, and a graph of float32 weights alone
    blocks = model(case, Weights(case))
    for node in blocks.graph.node:
        for attribute in node.attribute:
            if attribute.name == "block_size":
                attribute.i = 16
    assert operators(blocks).count("MatMulNBits") == 2
    plain = model(case, Weights(case))
    for node in list(plain.graph.node):
        if node.op_type == "MatMulNBits":
            plain.graph.node.remove(node)
    assert fuse(plain) == {}
    assert NAME not in {n.op_type for n in plain.graph.node}


def test_a_graph_with_an_op_between_keeps_its_order_and_its_results(library: OrtKernels) -> None:
    """A node that reads one run and is read by another may not end up within them."""
    case = Case(int8=False)
    weights = Weights(case)
    between = model(case, weights)
    (down,) = [n for n in between.graph.node if "down" in n.output]
    down.input[0] = "h2"
    between.graph.node.append(onnx.helper.make_node("Abs", ["h"], ["h2"]))
    ordered = model(case, weights)
    del ordered.graph.node[:]
    ordered.graph.node.extend([*between.graph.node[:7], between.graph.node[-1], *between.graph.node[7:-1]])
    arrays = inputs(case, 1, 5)
    graph = ordered.SerializeToString()
    plain = outputs(open_session(Path(), "cpu", 1, 0, graph=graph), arrays)
    for name, output in outputs(open_session(Path(), "cpu", 1, 0, graph=graph, kernels=library), arrays).items():
        assert_close(output, plain[name].astype(np.float64))
    assert operators(ordered) == ["Abs", NAME, NAME]


PROGRAMS = {
    "input 0 96": "the program is empty",
    "input 0 96\nadd 0 1": "wrong line: add 0 1",
    "input 0 96\nhalve 0": "wrong line: halve 0",
    "input 0 96\npart 0 90 7\noutput 1": "wrong line: part 0 90 7",
    "input 0 96\nproduct 0 128 4 48 1 1 2\noutput 1": "96 columns in blocks of 48 with 4 bits|blocks of 48",
    "input 0 96\nproduct 0 127 4 32 1 1 1\noutput 1": "elements; expected",
    "input 0 96\nnorm 0 500 1e-5\noutput 1": "no port 500",
    "input 0 96\nnorm 0 0 1e-5\noutput 1": "input 0 is no constant",
}


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda p: p.splitlines()[-1])
def test_a_program_that_is_none_is_refused(library: OrtKernels, program: str) -> None:
    case = Case()
    graph = model(case, Weights(case))
    node = onnx.helper.make_node(NAME, ["x", "up_levels", "up_scales", "up_zeros"], ["out"], domain="kimi")
    node.attribute.append(onnx.helper.make_attribute("program", program))
    del graph.graph.node[:]
    graph.graph.node.append(node)
    del graph.graph.output[1:]
    options = onnxruntime.SessionOptions()
    library.register(options)
    options.log_severity_level = 4
    with pytest.raises(Exception, match=PROGRAMS[program]):
        onnxruntime.InferenceSession(graph.SerializeToString(), options, providers=["CPUExecutionProvider"])


def test_inputs_of_other_sizes_are_refused(library: OrtKernels) -> None:
    case = Case()
    session = opened(library, case, Weights(case))
    arrays = inputs(case, 1, 4)
    with pytest.raises(Exception, match="another number of tokens"):
        session.run(None, arrays | {"y": arrays["y"][:, :3]})
