"""The plugin library in real TensorRT-RTX: however it is loaded, with other people's graphs, beside the Python plugins.

Each test is a process of its own: a plugin stays registered for the life of the process.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from kimi_deploy.engine.plugin_library import FILES
from kimi_deploy.ops.registry import OPS
from tests.capabilities import needs_tensorrt_headers, needs_tensorrt_rtx

pytestmark = [needs_tensorrt_rtx, needs_tensorrt_headers]

ROOT = Path(__file__).parents[2]
PRELUDE = """
import ctypes, json, logging, shutil, sys
from pathlib import Path
from kimi_deploy.engine.backend import load
from kimi_deploy.engine.network import plugin_layers
logging.basicConfig(level=logging.ERROR)
library, folder = sys.argv[1], Path(sys.argv[2])
OURS = ["CausalConvWithState", "KimiDeltaAttention", "LinearAttention"]

def registered(backend):
    return sorted(c.name for c in backend.registry.all_creators if c.name in OURS)

def parse(backend, path):
    trt = backend.module
    builder = trt.Builder(backend.logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, backend.logger)
    return builder, network, parser, parser.parse_from_file(str(path))
"""


@pytest.fixture
def library(plugin_build: Path) -> Path:
    return plugin_build / FILES["emulated"]


def run(code: str, library: Path, folder: Path) -> str:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", PRELUDE + code, str(library), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_dlopen_registers_and_a_second_load_changes_nothing(library: Path, tmp_path: Path) -> None:
    run(
        """
backend = load("tensorrt-rtx")
assert registered(backend) == []
ctypes.CDLL(library)
assert registered(backend) == OURS
ctypes.CDLL(library)
assert registered(backend) == OURS
# another file of it, as from another installation
copy = shutil.copy(library, folder / "libkimi_plugins_copy.so")
second = ctypes.CDLL(copy)
second.kimi_plugins_error.restype = ctypes.c_char_p
assert b"registered already" in second.kimi_plugins_error()
assert registered(backend) == OURS
# and through the registry's own way
backend.registry.load_library(library)
assert registered(backend) == OURS
""",
        library,
        tmp_path,
    )


def test_load_library_registers_and_deregisters(library: Path, tmp_path: Path) -> None:
    run(
        """
backend = load("tensorrt-rtx")
handle = backend.registry.load_library(library)
assert handle is not None
assert registered(backend) == OURS
backend.registry.load_library(library)
assert registered(backend) == OURS
backend.registry.deregister_library(handle)
assert registered(backend) == []
""",
        library,
        tmp_path,
    )


def test_a_library_that_came_before_tensorrt_registers_when_asked(library: Path, tmp_path: Path) -> None:
    run(
        """
early = ctypes.CDLL(library)
early.kimi_plugins_error.restype = ctypes.c_char_p
assert early.kimi_plugins_error() == b"this process has loaded no TensorRT"
backend = load("tensorrt-rtx")
assert registered(backend) == []
assert early.kimi_plugins_register() == 1
assert early.kimi_plugins_error() == b""
assert registered(backend) == OURS
""",
        library,
        tmp_path,
    )


def test_one_kind_of_plugins_a_process(library: Path, tmp_path: Path) -> None:
    run(
        """
from kimi_deploy.engine.plugin_registry import register_plugins
from kimi_deploy.errors import EngineError
backend = load("tensorrt-rtx")
register_plugins(backend, "native", library=Path(library))
register_plugins(backend, "native", library=Path(library))
assert registered(backend) == OURS
try:
    register_plugins(backend, "python")
    raise SystemExit("both kinds")
except EngineError as error:
    assert "native plugins are registered" in str(error)
""",
        library,
        tmp_path,
    )
    run(
        """
from kimi_deploy.engine.plugin_library import PluginLibrary
from kimi_deploy.engine.plugin_registry import register_plugins
from kimi_deploy.errors import EngineError
backend = load("tensorrt-rtx")
register_plugins(backend, "python")
try:
    PluginLibrary.open(library).register()
    raise SystemExit("both kinds")
except EngineError as error:
    assert "registered already by something else" in str(error)
""",
        library,
        tmp_path,
    )


def test_a_library_of_another_abi_is_refused_with_both_hashes(library: Path, tmp_path: Path) -> None:
    abi = OPS["KimiDeltaAttention"].abi
    other = tmp_path / "libkimi_plugins.so"
    other.write_bytes(library.read_bytes().replace(abi.encode(), b"0123456789abcdef"))
    said = run(
        """
from kimi_deploy.engine.plugin_library import PluginLibrary
from kimi_deploy.errors import EngineError
try:
    PluginLibrary.open(library)
    raise SystemExit("not refused")
except EngineError as error:
    print(error)
""",
        other,
        tmp_path,
    )
    assert all(text in said for text in ("0123456789abcdef", abi, "make plugins")), said


def linear_attention_graph(path: Path, dtype: str, *, absent: bool = False, domain: str = "") -> None:
    """A gated delta net as another exporter writes it, by hand: convolution with state, then attention with state.

    Qwen's sizes in small: twice as many states as query and key heads, a decay a head. `absent`: the optional inputs
    that may be absent are.
    """
    kind = {"float32": TensorProto.FLOAT, "float16": TensorProto.FLOAT16, "bfloat16": TensorProto.BFLOAT16}[dtype]
    heads, states, size, channels = 2, 4, 16, 128
    numpy = np.dtype(ml_dtypes.bfloat16) if dtype == "bfloat16" else np.dtype(dtype)

    def weight(name: str, *shape: int) -> TensorProto:
        values = np.random.default_rng(0).standard_normal(shape).astype(numpy)
        return helper.make_tensor(name, kind, shape, values.tobytes(), raw=True)

    value_info = helper.make_tensor_value_info
    inputs = [
        value_info("x", kind, ["batch", channels, "steps"]),
        value_info("decay", kind, ["batch", "steps", states]),
        value_info("beta", kind, ["batch", "steps", states]),
        value_info("past_conv", kind, ["batch", channels, 3]),
    ]
    if not absent:
        inputs.append(value_info("past_state", TensorProto.FLOAT, ["batch", states, size, size]))
    state_kind = kind if absent else TensorProto.FLOAT
    outputs = [
        value_info("y", kind, ["batch", "steps", states * size]),
        value_info("present_conv", kind, ["batch", channels, 3]),
        value_info("present_state", state_kind, ["batch", states, size, size]),
    ]
    widths = [heads * size, heads * size, states * size]
    conv_inputs = ["x", "w", "" if absent else "bias", "past_conv"]
    attention_inputs = ["q", "k", "v", "" if absent else "past_state", "" if absent else "decay", "beta"]
    rule = "delta" if absent else "gated_delta"
    attributes = {"q_num_heads": heads, "kv_num_heads": states, "update_rule": rule}
    nodes = [
        helper.make_node("CausalConvWithState", conv_inputs, ["c", "present_conv"], domain=domain, activation="silu"),
        helper.make_node("Transpose", ["c"], ["t"], perm=[0, 2, 1]),
        helper.make_node("Split", ["t", "widths"], ["q", "k", "v"], axis=2),
        helper.make_node("LinearAttention", attention_inputs, ["y", "present_state"], domain=domain, **attributes),
    ]
    constants = [
        weight("w", channels, 1, 4),
        weight("bias", channels),
        helper.make_tensor("widths", TensorProto.INT64, [3], widths),
    ]
    graph = helper.make_graph(nodes, "other", inputs, outputs, constants)
    imports = [helper.make_opsetid("", 27), *([helper.make_opsetid(domain, 1)] if domain else [])]
    onnx.save(helper.make_model(graph, opset_imports=imports, ir_version=11), path)


BUILD = """
backend = load("tensorrt-rtx")
trt = backend.module
ctypes.CDLL(library)
builder, network, parser, ok = parse(backend, folder / "model.onnx")
assert ok, backend.logger.errors
assert plugin_layers(backend, network) == {"CausalConvWithState": 1, "LinearAttention": 1}
config = builder.create_builder_config()
config.num_compute_capabilities = 1
config.set_compute_capability(trt.ComputeCapability.SM89, 0)
for steps in ((1, 8, 32), (1, 1, 1)):
    profile = builder.create_optimization_profile()
    for index in range(network.num_inputs):
        tensor = network.get_input(index)
        sizes = [{0: batch, 1: t if tensor.name != "x" else None, 2: t if tensor.name == "x" else None}
                 for batch, t in zip((1, 1, 2), steps)]
        shapes = [[s if s > 0 else size[i] for i, s in enumerate(tensor.shape)] for size in sizes]
        profile.set_shape(tensor.name, *shapes)
    config.add_optimization_profile(profile)
plan = builder.build_serialized_network(network, config)
assert plan is not None, backend.logger.errors
assert bytes(plan).count(b"LinearAttention") >= 1
"""


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_a_graph_of_another_exporter_becomes_an_engine(library: Path, tmp_path: Path, dtype: str) -> None:
    linear_attention_graph(tmp_path / "model.onnx", dtype)
    run(BUILD, library, tmp_path)


@pytest.mark.parametrize("domain", ["", "com.microsoft"])
def test_a_graph_with_absent_inputs_becomes_one_after_it_was_completed(
    library: Path, tmp_path: Path, domain: str
) -> None:
    linear_attention_graph(tmp_path / "raw.onnx", "float16", absent=True, domain=domain)
    refused = run(
        """
backend = load("tensorrt-rtx")
ctypes.CDLL(library)
assert not parse(backend, folder / "raw.onnx")[3]
""",
        library,
        tmp_path,
    )
    assert "Could not add" in refused
    command = [sys.executable, "-m", "kimi_deploy.onnx.standard_nodes", "raw.onnx", "model.onnx"]
    subprocess.run(command, check=True, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)})
    run(BUILD, library, tmp_path)


def test_polygraphy_builds_with_the_library_and_inspects(library: Path, tmp_path: Path) -> None:
    linear_attention_graph(tmp_path / "model.onnx", "float16")
    environment = os.environ | {"PYTHONPATH": str(ROOT), "POLYGRAPHY_USE_TENSORRT_RTX": "1"}
    # the wheel's parser needs a name that only kimi_deploy serves; see docs/plugins.md
    start = "from kimi_deploy.engine.backend import load; load('tensorrt-rtx'); from polygraphy.tools import main; main()"

    def polygraphy(*arguments: str) -> str:
        command = [sys.executable, "-c", start, *arguments, f"--plugins={library}"]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    shapes = ["x:[1,128,8]", "decay:[1,8,4]", "beta:[1,8,4]", "past_conv:[1,128,3]", "past_state:[1,4,16,16]"]
    bounds = [f"{option}={shapes[0]}" for option in ()]
    assert not bounds
    text = polygraphy("inspect", "model", "model.onnx", "--model-type=onnx", "--convert-to=trt", "--show=layers", "--strongly-typed")
    assert "LinearAttention" in text
    polygraphy("convert", "model.onnx", "--convert-to=trt", "--strongly-typed", "-o", "engine.plan", "--trt-min-shapes", *shapes, "--trt-opt-shapes", *shapes, "--trt-max-shapes", *shapes)
    assert (tmp_path / "engine.plan").stat().st_size > 0
