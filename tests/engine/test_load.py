"""Opening an engine: whatever does not fit is refused before TensorRT sees a byte of the plan."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner

from kimi_deploy.cli.main import cli
from kimi_deploy.cuda_driver import GpuDevice
from kimi_deploy.engine import load as engine_load
from kimi_deploy.engine.load import check_built_from, check_engine, check_gpu, open_engine, recorded_profiles
from kimi_deploy.errors import BackendError, EngineError, ManifestError, StateError, UsageError
from kimi_deploy.manifest import Manifest
from kimi_deploy.runtime.trt_session import check_state
from tests.capabilities import needs_tensorrt_rtx

pytestmark = needs_tensorrt_rtx


@pytest.fixture
def copy(engine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the engine, on a machine where making a TensorRT runtime is a failure of the test."""

    def never(*arguments: object) -> None:
        pytest.fail("the plan reached TensorRT")

    monkeypatch.setattr(engine_load, "register_plugins", never)
    return Path(shutil.copytree(engine, tmp_path / "engine"))


def change(folder: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    raw = json.loads((folder / "manifest.json").read_text())
    edit(raw)
    (folder / "manifest.json").write_text(json.dumps(raw))


def test_an_engine_that_fits_passes(engine: Path) -> None:
    manifest, backend = check_engine(engine)
    assert manifest.details["backend"] == backend.name == "tensorrt-rtx"


def test_the_manifest_says_what_states_an_engine_holds(engine: Path) -> None:
    profiles = recorded_profiles(Manifest.read(engine))
    assert [str(p) for p in profiles] == [
        "prefill (batch 1 to 2, sequence 1 to 32, capacity 1 to 64, num_logits 1 to 4)",
        "decode (batch 1 to 2, sequence 1 to 1, capacity 1 to 64, num_logits 1 to 1)",
    ]
    check_state(profiles, 2, 64)
    for sizes in ((3, 64), (2, 65)):
        with pytest.raises(StateError, match=f"batch {sizes[0]}, capacity {sizes[1]}(?s:.*)capacity 1 to 64"):
            check_state(profiles, *sizes)


@pytest.mark.parametrize("words", [["--batch", "1,3", "--context", "8"], ["--batch", "2", "--context", "8,60"]])
def test_bench_refuses_sizes_that_the_engine_was_not_built_for_before_it_measures(
    checkpoint: Path, export: Path, engine: Path, monkeypatch: pytest.MonkeyPatch, words: list[str]
) -> None:
    monkeypatch.setattr("kimi_deploy.bench.run.run_bench", lambda *_: pytest.fail("something was measured"))
    arguments = ["bench", str(checkpoint), str(export), "--backend", "ort", "--backend", "trt", "--engine", str(engine)]
    with pytest.raises(StateError, match="no profile for a state of this size"):
        CliRunner().invoke(cli, [*arguments, "--decode-steps", "8", *words], catch_exceptions=False)


def test_an_export_of_the_same_graph_with_other_weights_is_another_export(
    engine: Path, export: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kimi_deploy.manifest.sha256", lambda *_: pytest.fail("a file was read"))
    check_built_from(engine, export)
    other = tmp_path / "other"
    other.mkdir()
    for entry in export.iterdir():
        (other / entry.name).symlink_to(entry)
    text = (export / "manifest.json").read_text()
    (other / "manifest.json").unlink()
    (other / "manifest.json").write_text(text.replace(Manifest.read(export).source["checkpoint"], "f" * 64))
    with pytest.raises(UsageError, match=r"(?s)another export.*checkpoint ffff.*build-engine"):
        check_built_from(engine, other)
    with pytest.raises(ManifestError, match="another kind"):
        check_built_from(export, export)


@pytest.mark.parametrize(
    ("edit", "error", "says"),
    [
        (lambda m: m["details"].update(backend_version="1.0.0.1"), EngineError, "(?s)another version.*1.0.0.1"),
        (lambda m: m["details"].update(backend="tensorflow"), ManifestError, "unknown TensorRT"),
        (lambda m: m["details"].pop("backend"), ManifestError, "'backend'"),
        (lambda m: m["details"].update(plugins=["x"]), ManifestError, "'plugins'"),
        (lambda m: m["details"]["plugins"].update(Other=1), EngineError, "(?s)plugins.*Other"),
        (lambda m: m["op_abi"].update(KimiDeltaAttention="0" * 16), ManifestError, "another ABI"),
        (lambda m: m.update(kind="onnx"), ManifestError, "(?s)is not valid.*body"),
        (lambda m: m.update(manifest_version=99), ManifestError, "another version"),
    ],
)
def test_a_mismatch_is_refused(
    copy: Path, edit: Callable[[dict[str, Any]], object], error: type[Exception], says: str
) -> None:
    change(copy, edit)
    with pytest.raises(error, match=says):
        open_engine(copy)


def test_a_version_compatible_engine_opens_with_a_later_tensorrt(copy: Path) -> None:
    version = check_engine(copy)[1].version
    older, newer = "1.0.0.1", f"{version}.1"
    change(copy, lambda m: m["details"]["recipe"].update(version_compatible=True))
    change(copy, lambda m: m["details"].update(backend_version=older))
    assert check_engine(copy)[0].details["backend_version"] == older
    change(copy, lambda m: m["details"].update(backend_version=newer))
    with pytest.raises(EngineError, match=r"(?s)another version.*or a later one"):
        check_engine(copy)


@pytest.mark.parametrize("compatible", [False, True])
def test_a_version_compatible_plan_may_bring_its_runtime(
    compatible: bool, copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runtime = SimpleNamespace(engine_host_code_allowed=False, deserialize_cuda_engine=lambda plan: plan)
    change(copy, lambda m: m["details"]["recipe"].update(version_compatible=compatible))
    manifest, backend = check_engine(copy)
    stand_in = replace(backend, module=SimpleNamespace(Runtime=lambda logger: runtime))
    monkeypatch.setattr(engine_load, "register_plugins", lambda *arguments: None)
    assert engine_load.read_engine(copy, manifest, stand_in).plans.keys() == {"engine.plan"}
    assert runtime.engine_host_code_allowed == compatible


@pytest.mark.parametrize(
    ("registered", "built", "kind"),
    [("python", True, "python"), ("native", False, "native"), (None, True, "native"), (None, False, "python")],
)
def test_plans_are_read_with_the_plugins_that_the_process_has(
    registered: str | None, built: bool, kind: str, copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A program that built an engine runs it too, whatever libraries there are."""
    library = tmp_path / "libkimi_plugins.so"
    if built:
        library.touch()
    asked = []

    def register(backend: object, kind: str) -> None:
        asked.append(kind)
        raise EngineError("far enough")

    monkeypatch.setattr(engine_load, "default_path", lambda: library)
    monkeypatch.setattr(engine_load, "registered_kind", lambda backend: registered)
    monkeypatch.setattr(engine_load, "register_plugins", register)
    with pytest.raises(EngineError, match="far enough"):
        engine_load.read_engine(copy, *check_engine(copy))
    assert asked == [kind]


def test_a_damaged_plan_is_refused(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = bytearray((copy / "engine.plan").read_bytes())
    plan[len(plan) // 2] ^= 1
    (copy / "engine.plan").write_bytes(plan)
    with monkeypatch.context() as with_gpu:
        with_gpu.setattr(engine_load, "gpu_devices", lambda: (GpuDevice("NVIDIA L4", "8.9"),))
        with pytest.raises(ManifestError, match=r"(?s)engine\.plan.*sha256"):
            open_engine(copy)
    (copy / "engine.plan").write_bytes(plan[:-1])
    with pytest.raises(ManifestError, match=r"(?s)engine\.plan.*bytes"):
        open_engine(copy)


def test_a_machine_without_a_gpu_is_told_so_in_one_line(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_load, "gpu_devices", lambda: ())
    monkeypatch.setattr("kimi_deploy.manifest.sha256", lambda *_: pytest.fail("a file was read"))
    with pytest.raises(BackendError) as raised:
        open_engine(copy)
    assert "\n" not in str(raised.value)
    assert "8.9" in str(raised.value)


@pytest.mark.parametrize(
    ("gpu", "fix"),
    [
        (GpuDevice("NVIDIA GeForce RTX 5090", "12.0"), r"--capability 12\.0"),
        (GpuDevice("NVIDIA H200", "9.0"), "--backend tensorrt on this machine"),
    ],
)
def test_another_gpu_is_refused_with_the_line_that_builds_for_it(
    copy: Path, monkeypatch: pytest.MonkeyPatch, gpu: GpuDevice, fix: str
) -> None:
    monkeypatch.setattr(engine_load, "gpu_devices", lambda: (gpu,))
    with pytest.raises(EngineError, match=rf"(?s){gpu.name}.*8\.9.*{fix}"):
        open_engine(copy)


def test_an_engine_for_ampere_and_later_runs_on_other_gpus(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    change(copy, lambda m: m["details"]["recipe"].update(hardware_compatibility="ampere+"))
    manifest, backend = check_engine(copy)
    monkeypatch.setattr(engine_load, "gpu_devices", lambda: (GpuDevice("NVIDIA H200", "9.0"),))
    check_gpu(manifest, backend)
    monkeypatch.setattr(engine_load, "gpu_devices", lambda: (GpuDevice("Tesla T4", "7.5"),))
    with pytest.raises(EngineError, match="built for other GPUs"):
        check_gpu(manifest, backend)
