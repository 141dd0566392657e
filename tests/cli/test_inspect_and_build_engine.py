"""inspect and build-engine as a user runs them: output, JSON, exit codes."""

from __future__ import annotations

import json
import shutil
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result

from kimi_deploy.checkpoint.synth import synthesize
from kimi_deploy.cli.build_engine import BACKENDS, HARDWARE, PLANS, PLUGINS, VERBOSITIES
from kimi_deploy.cli.main import cli
from kimi_deploy.engine import recipe
from kimi_deploy.engine.backend import BACKEND_CHOICES
from kimi_deploy.engine.recipe import HARDWARE_LEVELS, PLUGIN_CHOICES
from kimi_deploy.errors import BackendError, KimiDeployError, UsageError
from kimi_deploy.manifest import Manifest
from kimi_deploy.onnx.export import export_model
from kimi_deploy.ops.registry import OPS
from kimi_deploy.runtime.trt_runner import TrtRunner
from kimi_deploy.validate.faults.fake_tensorrt import FakeDevice, FakeSession, profile
from tests.capabilities import needs_no_cuda, needs_tensorrt_rtx

torch.set_num_threads(1)
SMALL = ("--prefill", "sequence=1:8:16,capacity=32,batch=1,num_logits=1", "--decode", "capacity=32,batch=1")


def run(*arguments: object) -> Result:
    return CliRunner().invoke(cli, [str(a) for a in arguments])


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("synth") / "tiny"
    synthesize("tiny", folder, layers=1)
    return folder


@pytest.fixture(scope="module")
def export(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("export") / "tiny"
    export_model(
        checkpoint,
        folder,
        dtype="float16",
        flavour="onnx",
        overwrite=False,
        progress=lambda what, total: nullcontext(lambda n: None),
    )
    return folder


def test_inspect_a_checkpoint(checkpoint: Path, tmp_path: Path) -> None:
    done = run("inspect", checkpoint)
    assert done.exit_code == 0
    assert "1: 1 KDA, 0 MLA; 1 dense, 0 mixture of experts" in done.stdout
    assert "every tensor accounted for" in done.stdout
    found = json.loads(run("inspect", checkpoint, "--json").stdout)
    assert (found["kind"], found["problems"]) == ("checkpoint", [])
    assert found["parameters"] * 4 == found["bytes"]


def test_inspect_names_what_a_checkpoint_lacks(checkpoint: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(checkpoint, tmp_path / "copy"))
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"intermediate_size": config["intermediate_size"] + 8}))
    done = run("inspect", copy)
    assert done.exit_code == 1
    assert "problem:" in done.stdout
    assert "gate_proj" in done.stdout


def test_inspect_an_export(export: Path, tmp_path: Path) -> None:
    done = run("inspect", export)
    assert done.exit_code == 0
    for text in (OPS["KimiDeltaAttention"].abi, "float16", "onnx, opset 27", "past_key_values.0.recurrent_state"):
        assert text in done.stdout
    copy = Path(shutil.copytree(export, tmp_path / "copy"))
    data = bytearray((copy / "weights.bin").read_bytes())
    data[-1] ^= 1
    (copy / "weights.bin").write_bytes(data)
    assert run("inspect", copy, "--quick").exit_code == 0
    damaged = run("inspect", copy, "--json")
    assert damaged.exit_code == 1
    assert "weights.bin" in json.loads(damaged.stdout)["problems"][0]


def test_inspect_refuses_what_is_no_folder(tmp_path: Path) -> None:
    assert isinstance(run("inspect", tmp_path / "nothing").exception, UsageError)
    assert isinstance(run("inspect", tmp_path).exception, KimiDeployError)


@needs_tensorrt_rtx
@pytest.mark.parametrize("wrong", ["a checkpoint", "no such file", "an empty file", "a GPU that is not offered"])
def test_build_engine_of_something_else_is_wrong_usage(
    checkpoint: Path, export: Path, tmp_path: Path, wrong: str
) -> None:
    given = {"a checkpoint": checkpoint, "a GPU that is not offered": export}.get(wrong, tmp_path / "model.onnx")
    if wrong == "an empty file":
        given.touch()
    error = run("build-engine", given, "-o", tmp_path / "engine", "--capability", "9.0").exception
    assert isinstance(error, KimiDeployError)
    assert error.exit_code == 2
    says = {
        "a checkpoint": f"kimi-deploy export {checkpoint} -o DIR",
        "no such file": "no such file or folder",
        "an empty file": "not an ONNX model",
        "a GPU that is not offered": "compute capability 9.0",
    }
    assert says[wrong] in str(error)


@needs_tensorrt_rtx
def test_build_engine_then_inspect_it(export: Path, tmp_path: Path) -> None:
    engine = tmp_path / "engine"
    done = run("build-engine", export, "-o", engine, "--capability", "8.9", *SMALL)
    assert done.exit_code == 0, done.output
    assert "1 KimiDeltaAttention plugin layers" in done.stderr
    assert "engine.plan" in done.stdout
    shown = run("inspect", engine)
    assert shown.exit_code == 0
    for text in ("tensorrt-rtx", "8.9", "1 KimiDeltaAttention", "1..8..16", OPS["KimiDeltaAttention"].abi):
        assert text in shown.stdout
    details = json.loads(run("inspect", engine, "--json").stdout)["manifest"]["details"]
    assert details["recipe"]["prefill"]["capacity"] == [32, 32, 32]
    again = run("build-engine", export, "-o", engine, "--capability", "8.9", *SMALL)
    assert isinstance(again.exception, UsageError)


@needs_tensorrt_rtx
@needs_no_cuda
def test_commands_that_run_an_engine_say_in_one_line_that_there_is_no_gpu(
    checkpoint: Path, export: Path, tmp_path: Path
) -> None:
    engine = tmp_path / "engine"
    assert run("build-engine", export, "-o", engine, "--capability", "8.9", *SMALL).exit_code == 0
    for command in (
        ("generate", engine, "--backend", "trt", "--prompt", "x"),
        ("validate", checkpoint, engine, "--backend", "trt"),
        ("bench", checkpoint, export, "--backend", "trt", "--engine", engine),
    ):
        done = run(*command)
        assert isinstance(done.exception, BackendError), done.output
        assert "kimi-deploy generate" in str(done.exception)
        assert "\n" not in str(done.exception)


@needs_tensorrt_rtx
def test_an_engine_is_validated_and_keeps_its_report(
    checkpoint: Path, export: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the export in the engine's place, on host memory: everything but TensorRT and CUDA is real."""
    engine = tmp_path / "engine"
    assert run("build-engine", export, "-o", engine, "--capability", "8.9", *SMALL).exit_code == 0

    def open_runner(folder: Path, **options: Any) -> TrtRunner:
        assert folder == engine
        device = FakeDevice()
        profiles = (profile("prefill", 0, 16, 24, 500, 6), profile("decode", 1, 16, 1, 500, 1))
        fingerprint = Manifest.read(folder).source["checkpoint"]
        return TrtRunner(FakeSession(export / "model.onnx", device, profiles, fingerprint), device)

    monkeypatch.setattr("kimi_deploy.validate.run.open_runner", open_runner)
    sizes = ("--max-tokens", 12, "--long-tokens", 30, "--greedy-tokens", 8)
    done = run("validate", checkpoint, engine, "--backend", "trt", *sizes)
    assert done.exit_code == 0, done.output
    assert "tensorrt-rtx against PyTorch: pass" in done.stdout
    Manifest.read(engine).verify(engine)


def test_an_export_is_not_run_as_an_engine(checkpoint: Path, export: Path) -> None:
    for command in (
        ("generate", export, "--backend", "trt", "--prompt", "x"),
        ("validate", checkpoint, export, "--backend", "trt"),
    ):
        assert "build-engine" in str(run(*command).exception)
    assert isinstance(run("bench", checkpoint, export, "--backend", "trt").exception, UsageError)


@needs_tensorrt_rtx
def test_options_override_the_recipe(export: Path, tmp_path: Path) -> None:
    file = tmp_path / "recipe.toml"
    file.write_text('backend = "tensorrt-rtx"\nplugin = "auto"\n[decode]\nbatch = 1\n')
    arguments = ("build-engine", export, "-o", tmp_path / "engine", "--recipe", file, "--plugin", "none", "--json")
    done = run(*arguments, "--capability", "8.9", *SMALL)
    assert done.exit_code == 0, done.output
    details = json.loads(done.stdout)["manifest"]["details"]
    assert details["plugins"] == {}
    assert details["compute_capabilities"] == ["8.9"]
    assert details["recipe"]["decode"]["batch"] == [1, 1, 1]


@pytest.mark.parametrize(
    "options",
    [
        ("--prefill", "sequence=9000"),
        ("--decode", "sequence=2:1:3"),
        ("--capability", "ada"),
        ("--recipe", "none.toml"),
    ],
)
def test_wrong_options_are_usage_errors(export: Path, tmp_path: Path, options: tuple[str, ...]) -> None:
    done = run("build-engine", export, "-o", tmp_path / "engine", *options)
    assert isinstance(done.exception, UsageError)
    assert done.exception.exit_code == 2
    assert not (tmp_path / "engine").exists()


def test_help_offers_what_the_library_takes() -> None:
    choices: Any = (BACKENDS, PLUGINS, PLANS, HARDWARE, VERBOSITIES)
    assert choices == (BACKEND_CHOICES, PLUGIN_CHOICES, recipe.PLANS, HARDWARE_LEVELS, recipe.VERBOSITIES)
