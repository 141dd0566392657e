"""The library is taken where it fits, refused where it does not, and named by what uses it."""

from __future__ import annotations

import subprocess
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest

from kimi_deploy.checkpoint.presets import preset_config
from kimi_deploy.contract import METADATA_KEY, GraphContract
from kimi_deploy.errors import BackendError, UsageError
from kimi_deploy.manifest import sha256
from kimi_deploy.ops.kimi_delta_attention.body import body
from kimi_deploy.ops.kimi_delta_attention.spec import SPEC
from kimi_deploy.ops.registry import OPS
from kimi_deploy.quantization.scheme import parse_scheme
from kimi_deploy.runtime.open import open_runner
from kimi_deploy.runtime.ort_kernels import OrtKernels
from kimi_deploy.runtime.ort_runner import OrtRunner
from kimi_deploy.runtime.ort_tokenwise import ABI, NAME
from kimi_deploy.validate.run import Settings, validate_export
from kimi_deploy.validate.selection import PARITY_CHECKS, QUANTIZED_CHECKS
from tests.graph.conftest import export, no_progress
from tests.ops.body_cases import kda_arrays, kda_attributes
from tests.ops.op_model import executed, op_model, session

DEMO = Path(__file__).resolve().parents[2] / "models" / "demo"
FAKE = """
#include <stdint.h>
int32_t kimi_ort_count(void) {{ return 1; }}
const char *kimi_ort_name(int32_t i) {{ return "{name}"; }}
const char *kimi_ort_abi(int32_t i) {{ return "{abi}"; }}
const char *kimi_ort_instruction_set(void) {{ return "none"; }}
"""


def test_the_library_was_built_for_this_packages_ops(library: OrtKernels) -> None:
    assert library.abis
    assert library.abis.items() <= ({name: op.abi for name, op in OPS.items()} | {NAME: ABI}).items()


def test_a_kernel_is_taken_in_the_place_of_a_body(library: OrtKernels, tmp_path: Path) -> None:
    attributes = kda_attributes()
    model = op_model(SPEC, body("ort", attributes, "float32"), attributes, "float32", kda_arrays(attributes, [1], 1))
    assert len(executed(model, tmp_path).node) > 1
    path = tmp_path / "kernels.onnx"
    session(model, optimized=str(path), kernels=library)
    assert [(n.domain, n.op_type) for n in onnx.load(path).graph.node] == [("kimi", SPEC.name)]


def test_a_library_of_another_abi_is_refused_with_both_hashes(tmp_path: Path) -> None:
    source, path = tmp_path / "fake.c", tmp_path / "libkimi_ort.so"
    source.write_text(FAKE.format(name=SPEC.name, abi="0123456789abcdef"))
    subprocess.run(["cc", "-shared", "-fPIC", "-o", str(path), str(source)], check=True)
    with pytest.raises(BackendError, match=SPEC.name) as caught:
        OrtKernels.open(path)
    assert ("0123456789abcdef" in caught.value.seen, SPEC.abi in caught.value.expected) == (True, True)
    assert "make cpu-kernels" in caught.value.fix


def test_a_library_that_onnx_runtime_does_not_take_is_refused(tmp_path: Path) -> None:
    source, path = tmp_path / "fake.c", tmp_path / "libkimi_ort.so"
    source.write_text(FAKE.format(name=SPEC.name, abi=SPEC.abi))
    subprocess.run(["cc", "-shared", "-fPIC", "-o", str(path), str(source)], check=True)
    with pytest.raises(BackendError, match="does not take the library") as caught:
        OrtKernels.open(path).register(onnxruntime.SessionOptions())
    assert "RegisterCustomOps" in caught.value.seen
    assert "make cpu-kernels" in caught.value.fix


def test_a_library_that_nothing_would_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="ONNX Runtime alone"):
        open_runner(DEMO, kernels=tmp_path / "missing.so")
    with pytest.raises(UsageError, match="the CPU alone"):
        OrtRunner(tmp_path, provider="cuda", kernels=tmp_path / "missing.so")


def test_a_graph_of_another_abi_is_refused_with_both_hashes(library: OrtKernels) -> None:
    attributes = kda_attributes()
    model = op_model(SPEC, [], attributes, "float32", kda_arrays(attributes, [1], 1))
    (abi,) = [a for a in model.graph.node[0].attribute if a.name == "abi"]
    abi.s = b"0123456789abcdef"
    with pytest.raises(Exception, match=f"0123456789abcdef.*{SPEC.abi}"):
        session(model, kernels=library)


def test_a_wrong_shape_is_refused_with_what_was_expected(library: OrtKernels) -> None:
    attributes = kda_attributes()
    arrays = kda_arrays(attributes, [1], 1)
    arrays["dt_bias"] = np.zeros(7, np.float32)
    attributes["head_dim"] = 16
    good = kda_arrays(attributes, [1], 1)
    model = op_model(SPEC, [], attributes, "float32", good)
    (weight,) = [i for i in model.graph.initializer if i.name == "dt_bias"]
    weight.CopyFrom(onnx.numpy_helper.from_array(arrays["dt_bias"], "dt_bias"))
    built = session(model, kernels=library)
    fed = {i.name: good[i.name] for i in built.get_inputs()}
    with pytest.raises(Exception, match=r"dt_bias has 7 on axis 0; expected: num_heads\*head_dim = 32"):
        built.run(None, fed)


def test_what_is_not_a_library_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BackendError, match="is not there"):
        OrtKernels.open(tmp_path / "missing.so")
    with pytest.raises(BackendError, match="a folder\n  expected: auto, none, or the path"):
        OrtKernels.open(tmp_path)
    wrong = tmp_path / "wrong.so"
    wrong.write_text("no library")
    with pytest.raises(BackendError, match="cannot be loaded"):
        OrtKernels.open(wrong)


def test_none_and_a_missing_default_mean_function_bodies(
    library_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert OrtKernels.find("none") is None
    assert OrtKernels.find(library_path) is not None
    monkeypatch.setattr("kimi_deploy.runtime.ort_kernels.default_path", lambda: tmp_path / "missing.so")
    assert OrtKernels.find("auto") is None
    monkeypatch.setattr("kimi_deploy.runtime.ort_kernels.default_path", lambda: library_path)
    assert OrtKernels.find("auto") is not None


def test_the_demo_model_passes_every_check_on_kernels(library: OrtKernels, tmp_path: Path) -> None:
    settings = Settings(greedy_tokens=64, max_tokens=48, kernels=str(library.path))
    report = validate_export(DEMO, export(DEMO, tmp_path / "export"), settings, no_progress)
    assert report.passed
    used = report.facts["kernels"]
    assert used["ops"] == sorted(set(library.abis) - {"QuantizedMixtureOfExperts", NAME})
    assert (used["library"], used["instruction_set"]) == (sha256(library.path), library.instruction_set)
    assert report.backend == "ONNX Runtime (cpu, our kernels)"


def test_the_quantised_demo_model_passes_every_check_on_kernels(library: OrtKernels, tmp_path: Path) -> None:
    """Its arithmetic, the rounding of its inputs, and what it costs on text."""
    settings = Settings(greedy_tokens=24, max_tokens=24, long_tokens=130, kernels=str(library.path))
    exported = export(DEMO, tmp_path / "export", quantization=parse_scheme("int4"))
    report = validate_export(DEMO, exported, settings, no_progress)
    assert report.passed, report.failure
    assert {"QuantizedMixtureOfExperts", NAME} <= set(report.facts["kernels"]["ops"])
    assert {r.check for r in report.rows} >= {*PARITY_CHECKS, *QUANTIZED_CHECKS}


def test_a_sixteen_bit_graph_keeps_its_bodies(library: OrtKernels) -> None:
    model = onnx.helper.make_model(onnx.helper.make_graph([], "empty", [], []))
    node = model.graph.node.add()
    node.op_type, node.domain = SPEC.name, "kimi"
    metadata = model.metadata_props.add()
    for dtype, covered in (("float32", True), ("float16", False)):
        metadata.key, metadata.value = METADATA_KEY, GraphContract.of(preset_config("tiny"), dtype).to_json()
        kernels = library.covers(model.SerializeToString())
        assert (kernels is not None and kernels.ops == (SPEC.name,)) == covered
