"""Python plugins over the kernels' C ABI: the ops' results, with workspace, on host memory and without torch."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kimi_deploy.engine.plugin import creator_class
from kimi_deploy.engine.plugin_call import Executor
from kimi_deploy.engine.plugin_executors import ChosenExecutor, KernelExecutor, TorchExecutor
from kimi_deploy.engine.plugin_fields import write_fields
from kimi_deploy.errors import BackendError, ContractError, EngineError
from kimi_deploy.ops.plugins import ABI_FIELD, PLUGINS, WORKSPACE_BLOCK
from kimi_deploy.ops.spec import AttributeValue
from kimi_deploy.validate.compare import compare
from kimi_deploy.validate.tolerances import tolerance
from tests.capabilities import needs_tensorrt_rtx
from tests.engine.plugin_driver import NUMPY, backend, dynamic_desc, tensor_desc
from tests.kernels.cases import check, make_case, oracle
from tests.kernels.moe_cases import check_moe, moe_case
from tests.kernels.standard_cases import (
    causal_conv_case,
    causal_conv_oracle,
    check_causal_conv,
    check_linear_attention,
    linear_attention_case,
    linear_attention_oracle,
)

pytestmark = needs_tensorrt_rtx

ROOT = Path(__file__).parents[2]


def plugin_of(executor: Executor, op: str, fields: Mapping[str, AttributeValue]) -> Any:
    trt = backend().module
    collection, arrays = write_fields(trt, PLUGINS[op], fields)
    plugin = creator_class(backend(), PLUGINS[op])(executor).create_plugin("node", collection, trt.TensorRTPhase.BUILD)
    del arrays
    return plugin


def run(plugin: Any, op: str, inputs: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
    """Configure, size, and enqueue on host memory; outputs and a workspace of exactly the asked size start as NaN."""
    spec = PLUGINS[op].op
    descs = [dynamic_desc(a) for a in inputs]
    plugin.configure_plugin(descs, [])
    size = plugin.get_workspace_size(descs, [])
    plugin.on_shape_change([tensor_desc(a) for a in inputs], [])
    names = [p.name for p in spec.inputs]
    shapes = spec.output_shapes(spec.bind({n: a.shape for n, a in zip(names, inputs, strict=False)}, plugin.attributes))
    kinds = plugin.get_output_data_types([d.desc.type for d in descs])
    outputs = [np.full(s, np.nan, NUMPY[k.name]) for s, k in zip(shapes, kinds, strict=True)]
    workspace = np.full(size + WORKSPACE_BLOCK, 0xFF, np.uint8)
    start = -workspace.ctypes.data % WORKSPACE_BLOCK
    plugin.enqueue(
        [tensor_desc(a) for a in inputs],
        [tensor_desc(a) for a in outputs],
        [a.ctypes.data for a in inputs],
        [a.ctypes.data for a in outputs],
        workspace.ctypes.data + start,
        0,
    )
    return {p.name: a for p, a in zip(spec.outputs, outputs, strict=True)}


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("steps", [1, 20])
def test_kimi_delta_attention(executor: KernelExecutor, dtype: str, steps: int) -> None:
    arrays, attributes = make_case(batch=2, steps=steps, heads=2, dtype=dtype)
    plugin = plugin_of(
        executor, "KimiDeltaAttention", {**attributes, ABI_FIELD: PLUGINS["KimiDeltaAttention"].abi or ""}
    )
    kernel = "decode" if steps == 1 or dtype == "float32" else "prefill"
    check(run(plugin, "KimiDeltaAttention", list(arrays.values())), oracle(arrays, attributes), f"kda_{kernel}_{dtype}")


@pytest.mark.parametrize("decay", ["key", "head"])
def test_linear_attention(executor: KernelExecutor, decay: str) -> None:
    arrays, attributes = linear_attention_case(decay=decay, dtype="float16", q_heads=2, kv_heads=4, key_heads=2)
    names = [p.name for p in PLUGINS["LinearAttention"].op.inputs]
    results = run(plugin_of(executor, "LinearAttention", attributes), "LinearAttention", [arrays[n] for n in names])
    check_linear_attention(results, linear_attention_oracle(arrays, attributes))


def test_causal_conv_with_state(executor: KernelExecutor) -> None:
    arrays, attributes = causal_conv_case(dtype="bfloat16")
    plugin = plugin_of(executor, "CausalConvWithState", attributes)
    results = run(plugin, "CausalConvWithState", [arrays[n] for n in ("input", "weight", "bias", "past_state")])
    check_causal_conv(results, causal_conv_oracle(arrays, attributes))


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("steps", [1, 20])
def test_mixture_of_experts(executor: KernelExecutor, dtype: str, steps: int) -> None:
    arrays, attributes = moe_case(batch=2, steps=steps, groups=4, kept_groups=2, dtype=dtype)
    fields = {**attributes, ABI_FIELD: PLUGINS["MixtureOfExperts"].abi or ""}
    for runs in (executor, ChosenExecutor(executor, TorchExecutor("cpu"))):
        results = run(plugin_of(runs, "MixtureOfExperts", fields), "MixtureOfExperts", list(arrays.values()))
        check_moe(results["output"], arrays, attributes)


def test_sizes_without_a_kernel_are_refused_when_an_engine_is_built(executor: KernelExecutor) -> None:
    arrays, attributes = make_case(dim=32)
    plugin = plugin_of(
        executor, "KimiDeltaAttention", {**attributes, ABI_FIELD: PLUGINS["KimiDeltaAttention"].abi or ""}
    )
    plugin._refuse = None  # raise, where a build would keep it and raise at its end
    with pytest.raises(ContractError, match="head_dim is 32"):
        plugin.configure_plugin([dynamic_desc(a) for a in arrays.values()], [])


def test_a_plan_with_too_little_workspace_is_refused(executor: KernelExecutor) -> None:
    arrays, attributes = make_case(steps=40)
    fields = {**attributes, ABI_FIELD: PLUGINS["KimiDeltaAttention"].abi or "", "workspace_blocks": 0}
    with pytest.raises(EngineError, match="keeps less workspace"):
        plugin_of(executor, "KimiDeltaAttention", fields).on_shape_change([tensor_desc(a) for a in arrays.values()], [])


def test_torch_runs_the_sizes_that_no_kernel_takes(executor: KernelExecutor) -> None:
    chosen = ChosenExecutor(executor, TorchExecutor("cpu"))
    abi = PLUGINS["KimiDeltaAttention"].abi or ""
    for dim, bound in ((32, "float32"), (64, "kda_decode_float32")):
        arrays, attributes = make_case(steps=3, dim=dim, dtype="float32")
        plugin = plugin_of(chosen, "KimiDeltaAttention", {**attributes, ABI_FIELD: abi})
        results = run(plugin, "KimiDeltaAttention", list(arrays.values()))
        expected = oracle(arrays, attributes)
        if dim == 64:
            check(results, expected, bound)
        else:
            for name, array in results.items():
                assert compare(array, expected[name]).within(tolerance(bound)), name


def test_standard_operators_without_the_library_are_refused_when_an_engine_is_built() -> None:
    arrays, attributes = causal_conv_case()
    trt, plugin = backend().module, PLUGINS["CausalConvWithState"]
    fields, kept = write_fields(trt, plugin, attributes)
    made = creator_class(backend(), plugin)(TorchExecutor("cpu")).create_plugin("node", fields, trt.TensorRTPhase.BUILD)
    made._refuse = None
    with pytest.raises(BackendError, match="make kernels"):
        made.configure_plugin([dynamic_desc(a) for a in arrays.values()], [])
    del kept


def test_no_torch_is_imported(executor: KernelExecutor) -> None:
    """Creating, configuring and running a plugin where torch cannot be imported; the tests' own helpers import it."""
    code = """
import sys
from tests.engine.test_plugin_kernels import causal_conv_case, plugin_of, run
for name in [n for n in sys.modules if n.split(".")[0] == "torch"]:
    sys.modules[name] = None
from kimi_deploy.engine.plugin_executors import KernelExecutor
from kimi_deploy.kernels.library import KernelLibrary
executor = KernelExecutor(KernelLibrary.open(sys.argv[1]))
arrays, attributes = causal_conv_case()
inputs = [arrays[n] for n in ("input", "weight", "bias", "past_state")]
run(plugin_of(executor, "CausalConvWithState", attributes), "CausalConvWithState", inputs)
"""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code, str(executor.library.path)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
