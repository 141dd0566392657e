"""The plugin library in real TensorRT-RTX: however it is loaded, with other people's graphs, beside the Python plugins.

Each test is a process of its own: a plugin stays registered for the life of the process.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import onnx_ir as ir
import pytest
from onnx import TensorProto

from kimi_deploy.contract import DTYPES, Dtype
from kimi_deploy.engine.plugin_library import FILES
from kimi_deploy.engine.standard_nodes import prepare_standard_nodes
from kimi_deploy.onnx.export import export_model
from kimi_deploy.ops.registry import OPS
from tests.capabilities import needs_tensorrt_headers, needs_tensorrt_rtx
from tests.configs import config
from tests.engine.conftest import no_progress
from tests.engine.other_exporter import Domain, GatedDeltaNet
from tests.models import write_model

pytestmark = [needs_tensorrt_rtx, needs_tensorrt_headers]

ROOT = Path(__file__).parents[2]
PRELUDE = """
import ctypes, json, logging, shutil, sys
from pathlib import Path
from kimi_deploy.engine.backend import load
from kimi_deploy.engine.network import plugin_layers
logging.basicConfig(level=logging.ERROR)
library, folder = sys.argv[1], Path(sys.argv[2])
OURS = ["CausalConvWithState", "KimiDeltaAttention", "LinearAttention", "MixtureOfExperts"]

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


LAYER = GatedDeltaNet()


def other_graph(path: Path, dtype: Dtype, domain: Domain) -> None:
    """A Qwen-like layer of another exporter: fewer key heads than states, a decay a head, both states."""
    kinds = {"float32": TensorProto.FLOAT, "float16": TensorProto.FLOAT16, "bfloat16": TensorProto.BFLOAT16}
    model = ir.from_proto(LAYER.model(domain, kinds[dtype]))
    prepare_standard_nodes(model)
    ir.save(model, path)


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
for steps in (32, 1):
    profile = builder.create_optimization_profile()
    for index in range(network.num_inputs):
        tensor = network.get_input(index)
        largest = {0: 2, 1: steps}
        shapes = [[s if s > 0 else (1 if small else largest[i]) for i, s in enumerate(tensor.shape)]
                  for small in (True, False, False)]
        profile.set_shape(tensor.name, *shapes)
    config.add_optimization_profile(profile)
plan = builder.build_serialized_network(network, config)
assert plan is not None, backend.logger.errors
assert b"LinearAttention" in bytes(plan) and b"CausalConvWithState" in bytes(plan)
"""


@pytest.mark.parametrize(("dtype", "domain"), [(DTYPES[0], ""), (DTYPES[1], "com.microsoft"), (DTYPES[2], "")])
def test_a_graph_of_another_exporter_becomes_an_engine(
    library: Path, tmp_path: Path, dtype: Dtype, domain: Domain
) -> None:
    other_graph(tmp_path / "model.onnx", dtype, domain)
    run(BUILD, library, tmp_path)


def test_the_demo_model_gets_the_librarys_plugins_in_every_dtype(library: Path, tmp_path: Path) -> None:
    for dtype in DTYPES:
        export_model(
            ROOT / "models" / "demo",
            tmp_path / dtype,
            dtype=dtype,
            flavour="ort",
            overwrite=False,
            progress=no_progress,
        )
    run(
        """
from dataclasses import replace
from kimi_deploy.contract import DTYPES
from kimi_deploy.engine.engine_from_onnx import build_engine
from kimi_deploy.engine.plugin_registry import register_plugins
from tests.engine.conftest import RECIPE, no_progress

register_plugins(load("tensorrt-rtx"), "native", library=Path(library))
for dtype in DTYPES:
    recipe = replace(RECIPE, plugin="native", plugin_ops=())
    manifest = build_engine(folder / dtype, folder / "engine", recipe, overwrite=True, progress=no_progress)
    assert manifest.details["plugins"] == {"KimiDeltaAttention": 3, "MixtureOfExperts": 3}
    assert manifest.details["dtype"] == dtype
""",
        library,
        tmp_path,
    )


def test_a_whole_model_gets_the_librarys_plugins(library: Path, tmp_path: Path) -> None:
    """Prefill and decode of a model with a KDA layer, states aliased; with another ABI on the node it is refused."""
    sizes = config("KM", linear_attn_config={"head_dim": 64})
    write_model(tmp_path / "model", sizes, tokenizer=False)
    folder = tmp_path / "export"
    export_model(tmp_path / "model", folder, dtype="float16", flavour="ort", overwrite=False, progress=no_progress)
    said = run(
        """
import onnx
from dataclasses import replace
from kimi_deploy.engine.engine_from_onnx import build_engine
from kimi_deploy.engine.plugin_registry import register_plugins
from kimi_deploy.errors import EngineError
from kimi_deploy.manifest import Manifest
from tests.engine.conftest import RECIPE, no_progress

register_plugins(load("tensorrt-rtx"), "native", library=Path(library))
recipe = replace(RECIPE, plugin="native", plugin_ops=(), in_place_state=True)
manifest = build_engine(folder / "export", folder / "engine", recipe, overwrite=False, progress=no_progress)
assert manifest.details["plugins"] == {"KimiDeltaAttention": 1, "MixtureOfExperts": 1}
plan = (folder / "engine" / "engine.plan").read_bytes()
assert manifest.op_abi["KimiDeltaAttention"].encode() in plan
assert b"workspace_blocks" in plan

model = onnx.load(folder / "export" / "model.onnx", load_external_data=False)
for node in model.graph.node:
    for attribute in node.attribute:
        if node.op_type == "KimiDeltaAttention" and attribute.name == "abi":
            attribute.s = b"0123456789abcdef"
onnx.save(model, folder / "export" / "model.onnx")
Manifest.read(folder / "export").write(folder / "export")
try:
    build_engine(folder / "export", folder / "other", recipe, overwrite=False, progress=no_progress)
    raise SystemExit("not refused")
except EngineError as error:
    print(error)
""",
        library,
        tmp_path,
    )
    assert all(text in said for text in ("0123456789abcdef", OPS["KimiDeltaAttention"].abi, "fix: export")), said


def test_what_python_plugins_serialise_makes_the_librarys_plugins(library: Path, tmp_path: Path) -> None:
    """As when a plan is read; test_kda_plugin.py shows that the bytes are the same the other way round."""
    run(
        """
from kimi_deploy.engine.plugin import creator_class
from kimi_deploy.engine.plugin_fields import write_fields
from kimi_deploy.ops.plugins import PLUGINS
from tests.plugins.drive import sample_fields
backend = load("tensorrt-rtx")
trt = backend.module
backend.registry.load_library(library)
for plugin in PLUGINS.values():
    given, arrays = write_fields(trt, plugin, sample_fields(plugin))
    own = creator_class(backend, plugin)().create_plugin("layer", given, trt.TensorRTPhase.BUILD)
    native = backend.registry.get_creator(plugin.op.name, plugin.version, plugin.namespace)
    made = native.create_plugin("layer", own.get_fields_to_serialize(), trt.TensorRTPhase.RUNTIME)
    assert made is not None, backend.logger.errors
    core = made.get_capability_interface(trt.PluginCapabilityType.CORE)
    assert (core.plugin_name, core.plugin_namespace) == (plugin.op.name, plugin.namespace)
""",
        library,
        tmp_path,
    )


def test_polygraphy_inspects_and_builds_with_the_library(library: Path, tmp_path: Path) -> None:
    other_graph(tmp_path / "model.onnx", "float16", "")
    environment = os.environ | {"PYTHONPATH": str(ROOT), "POLYGRAPHY_USE_TENSORRT_RTX": "1"}

    def polygraphy(*arguments: str) -> str:
        command = [sys.executable, "-m", "kimi_deploy.engine.polygraphy_tools", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    common = ["model.onnx", "--convert-to=trt", "--strongly-typed", f"--plugins={library}"]
    assert "PLUGIN_V3" in polygraphy("inspect", "model", *common, "--show=layers")
    shapes = [f"{name}:[{','.join(map(str, a.shape))}]" for name, a in LAYER.inputs(1, 8).items()]
    bounds = [x for bound in ("min", "opt", "max") for x in (f"--trt-{bound}-shapes", *shapes)]
    polygraphy("convert", *common, "-o", "engine.plan", *bounds)
    assert b"LinearAttention" in (tmp_path / "engine.plan").read_bytes()
