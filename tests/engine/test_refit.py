"""Filling an engine's weights: what is asked of TensorRT's refitter, what is written, what is refused.

No TensorRT refits without a GPU, so that a stand-in has its classes here; `tests/runtime/test_engine_on_gpu.py` does it
for real.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx
import pytest
from click.testing import CliRunner

from kimi_deploy import manifest as manifest_module
from kimi_deploy.cli.main import cli
from kimi_deploy.cuda_driver import GpuDevice
from kimi_deploy.engine import load as engine_load
from kimi_deploy.engine import refit
from kimi_deploy.engine.backend import Backend, load
from kimi_deploy.errors import BackendError, EngineError, KimiDeployError, ManifestError, UsageError
from kimi_deploy.manifest import Manifest
from tests.capabilities import needs_tensorrt_rtx
from tests.engine.conftest import no_progress

pytestmark = needs_tensorrt_rtx

FLAGS = SimpleNamespace(EXCLUDE_WEIGHTS="exclude weights", INCLUDE_REFIT="include refit")


class FakeTensorRt:
    """The module: a runtime whose engines have no weights until a refitter gave them, from files beside the graph."""

    SerializationFlag = FLAGS

    def __init__(self) -> None:
        self.refuse = ""
        self.missing: list[str] = []
        self.engines: list[FakeEngine] = []

    def Runtime(self, logger: Any) -> Any:
        return SimpleNamespace(deserialize_cuda_engine=self._deserialise)

    def _deserialise(self, plan: bytes) -> FakeEngine:
        self.engines.append(FakeEngine(plan))
        return self.engines[-1]

    def Refitter(self, engine: FakeEngine, logger: Any) -> Any:
        def commit() -> bool:
            if self.refuse == "commit":
                logger.errors.append("a weight has another size")
                return False
            engine.weights = engine.given
            return True

        return SimpleNamespace(engine=engine, get_missing_weights=lambda: self.missing, refit_cuda_engine=commit)

    def OnnxParserRefitter(self, refitter: Any, logger: Any) -> Any:
        def refit_from_bytes(model: bytes, path: str) -> bool:
            graph = onnx.load_from_string(model).graph
            files = {e.value for t in graph.initializer for e in t.external_data if e.key == "location"}
            refitter.engine.given = b"".join((Path(path).parent / name).read_bytes() for name in sorted(files))
            refitter.engine.nodes = {n.op_type for n in graph.node}
            return self.refuse != "parse"

        error = SimpleNamespace(desc=lambda: "weights of another graph")
        count = 1 if self.refuse == "parse" else 0
        return SimpleNamespace(refit_from_bytes=refit_from_bytes, num_errors=count, get_error=lambda index: error)


class FakeEngine:
    """ICudaEngine of a stripped plan."""

    def __init__(self, plan: bytes) -> None:
        self.plan, self.weights, self.given = plan, b"", b""
        self.nodes: set[str] = set()
        self.flags = {FLAGS.EXCLUDE_WEIGHTS}

    def create_serialization_config(self) -> Any:
        return SimpleNamespace(clear_flag=self.flags.discard, set_flag=self.flags.add)

    def serialize_with_config(self, config: Any) -> bytes:
        return b"plan" + (b"" if FLAGS.EXCLUDE_WEIGHTS in self.flags else self.weights)


@pytest.fixture
def trt(monkeypatch: pytest.MonkeyPatch) -> FakeTensorRt:
    module: Any = FakeTensorRt()
    real = load("tensorrt-rtx")
    stand_in = Backend("tensorrt-rtx", module, real.version, SimpleNamespace(errors=[]))
    monkeypatch.setattr(Backend, "offered_capabilities", ("8.9",))
    monkeypatch.setattr(engine_load, "load", lambda name: stand_in)
    monkeypatch.setattr(engine_load, "register_plugins", lambda *arguments: None)
    for home in (engine_load, refit):
        monkeypatch.setattr(home, "gpu_devices", lambda: (GpuDevice("NVIDIA L4", "8.9"),))
    return module


def stripped(engine: Path, tmp_path: Path, edit: Callable[[dict[str, Any]], object] | None = None) -> Path:
    """The engine, with a manifest that says it has no weights."""
    folder = Path(shutil.copytree(engine, tmp_path / "stripped"))
    raw = json.loads((folder / "manifest.json").read_text())
    raw["details"]["recipe"]["strip_weights"] = True
    if edit is not None:
        edit(raw)
    (folder / "manifest.json").write_text(json.dumps(raw))
    return folder


def run(folder: Path, export: Path, output: Path) -> Manifest:
    return refit.refit_engine(folder, export, output, overwrite=False, progress=no_progress)


@pytest.mark.parametrize("refittable", [False, True])
def test_the_filled_engine_has_the_exports_weights_and_opens(
    trt: FakeTensorRt, refittable: bool, engine: Path, export: Path, tmp_path: Path
) -> None:
    folder = stripped(engine, tmp_path, lambda raw: raw["details"]["recipe"].update(refit=refittable))
    with pytest.raises(EngineError, match=r"(?s)without its weights.*kimi-deploy refit"):
        engine_load.open_engine(folder)
    manifest = run(folder, export, tmp_path / "full")
    manifest.verify(tmp_path / "full")
    assert (tmp_path / "full" / "engine.plan").read_bytes() == b"plan" + (export / "weights.bin").read_bytes()
    assert manifest.source == Manifest.read(engine).source
    assert manifest.files.keys() == Manifest.read(engine).files.keys()
    # the graph is the one that was built: bodies and plugins as they were
    assert "KimiDeltaAttention" in trt.engines[-1].nodes
    assert (FLAGS.INCLUDE_REFIT in trt.engines[-1].flags) == refittable
    engine_load.open_engine(tmp_path / "full")
    assert trt.engines[-1].plan == (tmp_path / "full" / "engine.plan").read_bytes()


@pytest.mark.parametrize(
    ("refuse", "missing", "says"),
    [
        ("parse", [], "weights of another graph"),
        ("commit", [], "another size"),
        ("", ["layers.0.weight"], r"1 weights missing.*layers\.0\.weight"),
    ],
)
def test_what_tensorrt_refuses_leaves_nothing(
    trt: FakeTensorRt, refuse: str, missing: list[str], says: str, engine: Path, export: Path, tmp_path: Path
) -> None:
    trt.refuse, trt.missing = refuse, missing
    with pytest.raises(EngineError, match=f"(?s){says}"):
        run(stripped(engine, tmp_path), export, tmp_path / "full")
    assert not (tmp_path / "full").exists()


@pytest.mark.parametrize(
    ("edit", "error", "says"),
    [
        (lambda raw: raw["details"]["recipe"].update(strip_weights=False), UsageError, "--strip-weights"),
        (lambda raw: raw["details"]["contract"].update(vocab_size=7), EngineError, "another graph"),
        (lambda raw: raw["source"].update(checkpoint="0" * 64), EngineError, "only the weights it was built from"),
        (lambda raw: raw["details"].update(compute_capabilities=["12.0"]), EngineError, "built for other GPUs"),
        (lambda raw: None, UsageError, "not empty"),
    ],
)
def test_what_cannot_be_filled_is_refused_before_tensorrt_reads_a_plan(
    trt: FakeTensorRt,
    edit: Callable[[dict[str, Any]], object],
    error: type[KimiDeployError],
    says: str,
    engine: Path,
    export: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Nor is anything hashed but the graph."""
    hashed: list[str] = []
    sha256 = manifest_module.sha256

    def noted(path: Path, *rest: Any) -> str:
        hashed.append(path.name)
        return sha256(path, *rest)

    monkeypatch.setattr(manifest_module, "sha256", noted)
    (tmp_path / "full").mkdir()
    if says == "not empty":
        (tmp_path / "full" / "notes.txt").write_text("mine")
    with pytest.raises(error, match=f"(?s){says}"):
        run(stripped(engine, tmp_path, edit), export, tmp_path / "full")
    assert trt.engines == []
    assert set(hashed) <= {"model.onnx"}


@pytest.mark.parametrize("damaged", ["plan", "weights"])
def test_changed_files_are_refused_before_tensorrt_reads_a_plan(
    trt: FakeTensorRt, damaged: str, engine: Path, export: Path, tmp_path: Path
) -> None:
    folder, given = stripped(engine, tmp_path), Path(shutil.copytree(export, tmp_path / "export"))
    file = folder / "engine.plan" if damaged == "plan" else given / "weights.bin"
    data = bytearray(file.read_bytes())
    data[1000] ^= 1
    file.write_bytes(data)
    with pytest.raises(ManifestError, match=file.name):
        run(folder, given, tmp_path / "full")
    assert trt.engines == []
    assert not (tmp_path / "full").exists()


def test_a_refittable_engine_takes_another_checkpoints_weights(
    trt: FakeTensorRt, engine: Path, export: Path, tmp_path: Path
) -> None:
    def other(raw: dict[str, Any]) -> None:
        raw["source"]["checkpoint"] = "0" * 64
        raw["details"]["recipe"]["refit"] = True

    manifest = run(stripped(engine, tmp_path, other), export, tmp_path / "full")
    assert manifest.source["checkpoint"] == Manifest.read(export).source["checkpoint"]


def test_without_a_gpu_the_command_says_so_in_one_line(
    engine: Path, export: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(refit, "gpu_devices", lambda: ())
    folder = stripped(engine, tmp_path)
    done = CliRunner().invoke(cli, ["refit", str(folder), str(export), "-o", str(tmp_path / "full")])
    assert isinstance(done.exception, BackendError)
    assert "\n" not in str(done.exception)
    assert "8.9" in str(done.exception)


@pytest.mark.parametrize("wrong", ["nothing there", "a checkpoint", "an engine", "another ABI"])
def test_the_export_is_looked_at_before_the_machine(
    wrong: str, engine: Path, checkpoint: Path, export: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(refit, "gpu_devices", lambda: ())
    folder, given = stripped(engine, tmp_path), tmp_path / "export"
    if wrong == "another ABI":
        shutil.copytree(export, given)
        raw = json.loads((given / "manifest.json").read_text())
        raw["op_abi"]["KimiDeltaAttention"] = "0" * 16
        (given / "manifest.json").write_text(json.dumps(raw))
    elif wrong != "nothing there":
        given = checkpoint if wrong == "a checkpoint" else engine
    done = CliRunner().invoke(cli, ["refit", str(folder), str(given), "-o", str(tmp_path / "full")])
    assert isinstance(done.exception, KimiDeployError)
    assert not isinstance(done.exception, BackendError)
    assert done.exception.exit_code == (1 if wrong == "another ABI" else 2)
