"""doctor: every part of the machine has a line, a fault is a problem with its fix, and nothing hides the rest."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from kimi_deploy.cli.main import cli
from kimi_deploy.cuda_driver import GpuDevice
from kimi_deploy.doctor import Check, cuda, machine, packages, run_checks, tensorrt
from kimi_deploy.errors import BackendError, EngineError
from tests.capabilities import needs_tensorrt_rtx

HOPPER = GpuDevice("NVIDIA H200", "9.0")


def by_name(checks: list[Check]) -> dict[str, Check]:
    return {c.name: c for c in checks}


def test_every_part_has_a_line_and_whatever_is_not_ok_a_fix(tmp_path: Path) -> None:
    checks = by_name(run_checks(tmp_path / "not" / "there"))
    for name in ("python", "torch", "onnx", "onnxruntime", "cuda driver", "cuda toolkit", "cuda-python"):
        assert name in checks
    for name in ("tensorrt", "tensorrt-rtx", "kernels", "plugin library", "disk", "memory"):
        assert name in checks
    assert all(c.fix for c in checks.values() if c.status != "ok")
    assert "CPUExecutionProvider" in checks["onnxruntime"].seen
    assert checks["python"].status == checks["onnx"].status == "ok"


def test_the_command_prints_json_and_its_exit_code_says_whether_there_is_a_problem(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    done = CliRunner().invoke(cli, ["doctor", "--json"])
    assert {c["status"] for c in json.loads(done.stdout)} <= {"ok", "warning", "problem"}
    monkeypatch.setattr(machine, "memory", lambda: [Check("memory", "problem", "none [at all]", "buy some")])
    done = CliRunner().invoke(cli, ["doctor"])
    assert done.exit_code == 1
    assert "none [at all]" in done.stdout
    assert "buy some" in done.stdout


def test_a_check_that_breaks_is_a_problem_and_the_others_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> list[Check]:
        raise OSError("libfoo.so: undefined symbol")

    monkeypatch.setattr(packages, "onnxruntime", broken)
    checks = by_name(run_checks(tmp_path))
    assert checks["onnxruntime"].status == "problem"
    assert "undefined symbol" in checks["onnxruntime"].seen
    assert "memory" in checks


def test_a_gpu_that_a_package_does_not_see_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packages, "gpu_devices", lambda: (HOPPER,))
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("onnxruntime.get_available_providers", lambda: ["CPUExecutionProvider"])
    assert [c.status for c in (*packages.torch(), *packages.onnxruntime())] == ["warning", "warning"]
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert packages.torch()[0].status == "ok"


@needs_tensorrt_rtx
def test_tensorrt_rtx_beside_a_hopper_is_a_warning_that_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensorrt, "gpu_devices", lambda: (HOPPER,))
    rtx = by_name(tensorrt.flavours())["tensorrt-rtx"]
    assert rtx.status == "warning"
    assert "H200 (9.0)" in rtx.fix
    monkeypatch.setattr(tensorrt, "gpu_devices", lambda: (GpuDevice("NVIDIA L4", "8.9"),))
    assert by_name(tensorrt.flavours())["tensorrt-rtx"].status == "ok"


def test_a_tensorrt_that_does_not_load_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(name: str) -> Any:
        raise BackendError(
            f"{name} is installed but does not load", seen="libnvinfer.so.11: not found", fix="reinstall"
        )

    monkeypatch.setattr("kimi_deploy.engine.backend.installed", lambda name: name == "tensorrt")
    monkeypatch.setattr("kimi_deploy.engine.backend.load", load)
    checks = by_name(tensorrt.flavours())
    assert (checks["tensorrt"].status, checks["tensorrt"].seen) == ("problem", "libnvinfer.so.11: not found")
    assert checks["tensorrt-rtx"].status == "ok"
    monkeypatch.setattr("kimi_deploy.engine.backend.installed", lambda name: False)
    assert {c.status for c in tensorrt.flavours()} == {"warning"}


def test_a_plugin_library_of_another_abi_is_a_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library = tmp_path / "libkimi_plugins.so"
    library.touch()

    def refuse(path: object = None) -> Any:
        raise EngineError("built for another ABI of KimiDeltaAttention", seen="0123", fix="make plugins")

    monkeypatch.setattr("kimi_deploy.engine.plugin_library.default_path", lambda: library)
    monkeypatch.setattr("kimi_deploy.engine.plugin_library.PluginLibrary.open", refuse)
    found = by_name(tensorrt.libraries())["plugin library"]
    assert (found.status, found.fix) == ("problem", "make plugins")
    assert "0123" in found.seen


@pytest.mark.parametrize(("release", "status"), [("release 13.0, V13.0.1", "ok"), ("release 12.4, V12.4.9", "warning")])
def test_an_old_toolkit_is_a_warning(
    release: str, status: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nvcc = tmp_path / "nvcc"
    nvcc.write_text(f"#!/bin/sh\necho 'Cuda compilation tools, {release}'\n")
    nvcc.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    (found,) = cuda.toolkit()
    assert found.status == status
    assert release[:12] in found.seen


def test_a_machine_without_driver_and_gpu_is_told_what_works_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "driver_version", lambda: None)
    monkeypatch.setattr(cuda, "gpu_devices", lambda: ())
    (driver,), (gpu,) = cuda.driver(), cuda.gpus()
    assert (driver.status, gpu.status, gpu.seen) == ("warning", "warning", "none")
    assert "driver" in driver.fix
    assert "ONNX Runtime on the CPU" in gpu.fix


def test_an_old_driver_and_an_old_gpu_are_warnings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "driver_version", lambda: (12, 4))
    monkeypatch.setattr(cuda, "gpu_devices", lambda: (GpuDevice("Tesla T4", "7.5"), HOPPER))
    assert cuda.driver()[0].status == "warning"
    assert [c.status for c in cuda.gpus()] == ["warning", "ok"]
    monkeypatch.setattr(cuda, "driver_version", lambda: (13, 1))
    assert cuda.driver()[0].status == "ok"
