"""The plugins in the registry of the full TensorRT, 10 and 11: of its lean runtime, the one part of it on PyPI.

It cannot build engines, and wants a GPU to run one; its registry needs neither. It loads the library, and creates C++
plugins by TensorRT's own binary interface; the Python plugins are classes of its bindings. Each test is a process of
its own.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from kimi_deploy.engine.plugin_library import FILES
from tests.capabilities import LEAN_RUNTIMES, needs_lean_runtimes, needs_tensorrt_headers

pytestmark = [needs_lean_runtimes, needs_tensorrt_headers]

ROOT = Path(__file__).parents[2]
PRELUDE = """
import ctypes, sys
from pathlib import Path
library, runtime = sys.argv[1:]
sys.path.insert(0, runtime)
import tensorrt_lean_libs
import tensorrt_lean_bindings.tensorrt_lean as trt
from kimi_deploy.engine.backend import Backend
from kimi_deploy.engine.plugin_fields import read_fields, write_fields
from kimi_deploy.ops.plugins import ABI_FIELD, PLUGINS
from kimi_deploy.ops.standard import OptionalAttribute
backend = Backend("tensorrt", trt, Path(runtime).name, trt.Logger())
OURS = sorted(PLUGINS)

def registered():
    return sorted(c.name for c in backend.registry.all_creators if c.name in OURS)

def creator(name):
    return backend.registry.get_creator(name, PLUGINS[name].version, PLUGINS[name].namespace)

def create(name, values, phase="BUILD"):
    fields, arrays = write_fields(trt, PLUGINS[name], values)
    return creator(name).create_plugin("node", fields, getattr(trt.TensorRTPhase, phase))
"""


@pytest.fixture(params=sorted(LEAN_RUNTIMES))
def runtime(request: pytest.FixtureRequest) -> Path:
    return LEAN_RUNTIMES[request.param]


@pytest.fixture
def library(plugin_build: Path) -> Path:
    return plugin_build / FILES["emulated"]


def run(code: str, library: Path, runtime: Path) -> str:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", PRELUDE + code, str(library), str(runtime)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_dlopen_and_load_library_register_every_plugin_once(library: Path, runtime: Path) -> None:
    run(
        """
assert registered() == []
ctypes.CDLL(library)
assert registered() == OURS
handle = backend.registry.load_library(library)
assert registered() == OURS
backend.registry.load_library(library)
assert registered() == OURS
backend.registry.deregister_library(handle)
assert registered() == []
""",
        library,
        runtime,
    )


def test_every_plugin_is_created_from_the_fields_of_a_node_and_of_a_plan(library: Path, runtime: Path) -> None:
    """Those of a plan are what the Python plugin has serialised."""
    run(
        """
from kimi_deploy.engine.plugin import creator_class
from tests.plugins.drive import sample_fields
backend.registry.load_library(library)
for name, spec in PLUGINS.items():
    assert [f.name for f in creator(name).field_names] == [f.name for f in spec.fields], name
    fields = sample_fields(spec)
    plugin = create(name, fields)
    core, build = (plugin.get_capability_interface(getattr(trt.PluginCapabilityType, c)) for c in ("CORE", "BUILD"))
    assert (core.plugin_name, core.plugin_version, core.plugin_namespace) == (name, spec.version, spec.namespace)
    assert build.num_outputs == len(spec.op.outputs)
    given, arrays = write_fields(trt, spec, fields)
    python = creator_class(backend, spec)().create_plugin("node", given, trt.TensorRTPhase.BUILD)
    assert creator(name).create_plugin("node", python.get_fields_to_serialize(), trt.TensorRTPhase.RUNTIME), name
    for required in spec.op.attributes:
        if not isinstance(required, OptionalAttribute):
            assert create(name, {k: v for k, v in fields.items() if k != required.name}) is None, required.name
""",
        library,
        runtime,
    )


def test_a_node_of_another_abi_is_refused_with_both(library: Path, runtime: Path) -> None:
    said = run(
        """
backend.registry.load_library(library)
from tests.engine.plugin_driver import FIELDS
assert create("KimiDeltaAttention", FIELDS) is not None
assert create("KimiDeltaAttention", FIELDS | {ABI_FIELD: "0" * 16}) is None
print(PLUGINS["KimiDeltaAttention"].op.abi)
""",
        library,
        runtime,
    )
    abi = said.splitlines()[0]
    assert "graph: 0000000000000000" in said
    assert f"library: {abi}" in said
    assert "fix:" in said


def test_python_plugins_register_and_run_from_their_plan(library: Path, runtime: Path) -> None:
    run(
        """
import numpy as np
from kimi_deploy.engine.plugin import creator_class
from kimi_deploy.engine.plugin_executors import TorchExecutor
from kimi_deploy.engine.plugin_registry import register_plugins
from tests.engine.plugin_driver import ATTRIBUTES, FIELDS, NUMPY, PLUGIN, input_arrays
from tests.kernels.cases import check, oracle

register_plugins(backend, "python")
assert registered() == OURS
assert create("KimiDeltaAttention", FIELDS) is not None

def described(array):
    desc = trt.PluginTensorDesc()
    desc.dims = array.shape
    desc.type = getattr(trt.DataType, next(n for n, kind in NUMPY.items() if kind == array.dtype))
    return desc

def dynamic(array):
    desc = trt.DynamicPluginTensorDesc()
    desc.desc = described(array)
    desc.min = desc.opt = desc.max = array.shape
    return desc

# of that TensorRT's types, on host memory
on_host = creator_class(backend, PLUGIN)(TorchExecutor("cpu"))
inputs = input_arrays("FLOAT", 2, 5)
names = [p.name for p in PLUGIN.op.inputs]
symbols = PLUGIN.op.bind({n: a.shape for n, a in zip(names, inputs)}, ATTRIBUTES)
outputs = [np.full(s, np.nan, np.float32) for s in PLUGIN.op.output_shapes(symbols)]
fields, arrays = write_fields(trt, PLUGIN, FIELDS)
built = on_host.create_plugin("node", fields, trt.TensorRTPhase.BUILD)
built.configure_plugin([dynamic(a) for a in inputs], [dynamic(a) for a in outputs])
plan = built.get_fields_to_serialize()
written, given = read_fields(trt, PLUGIN, plan), read_fields(trt, PLUGIN, fields)
assert all(written[name] == given[name] for name in FIELDS)
plugin = on_host.create_plugin("node", plan, trt.TensorRTPhase.RUNTIME)
described_in, described_out = [described(a) for a in inputs], [described(a) for a in outputs]
plugin.on_shape_change(described_in, described_out)
plugin.enqueue(described_in, described_out, [a.ctypes.data for a in inputs], [a.ctypes.data for a in outputs], 0, 0)
results = {p.name: a for p, a in zip(PLUGIN.op.outputs, outputs)}
check(results, oracle(dict(zip(names, inputs)), ATTRIBUTES), "kda_decode_float32")
""",
        library,
        runtime,
    )
